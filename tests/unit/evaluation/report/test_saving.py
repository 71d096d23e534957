"""What a report says that growth saved: against a run, several runs or a law whose crossing is known."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from flm_megatron.cli.main import main
from flm_megatron.config.loader import dump_run
from flm_megatron.config.schema import DataConfig, ModelConfig, RunConfig, StageConfig
from flm_megatron.evaluation.report.chart import Bracket, Chart, Series
from flm_megatron.evaluation.report.history import read_history
from flm_megatron.evaluation.report.saving import Savings, percent, savings
from flm_megatron.training.metrics.flops import training_flops_per_token
from tests.unit.evaluation.report.drawn import drawn
from tests.unit.evaluation.report.test_report import step

SMALL, LARGE = ModelConfig(vocab_size=300, num_layers=2), ModelConfig(vocab_size=300, num_layers=6)
C_SMALL, C_LARGE = (training_flops_per_token(model, 8) for model in (SMALL, LARGE))
Loss = Callable[[int], float]


def law(step: int) -> float:
    """Loss of the large model from scratch after so many steps of 64 tokens."""
    return 2 + 3 * (64 * step) ** -0.1


def write_run(folder: Path, models: list[ModelConfig], steps: int, loss: Loss, validation: bool = False) -> Path:
    """The output folder of a run with `steps` steps of each model; `loss` of the step of the whole run."""
    folder.mkdir()
    stages = [StageConfig(name=f"s{i}", model=model, tokens=64 * steps) for i, model in enumerate(models)]
    run = RunConfig(name=folder.name, output=str(folder), data=DataConfig(sequence_length=8), stages=stages)
    (folder / "run.yaml").write_text(dump_run(run))
    lines = []
    for done in range(1, steps * len(models) + 1):
        stage, number = stages[(done - 1) // steps].name, (done - 1) % steps + 1
        lines.append(step(stage, number, done, loss(done) + validation))
        if validation:
            losses = {"val_loss": loss(done), "val_loss/text": loss(done)}
            lines.append({"stage": stage, "step": number, "tokens": 64 * done, **losses})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def grown(folder: Path, ends_like: float, validation: bool = False) -> Path:
    """A run of 10 small and 10 large steps whose last loss is that of `ends_like` steps from scratch."""
    last = 2 + 3 * (64 * ends_like) ** -0.1
    return write_run(folder, [SMALL, LARGE], 10, lambda done: last + (20 - done) / 10, validation)


def measured(folders: list[Path], *scratch: Path, laws: Path | None = None) -> Savings:
    """The savings of the runs in `folders`."""
    found = savings([read_history(each) for each in folders], [read_history(each) for each in scratch], laws)
    assert found is not None
    return found


@pytest.mark.parametrize("validation", [False, True])
def test_the_crossing_of_a_run_from_scratch_gives_saving_and_credit(tmp_path: Path, validation: bool) -> None:
    run = grown(tmp_path / "grown", 15, validation)
    scratch = write_run(tmp_path / "scratch", [LARGE], 40, law, validation)
    (row,) = measured([run, scratch]).rows
    assert (row.measured, row.bound) == ("validation" if validation else "training", "")
    assert row.flops == pytest.approx(640 * (C_SMALL + C_LARGE))
    assert row.equivalent == pytest.approx(15 * 64 * C_LARGE)
    assert row.saved == pytest.approx(1 - (C_SMALL + C_LARGE) * 10 / (15 * C_LARGE))
    assert row.token_credit == pytest.approx((15 - 10) / 10)
    assert row.flops_ratio == pytest.approx(C_SMALL / C_LARGE)
    assert (row.saved > 0) == (row.token_credit > row.flops_ratio)
    assert measured([run], scratch).rows == [row], "given by name it is the same curve"


def test_the_saving_changes_sign_where_the_credit_is_the_ratio_of_costs(tmp_path: Path) -> None:
    break_even = 10 + 10 * C_SMALL / C_LARGE
    (tmp_path / "laws.yaml").write_text("s1: {floor: 2, scale: 3, exponent: 0.1}\n")
    for index, worth in enumerate((break_even * 0.99, break_even, break_even * 1.01)):
        (row,) = measured([grown(tmp_path / f"grown{index}", worth)], laws=tmp_path / "laws.yaml").rows
        assert row.saved == pytest.approx(1 - break_even / worth, abs=1e-9)
        assert row.token_credit - row.flops_ratio == pytest.approx((worth - break_even) / 10, abs=1e-9)


def test_a_curve_is_not_continued_beyond_its_ends(tmp_path: Path) -> None:
    scratch = write_run(tmp_path / "scratch", [LARGE], 40, law)
    better, worse = grown(tmp_path / "better", 80), grown(tmp_path / "worse", 0.5)
    best, worst = measured([better, worse], scratch).rows
    assert (best.bound, best.equivalent) == (">", pytest.approx(40 * 64 * C_LARGE))
    assert percent(best).startswith("more than ")
    assert (worst.bound, worst.equivalent) == ("<", pytest.approx(64 * C_LARGE))
    assert percent(worst).startswith("less than -")


def test_a_law_whose_floor_is_above_the_loss_gives_a_bound(tmp_path: Path) -> None:
    (tmp_path / "laws.yaml").write_text("s1: {floor: 9, scale: 3, exponent: 0.1}\n")
    (row,) = measured([grown(tmp_path / "grown", 15)], laws=tmp_path / "laws.yaml").rows
    assert row.bound == ">" and math.isfinite(row.equivalent)


def test_several_runs_from_scratch_are_compared_by_their_ends(tmp_path: Path) -> None:
    """Each is worse than its own end until its last step, as before the decay of the learning rate."""
    runs = [
        write_run(tmp_path / f"branch{end}", [LARGE], end, lambda done, end=end: law(done) + (done < end))  # type: ignore[misc]
        for end in (10, 20, 40)
    ]
    (row,) = measured([grown(tmp_path / "grown", 20)], *reversed(runs)).rows
    assert row.equivalent == pytest.approx(20 * 64 * C_LARGE) and row.scratch == "ends of 3 runs from scratch"


def test_the_page_has_the_bracket_and_the_table(tmp_path: Path) -> None:
    run, scratch = grown(tmp_path / "grown", 15), write_run(tmp_path / "scratch", [LARGE], 40, law)
    assert main(["report", str(run), "--scratch", str(scratch)]) == 0
    text = (run / "report.html").read_text()
    (row,) = measured([run], scratch).rows
    saved = f"{100 * row.saved:.1f} % saved"
    assert f"<td>{saved}</td>" in text
    (chart,) = [chart for chart in drawn(text) if chart["brackets"]]
    assert chart["brackets"][0][:2] == [row.flops, row.equivalent] and chart["brackets"][0][3] == saved
    assert [mark[-1] for mark in chart["marks"]] == ["→ s1"] and chart["logX"]
    assert f"<td>{row.token_credit:.3f}</td>" in text and f"<td>{row.flops_ratio:.3f}</td>" in text
    assert main(["report", str(run)]) == 0
    assert "What growth saved" not in (run / "report.html").read_text()


def test_a_bracket_without_an_end_is_a_number_all_the_same() -> None:
    bracket = Bracket(2.0, math.inf, 2.5, "99.9 % saved")
    chart = Chart("", ("FLOPs",), "loss", [Series("run", [(1.0, 3.0)])], log_x=True, brackets=[bracket])
    ((start, end, y, name),) = drawn(chart.figure())[0]["brackets"]
    assert (start, y, name) == (2.0, 2.5, "99.9 % saved") and 1e300 < end < math.inf


def test_runs_and_laws_that_do_not_fit_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, other = grown(tmp_path / "grown", 15), write_run(tmp_path / "other", [SMALL], 5, law)
    begun = write_run(tmp_path / "begun", [LARGE], 5, law)
    text = (begun / "run.yaml").read_text()
    (begun / "run.yaml").write_text(text.replace("initial: null", "initial: runs/x"))
    assert savings([read_history(run), read_history(begun)]) is None
    (tmp_path / "laws.yaml").write_text("s0: {floor: 2, scale: 3, exponent: 0.1}\n")
    laws = ["--laws", str(tmp_path / "laws.yaml")]
    for given, words in (
        ([str(run), "--scratch", str(other)], "its model has other shapes than stage 's1'"),
        ([str(run), "--scratch", str(run)], "a run of 2 stages is not one from scratch"),
        ([str(run), "--scratch", str(begun)], "it began from runs/x, not from scratch"),
        ([str(run), *laws], "has no law for stage 's1'"),
        ([str(other), "--scratch", str(other)], "has grown: there is nothing to compare"),
        ([str(run), "--scratch", str(other), *laws], "not allowed with"),
    ):
        assert main(["report", *given]) == 2
        said = capsys.readouterr().err
        assert words in said and said.count("\n") == 1
