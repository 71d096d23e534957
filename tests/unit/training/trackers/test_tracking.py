"""Trackers in their processes: what they are told, that a run goes on without them, and that nothing is told twice."""

from __future__ import annotations

import io
import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from flm_megatron.cli.main import main
from flm_megatron.config.schema import TrackerConfig
from flm_megatron.launch.preflight import require_installed
from flm_megatron.launch.tracking import tracked
from flm_megatron.training.metrics.events import FILE, RestartEvent, line_text
from flm_megatron.training.trackers.process import Ending, Sender
from flm_megatron.training.trackers.state import tracker_folder
from tests.support import REPOSITORY
from tests.support.trackers import WRONG, said, steps, track, tracked_run, two_stages, write_lines

HERE = "tests.support.trackers"
RECORDING = TrackerConfig(name=f"{HERE}.Recording")


def points(output: Path) -> list[tuple[int, dict[str, float]]]:
    """Step and values of every point that was told."""
    return [(step, values) for step, values in said(output, "point")]


def test_steps_of_all_stages_have_one_axis_and_growth_is_an_event(tmp_path: Path) -> None:
    write_lines(tmp_path, two_stages())
    track(tracked_run(tmp_path, RECORDING))
    losses = [(step, values["train/loss"]) for step, values in points(tmp_path) if "train/loss" in values]
    assert losses == [(1, 9), (2, 8), (3, 7), (4, 6), (5, 9), (6, 8), (7, 7)]
    assert (4, 6.5) in [(step, values.get("validation/sets/held out")) for step, values in points(tmp_path)]
    events = {event["what"]: event for event in said(tmp_path, "event")}
    assert events["growth"]["before"]["num_layers"] == 2 and events["growth"]["after"]["num_layers"] == 4
    assert events["growth"]["step"] == 4 and events["growth"]["tokens"] == 512
    assert events["save"]["text"] == "checkpoints/small/step_00000004"
    assert said(tmp_path, "finish") == ["finished"]
    rows = (tracker_folder(tmp_path, RECORDING.name) / "events.jsonl").read_text().splitlines()
    assert [json.loads(row)["what"] for row in rows] == ["stage", "save", "stage", "growth"]


def test_a_run_that_goes_on_is_told_no_step_and_no_event_twice(tmp_path: Path) -> None:
    write_lines(tmp_path, two_stages())
    run = tracked_run(tmp_path, RECORDING)
    track(run, "stopped")
    kept = two_stages()[:-2]  # from a checkpoint of the grown stage's first step
    write_lines(tmp_path, [*kept, RestartEvent("large", 1, 640), *steps("large", range(2, 6), 512)])
    track(run)
    assert said(tmp_path, "start") == [None, "the id"]
    told = [step for step, values in points(tmp_path) if "train/loss" in values]
    assert told == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    kinds = [event["what"] for event in said(tmp_path, "event")]
    assert kinds == ["stage", "save", "stage", "growth", "restart"]
    assert said(tmp_path, "finish") == ["stopped", "finished"]


def test_lines_are_told_while_the_run_lasts_also_from_a_file_that_is_replaced(tmp_path: Path) -> None:
    run = tracked_run(tmp_path, RECORDING)
    with tracked(run) as tracking:
        assert tracking
        write_lines(tmp_path, steps("small", [1]))
        until(lambda: len(points(tmp_path)) == 1)
        write_lines(tmp_path, steps("small", [1, 2]))
        with (tmp_path / FILE).open("a") as file:
            text = line_text(steps("small", [3])[0])
            file.write(text[:20])
            file.flush()
            until(lambda: len(points(tmp_path)) == 2)
            file.write(text[20:] + "\n")
        tracking.status = "finished"
    assert [step for step, _ in points(tmp_path)] == [1, 2, 3]


def until(done: Callable[[], bool], limit_s: float = 20) -> None:
    """Wait for a condition."""
    end = time.monotonic() + limit_s
    while not done():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("kind", "words"),
    [("Hanging", "has not ended within 4 s"), ("Raising", "ConnectionError"), ("Exiting", "ended with status 7")],
)
def test_trackers_that_go_wrong_anywhere_cost_one_bounded_wait_and_a_line_each(
    kind: str, words: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_lines(tmp_path, two_stages())
    run = tracked_run(tmp_path, *(TrackerConfig(name=name, exit_wait_s=4) for name in WRONG[kind]))
    began = time.monotonic()
    track(run)
    assert time.monotonic() - began < 8
    errors = capfd.readouterr().err
    warnings = [line for line in errors.splitlines() if line.startswith("WARNING: ")]
    for name in WRONG[kind]:
        (warning,) = [line for line in warnings if f"{name}" in line]
        assert words in warning and "by `flm track`" in warning and warning in (tmp_path / "log.txt").read_text()
    assert "hunter2" not in errors
    # What was not sent is sent once the tracker works.
    tracker_folder(tmp_path, WRONG[kind][1]).rename(tracker_folder(tmp_path, RECORDING.name))
    track(tracked_run(tmp_path, RECORDING))
    told = points(tracker_folder(tmp_path, RECORDING.name))
    assert [step for step, values in told if "train/loss" in values] == [*range(1, 8)]


@pytest.mark.slow
def test_a_tracker_that_raises_is_tried_again_while_the_run_lasts(tmp_path: Path) -> None:
    run = tracked_run(tmp_path, TrackerConfig(name=f"{HERE}.Flaky"))
    write_lines(tmp_path, two_stages())
    with tracked(run) as tracking:
        assert tracking
        until(lambda: len(points(tmp_path)) > 6)
        tracking.status = "finished"
    log = (tmp_path / "log.txt").read_text()
    assert log.count("WARNING: ") == 1 and "TimeoutError: slow; it is tried again" in log and "works again" in log
    assert [step for step, values in points(tmp_path) if "train/loss" in values] == [*range(1, 8)]


@pytest.mark.slow
def test_while_the_disk_takes_no_note_nothing_is_sent_twice(tmp_path: Path) -> None:
    run = tracked_run(tmp_path, RECORDING)
    write_lines(tmp_path, two_stages())
    in_the_way = tracker_folder(tmp_path, RECORDING.name) / ".sent.json.partial"
    in_the_way.mkdir(parents=True)
    with tracked(run) as tracking:
        assert tracking
        log = tmp_path / "log.txt"
        until(lambda: log.exists() and "IsADirectoryError" in log.read_text())
        in_the_way.rmdir()
        until(lambda: len(points(tmp_path)) > 6)
        tracking.status = "finished"
    track(run)
    assert said(tmp_path, "start") == [None, "the id"]
    assert [step for step, values in points(tmp_path) if "train/loss" in values] == [*range(1, 8)]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("wandbb", "logging.trackers: no tracker is called 'wandbb', did you mean 'wandb'?"),
        ("nowhere.Tracker", "logging.trackers: nowhere.Tracker cannot be imported: No module named 'nowhere'"),
        ("pathlib.Path", "pathlib.Path is no tracker: derive it from flm_megatron.training.trackers.Tracker"),
    ],
)
def test_what_is_no_tracker_is_refused_before_the_run(name: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tracker") as refused:
        require_installed(tracked_run(tmp_path, TrackerConfig(name=name)))
    assert words in str(refused.value) and "\n" not in str(refused.value)


def test_a_library_that_is_missing_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flm_megatron.training.trackers.names.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"mlflow is not installed: pip install 'flm_megatron\[trackers\]'"):
        require_installed(tracked_run(tmp_path, TrackerConfig(name="mlflow")))


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import sys\nsys.exit(3)", "ends the process that imports it, status 3"),
        ("while True:\n    pass", "was not imported within 2 s"),
        ("print('noise' * 10**6)\nraise ValueError('at import')", "cannot be imported: at import"),
    ],
)
def test_what_the_users_module_does_stays_in_another_process(
    code: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own_module.py").write_text(
        f"import pathlib\npathlib.Path({str(tmp_path / 'here')!r}).touch()\n{code}\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{REPOSITORY}")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("flm_megatron.training.trackers.trial.LIMIT_S", 2)
    with pytest.raises(ValueError, match=words):
        require_installed(tracked_run(tmp_path, TrackerConfig(name="own_module.Tracker")))
    assert (tmp_path / "here").exists() and "own_module" not in sys.modules
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(not Path("/proc/self/oom_score_adj").exists(), reason="a system without it")
def test_where_memory_runs_out_the_tracker_is_ended_not_the_run(tmp_path: Path) -> None:
    before = Path("/proc/self/oom_score_adj").read_text()
    with tracked(tracked_run(tmp_path, RECORDING)) as tracking:
        assert tracking
        (process,) = tracking._processes
        until(lambda: Path(f"/proc/{process.process.pid}/oom_score_adj").read_text().strip() == "1000")
    assert Path("/proc/self/oom_score_adj").read_text() == before


class Gone(io.StringIO):
    """A terminal that was closed."""

    def flush(self) -> None:
        """Nobody reads it."""
        raise BrokenPipeError


def test_what_a_tracker_says_is_lost_where_nothing_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tracked_run(tmp_path, TrackerConfig(name=WRONG["Exiting"][0]))
    monkeypatch.setattr("sys.stderr", Gone())
    track(run)
    assert "ended with status 7" in (tmp_path / "log.txt").read_text()


class Endless(Ending):
    """Of a run that goes on."""

    def __init__(self) -> None:
        self.come, self.status = Unhurried(), None


class Unhurried(threading.Event):
    """An end that does not come, and is not waited for."""

    def wait(self, timeout: float | None = None) -> bool:
        """At once."""
        return False


def test_a_tracker_that_fails_every_other_time_does_not_fill_the_log(tmp_path: Path) -> None:
    tracked_run(tmp_path, RECORDING)
    log = list[str]()
    sender = Sender(tmp_path, RECORDING, Endless(), log.append)
    tries = iter(range(200))

    def flapping() -> None:
        if next(tries) % 2 == 0:
            raise OSError("away")

    for _ in range(100):
        sender._tried(flapping)
    assert log == [
        f"WARNING: {RECORDING.name}: OSError: away; it is tried again, the run goes on",
        f"{RECORDING.name}: works again",
    ]


def test_a_run_without_trackers_starts_no_process(tmp_path: Path) -> None:
    with tracked(tracked_run(tmp_path)) as tracking:
        assert tracking is None


def test_ranks_but_the_first_start_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with tracked(tracked_run(tmp_path, RECORDING)) as tracking:
        assert tracking is None


def test_a_run_that_is_over_is_sent_by_the_command_to_any_tracker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the class of the documentation."""
    code = (REPOSITORY / "docs" / "trackers.md").read_text().partition("```python\n")[2].partition("```")[0]
    (tmp_path / "my_trackers.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{REPOSITORY}")
    monkeypatch.syspath_prepend(str(tmp_path))
    tracked_run(tmp_path / "run")
    write_lines(tmp_path / "run", two_stages())
    assert main(["track", str(tmp_path / "run"), "--logging.trackers", "[my_trackers.Lines]"]) == 0
    rows = (tmp_path / "run" / "trackers" / "my_trackers.Lines" / "lines.jsonl").read_text().splitlines()
    assert [row["step"] for row in map(json.loads, rows) if "train/loss" in row] == [*range(1, 8)]
    assert main(["track", str(tmp_path / "run")]) == 2
    assert main(["track", str(tmp_path)]) == 2
