"""What the doctor reads out of `nvidia-smi`: healthy and faulty GPUs, old drivers, a driver that hangs, topologies.

The answers are written after NVIDIA's documentation of the command; none of them comes from a GPU.
"""

from __future__ import annotations

import os
import textwrap
import time
from pathlib import Path

import pytest

from flm_megatron.config.schema import ParallelConfig, RunConfig, StageConfig
from flm_megatron.launch.doctor import nvidia_smi
from flm_megatron.launch.doctor.fabric import joined
from flm_megatron.launch.doctor.machine import examine_machine, machine_facts
from flm_megatron.launch.doctor.nvidia_smi import (
    FIELDS,
    REASONS,
    Gpu,
    Silent,
    gpus,
    read_topology,
    remapped_rows,
    settings,
)

HEALTHY = dict(
    zip(
        FIELDS,
        (
            "0",
            "NVIDIA H100 80GB HBM3",
            "00000000:18:00.0",
            "570.133.20",
            "Enabled",
            "Default",
            "Disabled",
            "700.00",
            "700.00",
            "0",
        ),
        strict=True,
    )
)


def gpu(**changes: str) -> Gpu:
    """A healthy GPU but for some fields, whose dots are written as two underscores."""
    values = {**HEALTHY, **dict.fromkeys(REASONS, "Not Active")}
    return Gpu(values | {name.replace("__", "."): value for name, value in changes.items()})


def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """An `nvidia-smi` of a few lines of shell, first on PATH."""
    path = tmp_path / "bin" / "nvidia-smi"
    path.parent.mkdir(exist_ok=True)
    path.write_text("#!/bin/sh\n" + textwrap.dedent(script))
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")


TABLE = "\tGPU0\tGPU1\tCPU Affinity\nGPU0\t X \tSYS\t0-7\nGPU1\tSYS\t X \t8-15\n"


def two_gpus(folder: Path, new: bool = True) -> str:
    """An `nvidia-smi` with two GPUs, the second with troubles, of a driver since 535 or of one before."""
    known, unknown = ("event", "throttle") if new else ("throttle", "event")
    first = ", ".join(HEALTHY.values())
    answers = {
        "gpus": f"{first}\n{first.replace('0, ', '1, ', 1)}\n",
        "reasons": "Not Active, Not Active, Not Active, Not Active\nActive, Active, Not Active, Not Active\n",
        "rows": "00000000:18:00.0, No, No\n00000000:2A:00.0, Yes, No\n",
        "table": "\x1b[4m" + TABLE.replace("\n", "\x1b[0m\n", 1),
    }
    for name, text in answers.items():
        (folder / name).write_text(text)
    return f"""
    cd {folder}
    case "$*" in
      *clocks_{unknown}_reasons*) echo 'Field "clocks_{unknown}_reasons" is not a valid field to query.'; exit 2;;
      *clocks_{known}_reasons*) cat reasons;;
      *remapped*) cat rows;;
      *query-gpu*) cat gpus;;
      *topo*) cat table;;
    esac
    """


def test_healthy_gpus_are_one_line() -> None:
    (finding,) = settings([gpu(), gpu(index="1")])
    assert (finding.level, finding.topic) == ("ok", "GPUs") and "570.133.20" in finding.text


@pytest.mark.parametrize(
    ("changes", "level", "words"),
    [
        ({"persistence_mode": "Disabled"}, "warn", "nvidia-smi -pm 1 (GPU 1)"),
        ({"compute_mode": "Prohibited"}, "stop", "nvidia-smi -c 0"),
        ({"mig__mode__current": "Enabled"}, "warn", "MIG is on"),
        ({"ecc__errors__uncorrected__volatile__total": "3"}, "warn", "ECC could not correct"),
        ({"power__limit": "500.00"}, "warn", "power limit below the default"),
        ({"hw_thermal_slowdown": "Active"}, "warn", "clocks are held down (hw_thermal_slowdown)"),
        ({"name": "NVIDIA H200"}, "warn", "NVIDIA H100 80GB HBM3 and NVIDIA H200 on one host"),
    ],
)
def test_each_fault_is_named_with_its_gpu_and_fix(changes: dict[str, str], level: str, words: str) -> None:
    (finding,) = settings([gpu(), gpu(index="1", **changes)])
    assert finding.level == level and words in finding.text


def test_what_a_gpu_does_not_have_is_no_fault() -> None:
    absent = dict.fromkeys(("mig__mode__current", "ecc__errors__uncorrected__volatile__total", "power__limit"), "[N/A]")
    assert [each.level for each in settings([gpu(**absent)])] == ["ok"]


@pytest.mark.parametrize("new", [True, False])
def test_reasons_are_asked_for_under_the_name_that_the_driver_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new: bool
) -> None:
    smi(tmp_path, monkeypatch, two_gpus(tmp_path, new))
    found = gpus()
    assert [each.index for each in found] == ["0", "1"]
    assert [each.values["hw_slowdown"] for each in found] == ["Not Active", "Active"]
    assert [each.text for each in remapped_rows()] == [
        "a memory row is to be replaced: reset the GPU (00000000:2A:00.0)"
    ]


def test_without_the_program_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert gpus() == [] and list(examine_machine(RunConfig(), 1, False)) == []


def test_a_driver_that_hangs_is_named_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvidia_smi, "ANSWER_S", 0.3)
    smi(tmp_path, monkeypatch, "exec sleep 60")
    began = time.monotonic()
    (finding,) = examine_machine(RunConfig(), 1, False)
    assert time.monotonic() - began < 5
    assert finding.level == "warn" and "did not answer within 0.3 s: the driver hangs" in finding.text


def test_a_lost_gpu_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi(
        tmp_path,
        monkeypatch,
        'echo "Unable to determine the device handle for GPU 0000:18:00.0: GPU is lost."; exit 15',
    )
    with pytest.raises(Silent, match="ended with 15 and said: Unable to determine the device handle"):
        gpus()
    (finding,) = examine_machine(RunConfig(), 1, False)
    assert "GPU is lost" in finding.text
    assert "GPUs" not in machine_facts()


def test_a_host_with_two_gpus_is_examined_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi(tmp_path, monkeypatch, two_gpus(tmp_path))
    run = RunConfig(stages=[StageConfig(name="wide", parallel=ParallelConfig(tensor=2))])
    texts = [each.text for each in examine_machine(run, 2, False) if each.topic in ("GPUs", "topology")]
    assert any("hw_slowdown" in text and "GPU 1" in text for text in texts)
    assert any("stage wide: tensor groups of 2 GPUs are joined by SYS, not by NVLink" in text for text in texts)
    assert machine_facts()["GPUs"] == "2 x NVIDIA H100 80GB HBM3"
    assert machine_facts()["driver"] == "570.133.20"


NVSWITCH = "\t" + "\t".join(f"GPU{n}" for n in range(4)) + "\tNIC0\tNIC1\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\n"
NVSWITCH += "".join(
    f"GPU{row}\t"
    + "\t".join(" X " if row == column else "NV18" for column in range(4))
    + ("\tPIX\tSYS" if row < 2 else "\tSYS\tSYS")
    + "\t0-47\t0\tN/A\n"
    for row in range(4)
)
NVSWITCH += "NIC0\tPIX\tPIX\tSYS\tSYS\t X \tSYS\nNIC1\tSYS\tSYS\tSYS\tSYS\tSYS\t X \n\nLegend:\n\n  X    = Self\n\n"
NVSWITCH += "NIC Legend:\n\n  NIC0: mlx5_0\n  NIC1: mlx5_bond_0\n"
PCIE = "\tGPU0\tGPU1\tGPU2\tGPU3\tmlx5_0\tCPU Affinity\n"
PCIE += "GPU0\t X \tNV4\tPHB\tSYS\tPXB\t0-7\nGPU1\tNV4\t X \tSYS\tPHB\tNODE\t0-7\n"
PCIE += "GPU2\tPHB\tSYS\t X \tNV4\tSYS\t8-15\nGPU3\tSYS\tPHB\tNV4\t X \tSYS\t8-15\nmlx5_0\tPXB\tNODE\tSYS\tSYS\t X \t\n"


def test_a_table_says_how_gpus_and_adapters_are_joined() -> None:
    topology = read_topology(NVSWITCH)
    assert topology.adapters == ["mlx5_0", "mlx5_bond_0"]
    assert topology.links["GPU0", "GPU3"] == "NV18" and topology.nearest("GPU1") == "PIX"
    assert topology.nearest("GPU3") == "SYS"
    older = read_topology(PCIE)
    assert older.links["GPU1", "GPU2"] == "SYS" and older.nearest("GPU0") == "PXB"
    assert read_topology("nothing of the kind").links == {}


@pytest.mark.parametrize(
    ("table", "tensor", "several", "words"),
    [
        (NVSWITCH, 4, False, ["GPUs joined by NV18"]),
        (NVSWITCH, 4, True, ["GPU2, GPU3: no adapter nearer than the other socket"]),
        (PCIE, 2, False, ["GPUs joined by NV4, PHB, SYS"]),
        (PCIE, 4, False, ["tensor groups of 4 GPUs are joined by PHB, SYS, not by NVLink"]),
        (PCIE, 8, False, ["tensor groups of 4 GPUs are joined by PHB, SYS"]),
        (PCIE, 1, False, ["GPUs joined by"]),
    ],
)
def test_tensor_groups_want_nvlink_and_hosts_a_near_adapter(
    table: str, tensor: int, several: bool, words: list[str]
) -> None:
    run = RunConfig(stages=[StageConfig(parallel=ParallelConfig(tensor=tensor))])
    findings = list(joined(run, read_topology(table), 4, several))
    assert len(findings) == len(words)
    assert all(word in finding.text for word, finding in zip(words, findings, strict=True))
