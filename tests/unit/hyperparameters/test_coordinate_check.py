"""The coordinate check holds for the program's muP, and fails when any one of its rules is broken."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flm_megatron.checkpoint.lazy import initial
from flm_megatron.cli.main import main
from flm_megatron.config.schema import ModelConfig
from flm_megatron.errors import RequestError
from flm_megatron.hyperparameters.coordinate_check import (
    DEFAULT_MODEL,
    CheckSettings,
    coordinate_check,
    power_of_width,
    scaled_model,
)
from flm_megatron.model.parameters import FC1, FC2, HEAD, PROJECTION, QKV, ParameterSpec
from flm_megatron.model.teleflm import TeleFLM
from flm_megatron.optim import learning_rate

TOLERANCE = 0.2
SETTINGS = CheckSettings(widths=(64, 128, 256), seeds=2)
Patch = pytest.MonkeyPatch


def broken() -> set[tuple[str, str]]:
    """Sizes that do not follow muP."""
    return {
        (found.module, found.quantity) for found in coordinate_check(SETTINGS, mup=True) if not found.holds(TOLERANCE)
    }


def test_mup_holds() -> None:
    assert broken() == set()


def test_standard_parametrization_does_not() -> None:
    powers = {(x.module, x.quantity): x.slope for x in coordinate_check(SETTINGS, mup=False)}
    assert powers["layer 0 linear_qkv", "activation"] == pytest.approx(0.5, abs=0.1)
    assert powers["layer 1 linear_fc2", "activation"] > 1
    assert powers["layer 0 linear_qkv", "update"] > 0.5


def test_base_width_does_not_depend_on_the_parametrization() -> None:
    one, other = (coordinate_check(SETTINGS, mup) for mup in (True, False))
    for x, y in zip(one, other, strict=True):
        assert x.sizes[0] == pytest.approx(y.sizes[0], rel=1e-5)


def break_logit_multiplier(patch: Patch) -> None:
    """The logits are not divided by the width factor."""
    patch.setattr(ModelConfig, "logit_multiplier", property(lambda model: model.output_mult))


def break_input_multiplier(patch: Patch) -> None:
    """The embedding output grows with the width."""
    build = TeleFLM.__init__

    def widened(self: TeleFLM, model: ModelConfig, *args: Any, **kwargs: Any) -> None:
        build(self, model, *args, **kwargs)
        self.input_multiplier *= model.width_factor

    patch.setattr(TeleFLM, "__init__", widened)


def break_std(name: str, power: float) -> Callable[[Patch], None]:
    """Initial weights of one tensor are wrong by a power of the width factor."""

    def wrong(model: ModelConfig) -> dict[str, ParameterSpec]:
        specs = dict(specs_of(model))
        specs[name] = replace(specs[name], init_std=specs[name].init_std * model.width_factor**power)
        return specs

    specs_of = initial.parameter_specs
    return lambda patch: patch.setattr(initial, "parameter_specs", wrong)


def break_rate(group: str, power: float) -> Callable[[Patch], None]:
    """The learning rate of one group is wrong by a power of the width (64 is the base)."""
    rates_of = learning_rate.group_learning_rates

    def wrong(rate: float, stage: Any) -> dict[Any, float]:
        rates: dict[Any, float] = dict(rates_of(rate, stage))
        rates[group] *= stage.model.width_factor**power
        return rates

    return lambda patch: patch.setattr(learning_rate, "group_learning_rates", wrong)


MATRICES = {QKV: "linear_qkv", PROJECTION: "linear_proj", FC1: "linear_fc1", FC2: "linear_fc2"}
BREAKS: dict[str, tuple[Callable[[Patch], None], tuple[str, str]]] = {
    "logits not divided by m": (break_logit_multiplier, ("output_layer", "update")),
    "input multiplier grows": (break_input_multiplier, ("embedding", "activation")),
    "embedding std falls": (break_std("embedding.word_embeddings.weight", -0.5), ("embedding", "activation")),
    "head std grows": (break_std(HEAD, 0.5), ("output_layer", "activation")),
    **{
        f"std of {label} without 1/sqrt(m)": (break_std(f"{name}.weight", 0.5), (f"layer 1 {label}", "activation"))
        for name, label in MATRICES.items()
    },
    "lr of matrices without 1/m": (break_rate("matrix", 1), ("layer 1 linear_qkv", "update")),
    "lr of matrices with 1/m^2": (break_rate("matrix", -1), ("layer 0 linear_fc2", "update")),
    "lr of vocabulary with 1/m": (break_rate("vocabulary", -1), ("embedding", "update")),
    "lr of norms with 1/m": (break_rate("vector", -1), ("layer 0 input_layernorm", "update")),
    "lr of vocabulary with m": (break_rate("vocabulary", 1), ("output_layer", "update")),
}


@pytest.mark.parametrize("name", BREAKS)
def test_each_broken_rule_is_found(name: str, monkeypatch: Patch) -> None:
    break_it, shown = BREAKS[name]
    break_it(monkeypatch)
    assert shown in broken()


@pytest.mark.parametrize("power", [-0.5, 0.0, 1.25])
def test_power_is_that_of_an_exact_law(power: float) -> None:
    widths = (64, 128, 512)
    assert power_of_width(widths, [3 * width**power for width in widths]) == pytest.approx(power)


def test_scaled_models_keep_their_proportions() -> None:
    base = replace(DEFAULT_MODEL, num_query_groups=2)
    model = scaled_model(base, 512, 64, mup=True)
    assert (model.num_attention_heads, model.query_groups, model.kv_channels) == (32, 16, 16)
    assert model.ffn_hidden_size == 8 * base.ffn_hidden_size
    assert model.width_factor == 8 and math.isclose(model.logit_multiplier, base.output_mult / 8)


def test_a_tied_head_is_refused() -> None:
    settings = CheckSettings(model=replace(DEFAULT_MODEL, tie_embeddings=True))
    with pytest.raises(RequestError, match=r"model\.tie_embeddings is true: the coordinate check"):
        coordinate_check(settings, mup=True)


def test_widths_that_do_not_fit_are_refused() -> None:
    with pytest.raises(RequestError, match="width 72 is not a multiple of 16 channels"):
        scaled_model(DEFAULT_MODEL, 72, 64, mup=True)
    with pytest.raises(RequestError, match="at least three"):
        coordinate_check(CheckSettings(widths=(64, 128)), mup=True)


COMMAND = ["mup", "coord-check", "--widths", "64", "128", "256", "--seeds", "2", "--plot"]


def test_command_prints_tables_and_draws_a_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "plots" / "check.png"
    assert main([*COMMAND, str(picture)]) == 0
    printed = capsys.readouterr().out
    assert "muP holds" in printed and "standard parametrization, 3 steps" in printed and "broken" not in printed
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_command_fails_when_mup_is_broken(
    tmp_path: Path, monkeypatch: Patch, capsys: pytest.CaptureFixture[str]
) -> None:
    break_rate("matrix", 1)(monkeypatch)
    assert main([*COMMAND, str(tmp_path / "check.png")]) == 1
    assert "muP is broken" in capsys.readouterr().out


def test_command_takes_the_model_of_a_run_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_file = tmp_path / "run.yaml"
    run_file.write_text(
        "stages:\n- name: small\n  model: {hidden_size: 64, num_attention_heads: 4, num_query_groups: 2,"
        " ffn_hidden_size: 128, matrix_init_std: 0.1, vector_init_std: 0.1}\n"
    )
    plot = str(tmp_path / "check.png")
    assert main(["mup", "coord-check", str(run_file), "--layers", "1", *COMMAND[2:], plot]) == 0
    assert "layer 1" not in capsys.readouterr().out
    assert main(["mup", "coord-check", str(run_file), "--stage", "large", *COMMAND[2:], plot]) == 2
    assert "no stage is named 'large'; the run has small" in capsys.readouterr().err
