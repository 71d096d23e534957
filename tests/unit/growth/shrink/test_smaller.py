"""The example that shrinks the quickstart's model, as far as its run files go, and the criteria that are measured."""

from __future__ import annotations

import importlib.util
import math
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType

import pytest
import torch

from flm_megatron.api.run_file import load_run
from flm_megatron.config.schema import ShrinkConfig, StageConfig
from flm_megatron.errors import FlmError, RequestError
from flm_megatron.growth.foreseen import check_run_file
from flm_megatron.growth.shrink import measure
from flm_megatron.growth.shrink.measure import chosen_criteria
from flm_megatron.growth.shrink.watch import ImportanceSums
from tests.support import REPOSITORY
from tests.support.growth_cases import old_model, trained


@pytest.fixture
def example() -> ModuleType:
    """`examples/smaller.py`."""
    spec = importlib.util.spec_from_file_location("smaller", REPOSITORY / "examples" / "smaller.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_runs_of_the_example_break_no_rule(example: ModuleType) -> None:
    trunk = load_run(REPOSITORY / "examples" / "quickstart.yaml", {"stages.large.model.vocab_size": 2048})
    for name in example.SHAPES:
        trained, distilled, scratch = example.runs_of(name, trunk, Path("large"), Path("units"))
        for run in (trained, distilled, scratch):
            check_run_file(run)
        assert trained.stages[-1].shrink is not None and distilled.stages[-1].distill is not None
        assert trained.stages[-1].model == scratch.stages[-1].model


def test_the_example_ends_where_a_command_fails(
    example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(example, "OUT", tmp_path)
    monkeypatch.setattr(example, "last_checkpoint", lambda run: tmp_path / "absent")
    assert example.main() == 2


def test_criteria_are_those_given_then_the_stages_then_the_defaults() -> None:
    default = {"hidden": "activation", "ffn": "activation", "heads": "activation", "layers": "influence"}
    assert chosen_criteria({}, None) == default
    stage = ShrinkConfig(ffn="gradient", layers="gradient")
    assert chosen_criteria({"heads": "gradient", "layers": "influence"}, stage) == {
        **default,
        "ffn": "gradient",
        "heads": "gradient",
    }
    with pytest.raises(RequestError, match="the criterion of heads is 'influence': give activation or gradient"):
        chosen_criteria({"heads": "influence"}, None)
    with pytest.raises(RequestError, match="criteria has no 'width'"):
        chosen_criteria({"width": "gradient"}, None)  # type: ignore[dict-item]


def test_what_is_measured_is_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    """Units that are no numbers have no order: a diverged checkpoint is refused."""
    model, criteria = old_model(), chosen_criteria({}, None)
    sums = ImportanceSums(model)
    sums.influence.fill_(1.0)
    monkeypatch.setattr(measure, "on_one_replica", lambda *_: sums)
    monkeypatch.setattr(measure.dist, "broadcast", lambda *_: None)
    of = (trained(model), model, StageConfig(), torch.ones(2, 5, dtype=torch.long), lambda _: nullcontext(), criteria)
    assert measure.measure_importance(*of).tokens == 8
    sums.heads[1, 2] = math.nan
    with pytest.raises(FlmError, match="importance of heads is not finite"):
        measure.measure_importance(*of)
