"""`flm doctor` on several hosts (network namespaces): they find each other, or name the one that is out of reach."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.hosts import Host, hosts, obstacle, start_job, wait_all
from tests.support.runs import make_run

REASON = obstacle()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
LIMIT_S = 120


def examine(machines: list[Host], source: Path, folder: Path, *options: str) -> tuple[list[int], str]:
    """Exit statuses on all hosts, and what they printed."""
    job = start_job(machines, ["doctor", str(source), *options], folder)
    statuses = wait_all(job, LIMIT_S)
    return statuses, "\n".join((folder / f"{host.name}.log").read_text() for host in machines)


def test_hosts_that_reach_each_other(data: Path, tmp_path: Path) -> None:
    source, _ = make_run(data, tmp_path)
    with hosts(2) as machines:
        statuses, text = examine(machines, source, tmp_path)
    assert statuses == [0, 0], text
    assert "all 2 ranks on 2 host(s) reported" in text
    assert "every rank reaches every other" in text
    assert "versions, tokenizer and data" in text and f"{tmp_path} is shared" in text
    assert "gloo all-reduce over 2 ranks: 4 MiB" in text
    assert text.count("Nothing would stop the run") == 1


@pytest.mark.slow
def test_two_hosts_out_of_each_others_reach_are_named(data: Path, tmp_path: Path) -> None:
    source, _ = make_run(data, tmp_path, "--stages.0.parallel.tensor", "1", "--stages.0.global_batch", "6")
    with hosts(3) as machines:
        machines[1].refuse(machines[2])
        statuses, text = examine(machines, source, tmp_path, "--timeout-s", "30")
        one, other = machines[1].name, machines[2].name
    assert statuses == [2, 2, 2], text
    assert f"on host {other}" in text and f"host {one} cannot reach rank" in text
    assert "all-reduce" not in text


@pytest.mark.slow
def test_a_host_that_does_not_see_the_output_folder_is_named(data: Path, tmp_path: Path) -> None:
    source, _ = make_run(data, tmp_path)
    with hosts(2) as machines:
        machines[1].hide(tmp_path / "hidden")
        statuses, text = examine(machines, source, tmp_path, "--output", str(tmp_path / "hidden"))
        blind = machines[1].name
    assert statuses == [2, 2], text
    assert "file system shared by all hosts" in text and blind in text
