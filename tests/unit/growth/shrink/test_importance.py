"""The file of importance: what is written comes back, and what is not whole or of another model is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, safe_open, save_file

from flm_megatron.errors import DamagedError, RequestError
from flm_megatron.growth.shrink.importance import KEY, check_importance, read_importance
from tests.support.growth_cases import old_model
from tests.support.shrink_cases import drawn_importance


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of importance."""
    path = tmp_path_factory.mktemp("importance") / "new" / "importance.safetensors"
    drawn_importance(old_model()).save(path)
    return path


def rewritten(written: Path, path: Path, **changes: object) -> Path:
    """The file with other values in its description."""
    with safe_open(written, "pt") as file:
        described = json.loads(file.metadata()[KEY])
    save_file(load_file(written), path, {KEY: json.dumps({**described, **changes})})
    return path


def test_a_file_comes_back_as_it_was(written: Path) -> None:
    before, after = drawn_importance(old_model()), read_importance(written)
    assert (after.model, after.criteria, after.samples, after.tokens, after.source_hash) == (
        *(before.model, before.criteria, before.samples, before.tokens),
        before.source_hash,
    )
    assert all(torch.equal(values, after.tensors[name]) for name, values in before.tensors.items())
    assert [path.name for path in written.parent.iterdir()] == [written.name]


def test_another_models_file_is_refused_by_what_differs(written: Path) -> None:
    found = read_importance(written)
    check_importance(found, replace(old_model(), matrix_init_std=0.5), "units")  # which changes nothing that is loaded
    with pytest.raises(RequestError, match=r"units is of another model: model\.hidden_size is 30 in the checkpoint"):
        check_importance(found, replace(old_model(), hidden_size=30), "units")


def test_what_is_no_file_of_importance_is_refused(written: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no such file"):
        read_importance(tmp_path / "missing")
    save_file({"a": torch.zeros(1)}, tmp_path / "weights")
    with pytest.raises(RequestError, match="holds no importance"):
        read_importance(tmp_path / "weights")
    with pytest.raises(RequestError, match="is of version 2, this program reads up to 1: update it"):
        read_importance(rewritten(written, tmp_path / "later", version=2))
    headless = {"num_layers": 3, "hidden_size": 24, "ffn_hidden_size": 50, "num_attention_heads": 0}
    with pytest.raises(RequestError, match="num_attention_heads is 0: it has to lie between 1"):
        read_importance(rewritten(written, tmp_path / "headless", model=headless))
    with pytest.raises(RequestError, match=r"no importance that this program knows \(criteria\.ffn"):
        read_importance(rewritten(written, tmp_path / "criteria", criteria={"ffn": "magnitude"}))


def test_damage_is_found(written: Path, tmp_path: Path) -> None:
    whole = written.read_bytes()
    (tmp_path / "short").write_bytes(whole[:-1])
    (tmp_path / "changed").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    (tmp_path / "text").write_text("importance")
    for name in ("short", "changed", "text"):
        with pytest.raises(DamagedError):
            read_importance(tmp_path / name)
    with pytest.raises(DamagedError, match=r"not torch\.float64"):
        wider = {"num_layers": 4, "hidden_size": 24}
        read_importance(rewritten(written, tmp_path / "shape", model=wider))


def test_numbers_that_cannot_be_are_damage(tmp_path: Path) -> None:
    found = drawn_importance(old_model())
    replace(found, hidden=found.hidden / 0).save(tmp_path / "infinite")
    with pytest.raises(DamagedError, match="hidden has numbers that are not finite"):
        read_importance(tmp_path / "infinite")
    for name, factor in (("negative", -1.0), ("huge", 1e308)):
        replace(found, energy=found.energy * factor).save(tmp_path / name)
        with pytest.raises(DamagedError, match="energy has numbers that are no mean squares"):
            read_importance(tmp_path / name)
