"""The advice of `flm advise`: verdicts, their reasons, pilots, and what is refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flm_megatron as flm
from flm_megatron.cli.main import main
from flm_megatron.config.loader import dump_run
from flm_megatron.config.schema import ModelConfig, MupConfig, RunConfig, StageConfig
from flm_megatron.errors import RequestError
from flm_megatron.growth.rules import check_growth
from flm_megatron.model.parameters import parameter_count
from flm_megatron.planner.advice.advice import advise_run
from flm_megatron.planner.advice.candidates import candidates
from flm_megatron.planner.advice.laws import laws_of_pilots, published_laws, read_pilot
from flm_megatron.planner.advice.token_credit import OperatorCredit, read_credits
from flm_megatron.planner.loss_law import SizeLaw
from tests.unit.evaluation.report.test_report import step

LARGE = ModelConfig(
    num_layers=8,
    hidden_size=256,
    ffn_hidden_size=704,
    num_attention_heads=8,
    vocab_size=512,
    mup=MupConfig(enabled=True),
)
SMALL = replace(LARGE, num_layers=4)
TOKENS = 20 * parameter_count(LARGE)
RUN = RunConfig(stages=[StageConfig(name="small", model=SMALL), StageConfig(name="large", model=LARGE, tokens=TOKENS)])
LAW = SizeLaw(1.4, 12.0, 0.2, 60.0, 0.25)


def credit_file(folder: Path, kept: list[float], **changes: object) -> Path:
    """A table of one operator that was measured in depth."""
    row = {"operator": "depth: copy", "factors": {"layers": 2}, "tokens_per_parameter": 20, "kept": kept}
    row |= {"growth": {"layers": "copy", "layer_selection": "stack"}}
    (path := folder / "credit.json").write_text(json.dumps({"source": "a study", "measured": [row | changes]}))
    return path


def law_file(folder: Path, law: SizeLaw = LAW) -> Path:
    """A law of all sizes."""
    (path := folder / "laws.yaml").write_text("\n".join(f"{name}: {value}" for name, value in vars(law).items()))
    return path


def test_without_measurements_the_bound_is_given_and_said_to_be_one(tmp_path: Path) -> None:
    empty = tmp_path / "empty.json"
    empty.write_text('{"source": "nothing", "measured": []}')
    advice = flm.advise(RUN, laws=law_file(tmp_path), credit=empty)
    assert advice.verdict == "not measured" and advice.best is not None and advice.best.bound is not None
    assert advice.best.expected is None and advice.growth is None
    text = str(advice)
    assert "saves" in text and "if it loses nothing" in text and "none was measured" in text
    assert [option.bound.saved if option.bound else 0 for option in advice.options] == sorted(
        (option.bound.saved if option.bound else 0 for option in advice.options), reverse=True
    )


def test_what_an_operator_kept_decides(tmp_path: Path) -> None:
    laws = law_file(tmp_path)
    good = flm.advise(RUN, laws=laws, credit=credit_file(tmp_path, [0.99, 1.0, 0.98]))
    assert good.verdict == "grow" and good.growth == {"layers": "copy", "layer_selection": "stack"}
    assert good.best and good.best.expected and good.best.bound
    assert good.best.candidate.factors == {"layers": 4}
    assert 0 < good.best.expected.low < good.best.expected.saved < good.best.bound.saved
    assert "growth: {layers: copy, layer_selection: stack}" in str(good) and "boundary: rewarm" in str(good)
    spread = flm.advise(RUN, laws=laws, credit=credit_file(tmp_path, [1.0, 0.6, 1.2]))
    assert spread.verdict == "do not grow" and "within its uncertainty" in str(spread)
    for_depth = [
        each for each in flm.advise(RUN, laws=laws, credit=credit_file(tmp_path, [0.2, 0.21])).options if each.credit
    ]
    assert for_depth and all(each.expected is None for each in for_depth)


def test_an_operator_that_does_not_fit_the_sizes_is_not_advised(tmp_path: Path) -> None:
    third = replace(LARGE, hidden_size=192, ffn_hidden_size=528, num_attention_heads=6)
    run = replace(RUN, stages=[replace(RUN.stages[0], model=third), RUN.stages[1]])
    for operator, of_third in (("zero", True), ("clone", False)):
        table = credit_file(
            tmp_path, [0.98, 0.99], factors=dict.fromkeys(("hidden", "ffn", "heads"), 2), growth={"hidden": operator}
        )
        options = flm.advise(run, laws=law_file(tmp_path), credit=table).options
        known = {option.candidate.name: option.credit is not None for option in options}
        assert known["hidden size 128 of 256"] and known["stage 'small'"] is of_third


def test_the_interval_is_the_mean_and_twice_the_spread() -> None:
    kept = OperatorCredit("x", {"layers": 2}, {}, 5, (0.1, 0.5)).interval()
    assert (kept.expected, kept.low, kept.high) == pytest.approx((0.3, 0.3 - 0.32**0.5, 0.3 + 0.32**0.5))


def test_a_long_run_is_not_worth_growing() -> None:
    advice = flm.advise(RUN, budget=3e5 * TOKENS * 6.0 * parameter_count(LARGE))
    assert advice.verdict == "do not grow" and "stages:" not in str(advice)


def test_the_nearest_measurement_in_tokens_per_parameter_counts(tmp_path: Path) -> None:
    path = credit_file(tmp_path, [0.5, 0.5])
    table = json.loads(path.read_text())
    table["measured"].append({**table["measured"][0], "tokens_per_parameter": 5, "kept": [0.99, 0.99]})
    path.write_text(json.dumps(table))
    few = replace(RUN, stages=[*RUN.stages[:-1], replace(RUN.stages[-1], tokens=TOKENS // 5)])
    rates = [
        next(
            option.credit.kept[0]
            for option in flm.advise(run, laws=law_file(tmp_path), credit=path).options
            if option.credit
        )
        for run in (RUN, few)
    ]
    assert rates == [0.5, 0.99]


def test_an_operator_measured_far_away_does_not_count(tmp_path: Path) -> None:
    path = credit_file(tmp_path, [0.5, 0.5])
    table = json.loads(path.read_text())
    far = {"operator": "depth: mask", "growth": {"layers": "mask"}, "tokens_per_parameter": 5, "kept": [0.99, 0.99]}
    table["measured"].append(table["measured"][0] | far)
    path.write_text(json.dumps(table))
    found = read_credits(path)
    assert [row.operator for row in found.for_growth({"layers": 2}, 15)] == ["depth: copy"]
    assert [row.operator for row in found.for_growth({"layers": 2}, 4)] == ["depth: mask"]
    assert found.for_growth({"hidden": 2}, 15) == []


def test_a_measurement_by_another_factor_counts_only_where_none_is_nearer(tmp_path: Path) -> None:
    path = credit_file(tmp_path, [0.5, 0.5])
    table = json.loads(path.read_text())
    of_one = {"operator": "copies of one layer", "factors": {"layers": 4}, "kept": [0.99, 0.99]}
    table["measured"].append(table["measured"][0] | of_one)
    path.write_text(json.dumps(table))
    for by, nearest in (
        (2, "depth: copy"),
        (2.5, "depth: copy"),
        (4, "copies of one layer"),
        (math.inf, "copies of one layer"),
    ):
        assert [row.operator for row in read_credits(path).for_growth({"layers": by}, 20)] == [nearest]


def test_the_table_of_the_program_has_operators_for_depth_width_and_both() -> None:
    for dimensions in ({"layers"}, {"hidden", "ffn", "heads"}, {"hidden", "ffn", "heads", "layers"}):
        assert read_credits().for_growth(dict.fromkeys(dimensions, 2.0), 5.0)


def test_candidates_can_grow_and_are_named_once() -> None:
    found = candidates(LARGE, RUN.stages[:-1])
    assert [each.name for each in found] == [
        "stage 'small'",
        "2 of 8 layers",
        "hidden size 128 of 256",
        "4 of 8 layers, hidden size 128 of 256",
        "hidden size 64 of 256",
        "2 of 8 layers, hidden size 64 of 256",
    ]
    for each in found:
        check_growth(each.model, LARGE, flm.GrowthConfig())
        assert parameter_count(each.model) < parameter_count(LARGE)
    odd = replace(LARGE, num_attention_heads=1, head_dim=32)
    assert all("hidden" not in each.name for each in candidates(odd, [])), "one head does not divide"


def write_pilot(folder: Path, model: ModelConfig, seed: int, **checkpoint: Any) -> Path:
    """A run from scratch of 400 steps whose losses follow LAW, with noise."""
    folder.mkdir()
    run = RunConfig(name=folder.name, output=str(folder), stages=[StageConfig(name="only", model=model, tokens=64)])
    run.checkpoint.initial = checkpoint.get("initial")
    (folder / "run.yaml").write_text(dump_run(run))
    noise = np.random.default_rng(seed).normal(0, 0.01, 400)
    law, scale = LAW.at(parameter_count(model)), 50_000
    lines = [
        step("only", i, i, float(law.loss(float(i * scale))) + noise[i - 1]) | {"tokens": i * scale}
        for i in range(1, 401)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_pilots_of_three_sizes_give_the_savings_of_the_law_that_made_them(tmp_path: Path) -> None:
    sizes = [replace(LARGE, num_layers=layers) for layers in (1, 2, 4)]
    pilots = [write_pilot(tmp_path / f"pilot{i}", model, i) for i, model in enumerate(sizes)]
    advice, true = flm.advise(RUN, pilots=pilots), flm.advise(RUN, laws=law_file(tmp_path))
    assert "one law of all sizes, fitted to 3 pilots" in advice.laws
    by_name = {option.candidate.name: option.bound for option in advice.options}
    for option in true.options:
        found = by_name[option.candidate.name]
        assert found and option.bound
        assert found.low - 0.02 <= option.bound.saved <= found.high + 0.02
        assert found.saved == pytest.approx(option.bound.saved, abs=0.05)


def test_pilots_of_both_sizes_are_enough(tmp_path: Path) -> None:
    pilots = [write_pilot(tmp_path / f"pilot{i}", model, i) for i, model in enumerate((SMALL, LARGE))]
    (option,) = flm.advise(RUN, pilots=pilots).options
    expected = next(
        each.bound
        for each in flm.advise(RUN, laws=law_file(tmp_path)).options
        if each.candidate.name == "stage 'small'"
    )
    assert option.candidate.name == "stage 'small'" and option.bound and expected
    assert option.bound.saved == pytest.approx(expected.saved, abs=0.05)


def test_pilots_of_one_size_are_fitted_together(tmp_path: Path) -> None:
    """The second pilot of the small size has losses of its own, which one law has to lie between."""
    pilots = [read_pilot(write_pilot(tmp_path / f"pilot{i}", model, i)) for i, model in enumerate((SMALL, LARGE))]
    above = replace(pilots[0], losses=pilots[0].losses + 1)
    law = laws_of_pilots([pilots[0], above, pilots[1]]).readings[0](SMALL)
    assert law is not None
    assert law.loss(1e7) == pytest.approx(LAW.at(parameter_count(SMALL)).loss(1e7) + 0.5, abs=0.1)


def test_with_a_machine_savings_are_of_gpu_hours(tmp_path: Path) -> None:
    run = replace(RUN, stages=[replace(stage, global_batch=8) for stage in RUN.stages])
    laws = law_file(tmp_path)
    plain, timed = flm.advise(run, laws=laws), flm.advise(run, laws=laws, gpu="h100", gpus=1)
    assert (plain.unit, timed.unit) == ("FLOPs", "GPU-hours on 1 h100")
    ratios = [{each.candidate.name: each.cost_ratio for each in advice.options} for advice in (plain, timed)]
    assert all(ratios[1][name] > ratios[0][name] for name in ratios[1] if "hidden" in name), (
        "narrow models use a GPU less"
    )


def test_every_model_is_priced_once() -> None:
    priced: list[ModelConfig] = []

    def price(model: ModelConfig) -> float | None:
        priced.append(model)
        return None if model == SMALL else float(parameter_count(model))

    advice = advise_run(RUN, published_laws(), read_credits(), None, price, "euros")
    assert len(priced) == len(advice.options) + 2, "every option, the last model, and the one without a price"
    assert all(option.candidate.model != SMALL for option in advice.options)
    with pytest.raises(RequestError, match="the model of stage 'large' fits the machine under no layout"):
        advise_run(RUN, published_laws(), read_credits(), None, lambda model: None, "euros")


def test_the_command_prints_text_and_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (file := tmp_path / "run.yaml").write_text(dump_run(RUN))
    arguments = ["advise", str(file), "--laws", str(law_file(tmp_path)), "--budget", "1e14"]
    assert main(arguments) == 0
    assert capsys.readouterr().out.rstrip() == str(flm.advise(RUN, laws=law_file(tmp_path), budget=1e14))
    assert main([*arguments, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["flops"] == pytest.approx(1e14) and data["options"][0]["bound"]["saved"] > 0


def test_what_cannot_be_advised_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (file := tmp_path / "run.yaml").write_text(dump_run(RUN))
    (grown := write_pilot(tmp_path / "grown", SMALL, 1, initial="runs/x"))
    pilot = write_pilot(tmp_path / "pilot", SMALL, 1)
    (short := write_pilot(tmp_path / "short", SMALL, 1))
    (short / "metrics.jsonl").write_text("".join((short / "metrics.jsonl").read_text().splitlines(keepends=True)[:20]))
    for name, text in (
        ("negative.yaml", "{floor: -1, size_scale: 1, size_exponent: 1, scale: 1, exponent: 1}"),
        ("words.yaml", "large: {floor: low, scale: 10, exponent: 0.2}"),
        ("infinite.yaml", "{floor: 1, size_scale: 1, size_exponent: .inf, scale: 1, exponent: 1}"),
        ("truth.yaml", "{floor: 1, size_scale: 1, size_exponent: 1, scale: true, exponent: 1}"),
        ("number.json", '{"measured": [3]}'),
        ("one.yaml", "large: {floor: 1, scale: 10, exponent: 0.2}"),
        ("list.json", "[]"),
        ("row.json", '{"measured": [{"operator": "x"}]}'),
    ):
        (tmp_path / name).write_text(text)
    unknown = credit_file(tmp_path, [0.9, 0.9], growth={"layrs": "copy"}).rename(tmp_path / "unknown.json")
    one_seed = credit_file(tmp_path, [0.9])
    for given, words in (
        (["--pilot", str(tmp_path)], "is not a run's output folder"),
        (["--pilot", str(grown)], "did not begin from scratch but from runs/x"),
        (["--pilot", str(short)], "losses after its warm-up; at least 40 are needed"),
        (["--pilot", str(pilot)], "give laws or pilots of both sizes"),
        (["--pilot", str(pilot), "--laws", str(file)], "not allowed with"),
        (["--laws", str(tmp_path / "none.yaml")], "cannot read laws"),
        (["--laws", str(tmp_path / "negative.yaml")], "floor has to be at least 0"),
        (["--laws", str(tmp_path / "words.yaml")], "scale and exponent above 0, not floor 'low'"),
        (["--laws", str(tmp_path / "infinite.yaml")], "scale and exponent above 0, not size_exponent inf"),
        (["--laws", str(tmp_path / "truth.yaml")], "scale and exponent above 0, not scale True"),
        (["--laws", str(tmp_path / "one.yaml")], "give laws or pilots of both sizes"),
        (["--credit", str(tmp_path / "none.json")], "cannot read token credit"),
        (["--credit", str(tmp_path / "list.json")], "is no table of token credit"),
        (["--credit", str(tmp_path / "row.json")], "lacks or has a wrong 'factors'"),
        (["--credit", str(tmp_path / "number.json")], "a row of token credit is 3, not an object"),
        (["--credit", str(unknown)], "has a growth block that no run file takes: stages.0.growth.layrs: unknown key"),
        (["--credit", str(one_seed)], "at least 2 seeds"),
        (["--budget", "0"], "is not above 0"),
        (["--gpu", "h100"], "gpu and gpus: give both"),
        (["--nodes-of", "8"], "nodes_of and hardware are of a machine"),
        (["--stages.large.tokens", "0"], "tokens"),
    ):
        assert main(["advise", str(file), *given]) == 2, given
        said = capsys.readouterr().err
        assert words in said and said.count("\n") == 1, said
