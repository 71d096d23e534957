"""AdamW in the place where megatron-core looks for FusedAdam."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from flm_megatron.engine.prepare import prepare
from flm_megatron.optim.adamw import AdamW, install_adamw


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> tuple[ModuleType, ModuleType]:
    """megatron-core's two optimizer modules as they are after import without Transformer Engine and Apex."""
    prepare()
    import megatron.core.optimizer as optimizer
    from megatron.core.optimizer import distrib_optimizer as distributed

    _imported_with(monkeypatch, optimizer, distributed, torch.optim.AdamW, fused=False)
    return optimizer, distributed


def _imported_with(
    monkeypatch: pytest.MonkeyPatch, optimizer: ModuleType, distributed: ModuleType, adam: type, fused: bool
) -> None:
    monkeypatch.setattr(optimizer, "Adam", adam)
    monkeypatch.setattr(optimizer, "USING_PYTORCH_OPTIMIZER", not fused)
    monkeypatch.setattr(distributed, "Adam", adam)
    monkeypatch.setattr(distributed, "HAVE_APEX_OR_TE", fused)
    monkeypatch.setattr(distributed, "USING_TE_OPTIMIZER", fused)
    monkeypatch.setattr(distributed, "USING_APEX_OPTIMIZER", False)


def _state(engine: tuple[ModuleType, ModuleType]) -> tuple[bool, ...]:
    optimizer, distributed = engine
    ours = optimizer.Adam is AdamW and distributed.Adam is AdamW
    fused_path = not optimizer.USING_PYTORCH_OPTIMIZER and distributed.HAVE_APEX_OR_TE
    return ours, fused_path, distributed.USING_APEX_OPTIMIZER, distributed.USING_TE_OPTIMIZER


def test_takes_the_place_of_the_fallback(engine: tuple[ModuleType, ModuleType]) -> None:
    assert install_adamw()
    assert _state(engine) == (True, True, True, False)
    assert install_adamw()


def test_leaves_a_fused_adam_that_is_installed_unless_asked(
    engine: tuple[ModuleType, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    fused_adam = type("FusedAdam", (torch.optim.AdamW,), {})
    _imported_with(monkeypatch, *engine, fused_adam, fused=True)
    assert not install_adamw()
    assert _state(engine) == (False, True, False, True)
    assert install_adamw(replace=True)
    assert _state(engine) == (True, True, True, False)
