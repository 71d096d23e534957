"""What `flm status` says of a run's folder, and how it looks on terminals of all kinds."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
import time
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from flm_megatron.checkpoint.lease.file import LEASE
from flm_megatron.checkpoint.lease.holder import this_process
from flm_megatron.evaluation.status.live import has_ended, watch
from flm_megatron.evaluation.status.state import KEPT_LOSSES, Losses, Reader
from flm_megatron.evaluation.status.view import sparkline, status_view
from flm_megatron.training.metrics.events import FILE
from tests.support.run_folder import append, events, make_run_folder, step_event
from tests.support.runs import flm

ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
ELSEWHERE = replace(this_process(0.05), host="node007", boot="other", token="other")


def lease(folder: Path, alive: bool) -> None:
    """A lease of a process of this machine, which lives or is gone."""
    own = this_process(5.0)
    holder = own if alive else replace(own, start_ticks=own.start_ticks + 1)
    (folder / LEASE).write_bytes(holder.to_bytes() + b"000000000001\n")


def shown(folder: Path, width: int = 100, no_color: bool = False) -> str:
    """The view as a terminal of `width` columns gets it."""
    console = Console(file=StringIO(), width=width, force_terminal=True, color_system="truecolor", no_color=no_color)
    console.print(status_view(Reader(folder).read(), console))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert isinstance(text, str)
    return text


def test_json_says_all_that_is_known(tmp_path: Path) -> None:
    folder = make_run_folder(tmp_path / "run", 25)
    lease(folder, alive=True)
    done = flm("status", folder, "--json")
    found = json.loads(done.stdout)
    assert done.returncode == 0 and found["state"] == "running" and f"process {os.getpid()}" in found["holder"]
    assert (found["stage"], found["step"], found["stage_steps"]) == ("grown", 5, 10)
    assert (found["tokens"], found["total_tokens"], found["ranks"]) == (25 * 64, 30 * 64, 4)
    assert found["loss"] == 2.5 and found["validation_loss"] == 3.25 and found["mfu"] is None
    assert found["growths"][0] | {"tokens": 0} == {
        "stage": "grown", "tokens": 0, "change": "growth", "loss_before": 3.0, "loss_after": 3.000003
    }  # fmt: skip
    assert found["checkpoint"] == "checkpoints/small/step_00000020" and found["checkpoint_age_s"] < 60
    assert found["goodput"] == pytest.approx(10 / 22) and found["stalls_s"] == {"save": 2.0}


@pytest.mark.parametrize(
    ("steps", "alive", "state"),
    [
        (0, None, "not started"),
        (5, None, "stopped"),
        (5, False, "killed"),
        (30, None, "finished"),
        (5, True, "running"),
    ],
)
def test_the_state_is_told_by_the_lease_and_the_budget(
    tmp_path: Path, steps: int, alive: bool | None, state: str
) -> None:
    folder = make_run_folder(tmp_path / "run", steps)
    if alive is not None:
        lease(folder, alive)
    assert Reader(folder).read().state == state


def test_a_run_that_writes_nothing_for_long_is_stalled(tmp_path: Path) -> None:
    folder = make_run_folder(tmp_path / "run", 5)
    lease(folder, alive=True)
    os.utime(folder / "goodput.jsonl", (time.time() - 300,) * 2)
    assert Reader(folder).read().state == "stalled" and "nothing was written for 5m" in shown(folder)


def test_a_lease_of_another_host_is_watched_until_it_is_known(tmp_path: Path) -> None:
    folder = make_run_folder(tmp_path / "run", 5)
    (folder / LEASE).write_bytes(ELSEWHERE.to_bytes() + b"000000000001\n")
    reader = Reader(folder)
    assert reader.read().state == "unknown"
    (folder / LEASE).write_bytes(ELSEWHERE.to_bytes() + b"000000000002\n")
    assert reader.read().state == "running"
    assert Reader(folder).read(settle=True).state == "killed"  # it is not renewed any more


def test_a_reader_goes_on_where_it_was_and_begins_again_after_a_restart(tmp_path: Path) -> None:
    folder = make_run_folder(tmp_path / "run", 5)
    reader = Reader(folder)
    assert len(reader.read().progress.losses.values) == 5
    with (folder / FILE).open("a") as file:
        file.write('{"stage": "small", "step": 6, ')  # a line that is being written
    assert reader.read().progress.step == step_event("small", 5, 5, 4.5)
    (folder / "fresh").write_text("")
    (folder / "fresh").replace(folder / FILE)
    append(folder, events(2))
    state = reader.read()
    assert state.progress.step == step_event("small", 2, 2, 4.8) and len(state.progress.losses.values) == 2


def test_losses_of_a_long_run_stay_few_and_cover_all_of_it() -> None:
    losses = Losses()
    for step in range(100_000):
        losses.add(float(step))
    assert KEPT_LOSSES / 4 < len(losses.values) <= KEPT_LOSSES
    assert losses.values[0] == 0 and losses.values[-1] > 99_000


def test_a_sparkline_has_the_shape_of_its_values() -> None:
    assert sparkline([8, 7, 6, 5, 4, 3, 2, 1], 8) == "█▇▆▅▄▃▂▁"
    assert sparkline([1.0] * 100, 5) == "▁▁▁▁▁" and sparkline([], 5) == ""
    assert sparkline([1, 9], 80, ascii_only=True).isascii()


@pytest.mark.parametrize("width", [30, 60, 100, 200])
def test_the_view_fits_its_terminal(tmp_path: Path, width: int) -> None:
    lines = ESCAPE.sub("", shown(make_run_folder(tmp_path / "run", 25), width)).splitlines()
    assert {len(line) for line in lines} == {width}
    assert any("3.000003" in line for line in lines) or width < 60


def test_without_colour_nothing_is_coloured(tmp_path: Path) -> None:
    folder = make_run_folder(tmp_path / "run", 25)
    assert re.search(r"\x1b\[[0-9;]*3[0-9]m", shown(folder))
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]m", shown(folder, no_color=True))


def test_where_there_is_no_terminal_a_watch_prints_plain_lines(tmp_path: Path) -> None:
    out = StringIO()
    watch(make_run_folder(tmp_path / "run", 30), Console(file=out), has_ended, every_s=0)
    assert out.getvalue() == "demo: finished, grown step 10/10, loss 2.0000, 1,920 of 1,920 tokens\n"


@pytest.mark.parametrize(("term", "live"), [("xterm-256color", True), ("dumb", False)])
def test_a_watch_in_a_real_terminal_ends_with_the_run(tmp_path: Path, term: str, live: bool) -> None:
    folder = make_run_folder(tmp_path / "run", 29)
    lease(folder, alive=True)
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "flm_megatron.cli.main", "status", str(folder), "--watch"]
    with subprocess.Popen(command, stdout=theirs, stderr=theirs, env={**os.environ, "TERM": term}) as process:
        os.close(theirs)
        text = os.read(ours, 65536)
        append(folder, events(30)[-1:])
        (folder / LEASE).unlink()
        while chunk := _read(ours):
            text += chunk
    os.close(ours)
    assert process.returncode == 0
    assert (b"\x1b[?25l" in text) == live  # the cursor is hidden while the view changes
    assert b"finished" in text and b"10/10" in text


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # the other end is closed
        return b""


def test_a_folder_that_is_no_runs_is_one_line(tmp_path: Path) -> None:
    done = flm("status", tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "no run.yaml" in done.stderr


def test_status_needs_no_torch(tmp_path: Path) -> None:
    code = "import sys; from flm_megatron.cli.main import main; main(sys.argv[1:]); assert 'torch' not in sys.modules"
    folder = make_run_folder(tmp_path / "run", 3)
    subprocess.run([sys.executable, "-c", code, "status", str(folder)], check=True, capture_output=True)
