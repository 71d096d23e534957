"""Where a run's wall time went, from made-up lines of several starts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest

from flm_megatron.training.metrics.goodput import (
    FILE,
    BeginLine,
    Line,
    Meter,
    StallLine,
    StepLine,
    add_up,
    read_goodput,
)


def begin(time: float, started: float, step: int, index: int = 0) -> Line:
    return BeginLine("begin", time, index, "s", step, started)


def step(
    time: float, number: int, seconds: float = 2.0, waited: float = 0.0, what: Literal["step", "refused"] = "step"
) -> Line:
    return StepLine(what, time, number, seconds, waited)


def test_an_undisturbed_run() -> None:
    total = add_up(iter([begin(103, 100, 0), step(107, 1), step(110, 2, waited=1), StallLine("save", 114, 4)]))
    assert total.wall_s == 14 and total.steps_s == 4 and total.start_s == 5  # loading goes on after `begin`
    assert total.stalls_s["save"] == 4 and total.data_s == 1
    assert total.share == pytest.approx(4 / 14) and total.parts["other"] == pytest.approx(0)


def test_steps_beyond_the_one_that_a_restart_goes_on_from_are_lost() -> None:
    lines = [begin(1, 0, 0), *(step(1 + 2 * n, n) for n in range(1, 6))]  # five steps, the third was saved
    lines += [begin(121, 120, 3), *(step(117 + 2 * n, n) for n in range(4, 7))]
    total = add_up(iter(lines))
    assert (total.lost_steps, total.lost_s, total.starts) == (2, 4.0, 2)
    assert total.steps_s - total.lost_s == 12  # six steps count
    assert total.down_s == 109 and total.wall_s == 129
    assert sum(total.parts.values()) + 12 == pytest.approx(total.wall_s)


def test_a_restart_in_an_earlier_stage_loses_the_later_one() -> None:
    lines = [begin(1, 0, 0), step(3, 1), step(5, 2), begin(6, 5.5, 0, index=1), step(8, 1), begin(10, 9, 1)]
    total = add_up(iter(lines))
    assert total.lost_steps == 2 and total.lost_s == 4


def test_refused_steps_and_two_crashes_at_the_same_step() -> None:
    lines = [begin(1, 0, 0), step(3, 1), step(5, 2, what="refused"), begin(6, 6, 0), step(8, 1), begin(9, 9, 0)]
    total = add_up(iter([*lines, step(11, 1)]))
    assert total.refused_s == 2 and total.lost_steps == 2 and total.steps_s - total.lost_s == 2
    assert "2 steps lost" in total.text() and "3 starts" in total.text()


def test_stages_of_one_process_are_one_start() -> None:
    """Under a launcher; what lies between two stages is the time to start the second one."""
    lines = [begin(3, 0, 0), step(5, 1), step(7, 2), begin(11, 0, 0, index=1), step(14, 1), begin(30, 29, 1, index=1)]
    total = add_up(iter([*lines, step(33, 2)]))
    assert total.starts == 2 and total.lost_steps == 0
    assert total.start_s == 3 + 5 + 2 and total.down_s == 15


def test_steps_that_a_rollback_takes_back_are_lost() -> None:
    """Their numbers are not given out again: the next step trains the next samples, from the state that was saved."""
    lines = [begin(1, 0, 0), *(step(1 + 2 * n, n) for n in (1, 2, 3, 4)), step(11, 5, what="refused")]
    back = StallLine("rollback", 12, 1, step=2)
    total = add_up(iter([*lines, back, step(14, 6), step(16, 7, what="refused"), replace(back, time=17), step(19, 8)]))
    assert (total.lost_steps, total.lost_s, total.refused_s) == (3, 6.0, 4.0)
    assert total.parts["rolling back"] == 2 and total.steps_s - total.lost_s == 6
    assert "rolling back" in total.text()


def test_the_file_is_added_to_and_a_torn_line_is_passed_over(tmp_path: Path) -> None:
    assert read_goodput(tmp_path) is None
    for _ in range(2):
        meter = Meter(tmp_path)
        meter.begin(0, "s", 0)
        meter.step(1, 0.5, 0.0, applied=True)
        with pytest.raises(ValueError), meter.stall("save"):
            raise ValueError
        meter.close()
        with (tmp_path / FILE).open("a") as file:
            file.write('{"what": "st')
    total = read_goodput(tmp_path)
    assert total is not None and total.starts == 1 and total.lost_steps == 1 and "save" in total.stalls_s


def test_lines_of_earlier_and_later_versions_are_read_and_passed_over(tmp_path: Path) -> None:
    """The text is that of the first version, with a key and a kind that it did not have."""
    (tmp_path / FILE).write_text(
        '{"what": "begin", "time": 3.0, "index": 0, "stage": "s", "step": 0, "started": 0.0, "later": 1}\n'
        '{"what": "step", "time": 5.0, "step": 1, "seconds": 1.0, "data_s": 0.5}\n'
        '{"what": "later", "time": 6.0}\n'
        '{"what": "rollback", "time": 8.0, "seconds": 2.0, "step": 0}\n'
    )
    total = read_goodput(tmp_path)
    assert total is not None and (total.wall_s, total.start_s, total.data_s, total.lost_s) == (8, 3.5, 0.5, 1)
    assert total.stalls_s == {"rollback": 2.0}


def test_the_text_of_a_line_is_what_it_always_was(tmp_path: Path) -> None:
    meter = Meter(tmp_path)
    meter.begin(1, "s", 4)
    meter.step(5, 0.5, 0.25, applied=False)
    with meter.stall("rollback", step=4):
        pass
    with meter.stall("save"):
        pass
    meter.close()
    keys = [list(json.loads(row)) for row in (tmp_path / FILE).read_text().splitlines()]
    assert keys == [
        ["what", "time", "index", "stage", "step", "started"],
        ["what", "time", "step", "seconds", "data_s"],
        ["what", "time", "seconds", "step"],
        ["what", "time", "seconds"],
    ]


def test_other_ranks_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    meter = Meter(None)
    meter.begin(0, "s", 0)
    with meter.stall("validation"):
        meter.step(1, 1.0, 0.0, applied=True)
    meter.close()
    assert list(tmp_path.iterdir()) == []
