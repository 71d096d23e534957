"""The report's page: what is on it, that it needs nothing else, and that a browser shows it without a complaint."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from flm_megatron.cli.main import main
from flm_megatron.config.loader import dump_run
from flm_megatron.config.schema import DataConfig, ModelConfig, RunConfig, StageConfig
from flm_megatron.evaluation.report.chart import Chart, Series, thin
from flm_megatron.evaluation.report.curves import detail_charts
from flm_megatron.evaluation.report.growth_charts import growth_charts
from flm_megatron.evaluation.report.history import read_history
from flm_megatron.evaluation.report.layers import layer_charts
from flm_megatron.evaluation.report.page import ASSETS
from flm_megatron.growth.record import Certificate
from tests.unit.evaluation.report.drawn import drawn

BROWSER = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), "")
NODE = shutil.which("node") or ""
CERTIFICATE = {
    "stage": "grown",
    "preserving": True,
    "samples": 4,
    "sequence_length": 8,
    "comparisons": [
        {"precision": "fp32", "max_difference": 2e-6, "rms_difference": 1e-6, "logit_std": 2.0}
        | {"loss_before": 3.0, "loss_after": 3.000003}
    ],
}
STAGES = [
    StageConfig(name="small", model=ModelConfig(vocab_size=300), tokens=20 * 64),
    StageConfig(name="grown", model=ModelConfig(vocab_size=300, num_layers=6), tokens=10 * 64),
]


def step(stage: str, number: int, done: int, loss: float) -> dict[str, Any]:
    """A line of metrics of step `number`, `done` steps into the run."""
    return {
        "stage": stage,
        "step": number,
        "tokens": done * 64,
        "loss": loss,
        "grad_norm": 0.5,
        "lr": 1e-3,
        "step_time_s": 0.5,
        "tokens_per_s_per_device": 128.0,
        "tflops_per_device": 0.01,
        "mfu": None,
        "peak_memory_gib": 1.0,
        "eta_s": 1.0,
    }


def health(layer: int, new: float) -> dict[str, float]:
    """What was measured of a layer; the last one is new as a whole."""
    old = {} if layer == 5 else {"weight_rms_old": 0.1, "update_old": 0.01, "rank_fc1_old": 30.0}
    return old | {"weight_rms_new": 0.03, "update_new": new, "rank_fc1_new": 7.0, "distance_cosine": 0.1 + new}


def make_run(folder: Path, name: str = "a run <&>") -> Path:
    """A run of two stages with a validation, a restart, a refused step, a loss that is not finite, a certificate."""
    folder.mkdir()
    run = RunConfig(name=name, output=str(folder), data=DataConfig(sequence_length=8), stages=STAGES)
    (folder / "run.yaml").write_text(dump_run(run))
    lines = [step("small", i, i, 5 - i / 10) for i in range(1, 21)]
    lines.insert(8, {"stage": "small", "step": 8, "tokens": 8 * 64, "val_loss": 4.4, "val_loss/web": 4.5})
    lines.insert(9, {"stage": "small", "step": 8, "tokens": 8 * 64, "restart": True})
    changed = {"what": "global_batch", "before": 4, "now": 8}
    lines.insert(10, {"stage": "small", "step": 8, "tokens": 8 * 64, "changed": changed})
    lines += [
        {"stage": "grown", "step": 0, "tokens": 20 * 64, "certificate": CERTIFICATE, "layer_distances": [0.3] * 4}
    ]
    lines += [step("grown", i, 20 + i, 3 - i / 20 if i != 5 else math.nan) for i in range(1, 11)]
    for number, new in ((1, 0.0), (10, 0.02)):
        layers = {f"layer_{i:03d}": health(i, new) for i in range(6)}
        line = {"stage": "grown", "step": number, "tokens": (20 + number) * 64, "growth_health": layers}
        lines.insert(len(lines) - 10 + number, line)
    refused = {"refused": "loss is 9 sigma above", "policy": "skip", "samples": ["x"]}
    lines += [{"stage": "grown", "step": 10, "tokens": 30 * 64, **refused}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's output folder."""
    return make_run(tmp_path_factory.mktemp("report") / "one")


@pytest.fixture(scope="module")
def page(run_folder: Path) -> Path:
    """The page over it."""
    assert main(["report", str(run_folder)]) == 0
    return run_folder / "report.html"


def test_costs_add_up_over_stages(run_folder: Path) -> None:
    from flm_megatron.training.metrics.flops import training_flops_per_token

    history = read_history(run_folder)
    at, _ = history.steps[-1]
    small, grown = (training_flops_per_token(stage.model, 8) for stage in STAGES)
    assert at.tokens == 30 * 64 and at.seconds == pytest.approx(15.0)
    assert at.flops == pytest.approx(20 * 64 * small + 10 * 64 * grown)
    (boundary, stage), *others = history.boundaries
    assert (boundary.tokens, stage, others) == (20 * 64, "grown", [])
    assert (history.restarts, history.refused_steps) == (1, 1)
    assert history.certificates == {"grown": Certificate.from_json(CERTIFICATE)}


def test_the_page_says_what_happened_and_needs_nothing_else(page: Path) -> None:
    text = page.read_text()
    assert "a run &lt;&amp;&gt;" in text and "<&>" not in text
    for expected in (
        "1.00e-06",
        "3.000000 → 3.000003",
        "refused (skip): loss is 9 sigma above",
        "restarted",
        "global_batch was 4, is 8",
    ):
        assert expected in text, expected
    for title in ("Loss", "Validation loss by set", "Learning rate", "Gradient norm", "Throughput", "Memory"):
        assert f"<h3>{title}</h3>" in text
    assert "num_layers: 6" in text and "prefers-color-scheme: dark" in text
    assert "default-src 'none'" in text and "connect-src 'self'" in text
    assert not re.search(r"<(?:link|script|img)[^>]+(?:src|href)=\"(?!data:)", text)


def flops(grown_steps: int) -> float:
    """Model FLOPs of the run after steps of its grown stage."""
    from flm_megatron.training.metrics.flops import training_flops_per_token

    small, grown = (training_flops_per_token(stage.model, 8) for stage in STAGES)
    return 64 * (20 * small + grown_steps * grown)


def test_every_curve_of_a_run_can_be_drawn_against_tokens_flops_and_time(page: Path) -> None:
    loss = drawn(page.read_text())[0]
    assert loss["x"] == ["tokens", "model FLOPs", "training time, hours"]
    training, validation = loss["series"]
    tokens, operations, hours, values = training["columns"]
    assert (len(tokens), tokens[-1], hours[-1]) == (29, 30 * 64, pytest.approx(15 / 3600, rel=1e-6))
    assert operations[-1] == pytest.approx(flops(10), rel=1e-6) and values[0] == pytest.approx(4.9)
    assert validation["columns"][0] == [8 * 64] and validation["columns"][-1] == [4.4]
    (mark,) = loss["marks"]
    assert mark == [20 * 64, pytest.approx(flops(0)), pytest.approx(10 / 3600), "→ grown"]


def test_evaluations_and_numbers_of_layers_are_drawn(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    values = {"bits_per_byte/web": 1.5, "arc/acc": 0.25, "hellaswag/acc": 0.5}
    lines.append({"stage": "grown", "step": 10, "tokens": 30 * 64, "evaluation": values})
    for line in lines:
        if "loss" in line and line["stage"] == "grown":
            line |= {"growth_mask": 0.25} if line["step"] < 3 else {}
            line |= {"weight_rms/layer_000": 0.1, "weight_rms/layer_005": 0.2, "weight_rms/embedding": 7.0}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    history = read_history(folder)
    (layers,) = layer_charts([history])
    assert layers.title == "weight_rms by layer" and [row.layer for row in layers.heat] == [0, 5]
    assert [point[-1] for point in layers.heat[1].points] == [0.2] * 10
    by_title = {chart.title: chart for chart in detail_charts([history])}
    assert [line.name for line in by_title["Evaluation: acc"].series] == ["arc/acc", "hellaswag/acc"]
    assert [point[-1] for point in by_title["Growth masks"].series[0].points] == [0.25, 0.25]
    assert by_title["Evaluation: bits_per_byte"].series[0].points[0][-1] == 1.5


def test_old_and_new_entries_are_drawn_by_layer(run_folder: Path) -> None:
    course, updates, weights, ranks, distances = growth_charts([read_history(run_folder)])
    assert [list(line.points) for line in course.series] == [
        [(21 * 64, pytest.approx(flops(1)), 10.5 / 3600, 0.01), (30 * 64, pytest.approx(flops(10)), 15 / 3600, 0.01)],
        [
            (21 * 64, pytest.approx(flops(1)), 10.5 / 3600, pytest.approx(1e-8)),
            (30 * 64, pytest.approx(flops(10)), 15 / 3600, pytest.approx(0.02)),
        ],
    ]
    assert [(line.name, len(line.points)) for line in updates.series] == [("old", 5), ("new", 6)]
    assert weights.series[1].points[0] == (0, 0.03)
    assert [line.name for line in ranks.series] == ["fc1, old", "fc1, new"]
    assert [(line.name, len(line.points)) for line in distances.series] == [
        ("before the growth", 4),
        ("after step 1", 6),
        ("after step 10", 6),
    ]


def test_runs_are_compared(run_folder: Path, tmp_path: Path) -> None:
    other = make_run(tmp_path / "two", name="another")
    out = tmp_path / "both.html"
    assert main(["report", str(run_folder), str(other), "--out", str(out)]) == 0
    text = out.read_text()
    loss = drawn(text)[0]
    assert [line["name"] for line in loss["series"] if "training" in line["name"]] == [
        "a run <&>, training",
        "another, training",
    ]
    assert loss["marks"][0][-1] == "→ grown (a run <&>, another)"


def shown(page: Path, *options: str) -> tuple[str, str]:
    """The document as a browser has it after its scripts have run, and what it said."""
    command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", *options]
    done = subprocess.run(
        [*command, "--virtual-time-budget=2000", "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout, done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not BROWSER, reason="no Chromium or Chrome on this machine")
def test_a_browser_draws_the_page_without_a_complaint(page: Path, tmp_path: Path) -> None:
    probe = """<script>
      const figures = [...document.querySelectorAll("figure.chart")], first = figures[0];
      const whole = figures.every((figure) => figure.querySelectorAll("canvas").length === 1);
      const label = () => first.querySelector(".u-value").textContent;
      const press = (name) => first.dispatchEvent(new KeyboardEvent("keydown", {key: name}));
      const later = () => new Promise((done) => setTimeout(done, 50));
      (async () => {
        await later();
        press("ArrowRight");
        await later();
        const values = [...first.querySelectorAll(".u-value")].map((cell) => cell.textContent);
        first.querySelector("button").click();
        const log = first.querySelector("button").getAttribute("aria-pressed");
        first.querySelectorAll(".u-series th")[1].click();
        document.querySelector('input[value="1"]').click();
        await later();
        const off = first.querySelectorAll(".u-series.u-off").length;
        const outside = performance.getEntriesByType("resource").length;
        const fits = document.documentElement.scrollWidth <= innerWidth;
        const colour = getComputedStyle(document.body).color;
        document.body.dataset.probe = JSON.stringify({whole, values, log, off, outside, fits, colour});
      })();
    </script>"""
    (copy := tmp_path / "probed.html").write_text(page.read_text().replace("</body>", probe + "</body>"))
    text_colours = []
    for scheme in (1, 0):
        document, said = shown(copy, f"--blink-settings=preferredColorScheme={scheme}")
        assert "CONSOLE" not in said
        found = re.search(r'data-probe="([^"]*)"', document)
        assert found
        seen = json.loads(unescape(found[1]))
        text_colours.append(seen.pop("colour"))
        at, training, validation = seen.pop("values")
        assert 64 <= float(at) <= 30 * 64 and 2 < float(training) < 5 and float(validation) == 4.4
        assert seen == {"whole": True, "log": "true", "off": 1, "outside": 0, "fits": True}
    assert text_colours == ["rgb(28, 28, 26)", "rgb(238, 237, 232)"]


@pytest.mark.slow
@pytest.mark.skipif(not BROWSER, reason="no Chromium or Chrome on this machine")
def test_a_broken_script_would_be_seen(page: Path, tmp_path: Path) -> None:
    (broken := tmp_path / "broken.html").write_text(page.read_text().replace("</body>", "<script>nothing()</script>"))
    assert "CONSOLE" in shown(broken)[1]


def test_thinning_keeps_every_extreme() -> None:
    points = [(float(i), math.sin(i)) for i in range(5000)]
    points[1234] = (1234.0, 50.0)
    kept = thin(points)
    assert len(kept) <= 800 and (1234.0, 50.0) in kept and kept == sorted(kept)


def test_a_chart_leaves_out_what_is_not_finite() -> None:
    points = [(0.0, 1.0), (1.0, math.inf), (math.nan, 2.0), (3.0, 1 / 3)]
    chart = Chart("<t>", ("x",), "y", [Series("</script>", points)])
    text = chart.figure()
    assert drawn(text)[0]["series"][0] == {
        "name": "</script>", "colour": 0, "dots": False, "columns": [[0.0, 3.0], [1.0, 0.3333333]],
    }  # fmt: skip
    assert text.count("</script>") == 1 and "<h3>&lt;t&gt;</h3>" in text


def test_a_step_that_is_nowhere_is_said_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(tmp_path / "run")
    lines = [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()]
    last = next(line for line in lines if line["stage"] == "small" and line["step"] == 20)
    for number in (math.nan, math.inf):
        last["tokens"] = number
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        assert main(["report", str(folder)]) == 1
        said = capsys.readouterr().err
        assert "has no number as tokens" in said and said.count("\n") == 1


@pytest.mark.skipif(not NODE, reason="no Node.js on this machine")
def test_a_map_of_many_layers_is_drawn(tmp_path: Path) -> None:
    """A call has not as many arguments as a thousand layers have values."""
    script = (
        (ASSETS / "charts.js")
        .read_text()
        .replace("Charts.start();", "")
        .replace("return { start, drawAll }", "return { heatRange }")
    )
    probe = """
      const heat = Array.from({length: 1000}, (_, i) => ({columns: [[], Array.from({length: 800}, (_, j) => i + j)]}));
      console.log(JSON.stringify([Charts.heatRange({heat}), Charts.heatRange({heat: [{columns: []}]})]));"""
    (tmp_path / "probe.js").write_text(script + probe)
    done = subprocess.run([NODE, str(tmp_path / "probe.js")], capture_output=True, text=True, timeout=60)
    assert done.stderr == "" and json.loads(done.stdout) == [[1, 1798], [1, 1]]


def test_bars_of_wall_time_are_as_long_as_what_took_it(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", name="<b>")
    times = [
        {"what": "begin", "time": 100.0, "index": 0, "stage": "small", "step": 0, "started": 100.0},
        {"what": "step", "time": 150.0, "step": 1, "seconds": 50.0},
        {"what": "save", "time": 180.0, "seconds": 30.0},
        {"what": "step", "time": 200.0, "step": 2, "seconds": 15.0, "data_s": 5.0},
    ]
    (folder / "goodput.jsonl").write_text("".join(json.dumps(line) + "\n" for line in times))
    assert main(["report", str(folder)]) == 0
    text = (folder / "report.html").read_text()
    bars = text.partition('<figure class="bars">')[2].partition("</figure>")[0]
    widths = dict(re.findall(r'width:([\d.]+)%[^>]*title="([a-z ]+) ', bars))
    assert {name: float(width) for width, name in widths.items()} == {
        "steps that count": 65.0, "saving": 30.0, "waiting for data": 5.0,
    }  # fmt: skip
    assert "<figcaption>&lt;b&gt;</figcaption>" in bars and bars.count("<li>") == 3


def test_folders_that_are_no_runs_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "is not a run's output folder" in capsys.readouterr().err
    (tmp_path / "run.yaml").write_text(dump_run(RunConfig(stages=STAGES)))
    assert main(["report", str(tmp_path)]) == 2
    assert "has no step" in capsys.readouterr().err
