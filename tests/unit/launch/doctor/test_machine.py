"""What the doctor reads out of /sys and /proc, in trees of files laid out as the kernel's."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

from flm_megatron.launch.doctor import machine
from flm_megatron.launch.doctor.fabric import Port, adapters, card, ports, selected
from flm_megatron.launch.doctor.findings import Finding, render
from flm_megatron.launch.doctor.machine import cpus, governor, iommu, numa, processors, time_service
from flm_megatron.launch.doctor.nvidia_smi import Gpu


def lay(root: Path, **files: str) -> Path:
    """Files below `root`; in their names `__` stands for a slash."""
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


def port(
    root: Path, adapter: str, state: str = "4: ACTIVE", rate: str = "400 Gb/sec (4X NDR)", layer: str = "InfiniBand"
) -> Path:
    """An adapter with one port."""
    folder = root / "class" / "infiniband" / adapter / "ports" / "1"
    folder.mkdir(parents=True)
    for name, text in (("state", state), ("rate", rate), ("link_layer", layer)):
        (folder / name).write_text(text + "\n")
    return root


@pytest.fixture
def with_rdma(tmp_path: Path) -> Path:
    """/sys of a host whose adapters reach GPUs."""
    (tmp_path / "module" / "nvidia_peermem").mkdir(parents=True)
    return tmp_path


def texts(findings: object) -> list[str]:
    """Level and text of each finding."""
    return [f"{each.level} {each.text}" for each in findings]  # type: ignore[attr-defined]


def test_ports_that_are_up_are_one_line(with_rdma: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NCCL_IB_HCA", raising=False)
    port(with_rdma, "mlx5_0")
    port(with_rdma, "mlx5_1")
    found = ports(with_rdma)
    assert found[0] == Port("mlx5_0", "1", "ACTIVE", "400 Gb/sec", "InfiniBand")
    assert texts(adapters(found, with_rdma)) == ["ok 2 port(s) up, 400 Gb/sec, InfiniBand: mlx5_0:1, mlx5_1:1"]
    assert texts(adapters([], with_rdma)) == []


def test_a_port_that_is_down_and_rates_that_differ(with_rdma: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_IB_HCA", "mlx5")
    port(with_rdma, "mlx5_0")
    port(with_rdma, "mlx5_1", state="1: DOWN")
    port(with_rdma, "mlx5_2", rate="100 Gb/sec (4X EDR)", layer="Ethernet")
    found = texts(adapters(ports(with_rdma), with_rdma))
    assert found[0].startswith("warn mlx5_1:1 DOWN: look at cable and switch")
    assert found[1].startswith("warn rates differ (100 Gb/sec, 400 Gb/sec)")
    assert found[2].startswith("warn kinds differ (Ethernet, InfiniBand)") and len(found) == 3
    monkeypatch.setenv("NCCL_IB_HCA", "=mlx5_0")
    assert [each[:2] for each in texts(adapters(ports(with_rdma), with_rdma))] == ["ok"]


def test_a_choice_that_names_nothing_means_tcp(with_rdma: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_IB_HCA", "bnxt")
    port(with_rdma, "mlx5_0")
    (found,) = texts(adapters(ports(with_rdma), with_rdma))
    assert found == "warn NCCL_IB_HCA is bnxt, but the adapters are mlx5_0:1: NCCL would take TCP"
    monkeypatch.setenv("NCCL_IB_DISABLE", "1")
    assert texts(adapters(ports(with_rdma), with_rdma))[0].startswith("ok NCCL_IB_DISABLE is set")


def test_adapters_that_do_not_reach_the_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NCCL_IB_HCA", raising=False)
    port(tmp_path, "mlx5_0")
    found = texts(adapters(ports(tmp_path), tmp_path, tmp_path))
    assert found[0].startswith("warn no GPUDirect RDMA") and "modprobe nvidia_peermem" in found[0]
    lay(tmp_path, driver__nvidia__version="NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.133.20")
    assert [each[:2] for each in texts(adapters(ports(tmp_path), tmp_path, tmp_path))] == ["ok"]


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("", "mlx5_0 mlx5_1 mlx5_10 irdma0"),
        ("mlx5", "mlx5_0 mlx5_1 mlx5_10"),
        ("mlx5_1", "mlx5_1 mlx5_10"),
        ("=mlx5_1", "mlx5_1"),
        ("=mlx5_0,mlx5_1", "mlx5_0 mlx5_1"),
        ("^mlx5_1", "mlx5_0 irdma0"),
        ("^=mlx5_1", "mlx5_0 mlx5_10 irdma0"),
        ("mlx5_0:1", "mlx5_0"),
        ("mlx5_0:2", ""),
    ],
)
def test_adapters_are_chosen_as_nccl_chooses_them(choice: str, names: str) -> None:
    found = [Port(name, "1", "ACTIVE", "", "") for name in ("mlx5_0", "mlx5_1", "mlx5_10", "irdma0")]
    assert " ".join(each.adapter for each in selected(found, choice)) == names


def test_the_named_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NCCL_SOCKET_IFNAME", raising=False)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    assert card(tmp_path) == ([], {})
    lay(tmp_path, class__net__eth7__operstate="up", class__net__eth7__mtu="9000", class__net__eth7__speed="100000")
    assert card(tmp_path) == ([], {"MTU of eth7": "9000", "speed of eth7": "100000 Mb/s"})
    lay(tmp_path, class__net__eth7__operstate="down", class__net__eth7__speed="-1")
    findings, facts = card(tmp_path)
    assert texts(findings) == ["stop the card eth7 is down: ip link set eth7 up"] and "speed of eth7" not in facts


def test_processors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    node = "devices__system__node__node"
    lay(
        tmp_path, **{f"{node}0__cpulist": "0-3", "devices__system__cpu__cpu0__cpufreq__scaling_governor": "performance"}
    )
    assert texts(processors([], tmp_path, tmp_path)) == ["ok 1 NUMA node(s), no setting that slows ranks down"]
    lay(tmp_path, **{"devices__system__cpu__cpu1__cpufreq__scaling_governor": "powersave"})
    assert texts(governor(tmp_path))[0].startswith("warn CPUs are governed by performance, powersave: cpupower")
    lay(tmp_path, **{f"{node}1__cpulist": "4-7", "sys__kernel__numa_balancing": "1"})
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda pid: {0, 1, 4})
    balancing, binding = texts(numa(tmp_path, tmp_path))
    assert "sysctl kernel.numa_balancing=0" in balancing and "2 NUMA nodes, and this rank may run on any" in binding
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda pid: {4, 5})
    lay(tmp_path, sys__kernel__numa_balancing="0")
    assert texts(numa(tmp_path, tmp_path)) == []


def test_lists_of_cpus() -> None:
    assert cpus("0-3,8,10-11") == {0, 1, 2, 3, 8, 10, 11} and cpus("") == set()


def test_an_iommu_before_a_gpu(tmp_path: Path) -> None:
    found = [
        Gpu({"index": "0", "pci.bus_id": "00000000:1B:00.0"}),
        Gpu({"index": "1", "pci.bus_id": "00000000:2A:00.0"}),
    ]
    for bus, kind in (("0000:1b:00.0", "DMA-FQ"), ("0000:2a:00.0", "identity")):
        group = tmp_path / "bus" / "pci" / "devices" / bus / "iommu_group"
        group.mkdir(parents=True)
        (group / "type").write_text(kind + "\n")
    (text,) = texts(iommu(found, tmp_path))
    assert "for GPU 0," in text and "iommu=pt" in text


@pytest.mark.parametrize(("state", "level"), [(5, "warn"), (0, "ok"), (-1, None)])
def test_the_clock(monkeypatch: pytest.MonkeyPatch, state: int, level: str | None) -> None:
    class Library:
        """A C library whose clock is in `state`."""

        def adjtimex(self, buffer: object) -> int:
            """The state."""
            return state

    monkeypatch.setattr(ctypes, "CDLL", lambda *arguments, **options: Library())
    assert [each.level for each in time_service(True)] == ([level] if level else [])
    assert list(time_service(False)) == []


def test_the_real_clock_answers() -> None:
    assert all(each.level in ("ok", "warn") for each in time_service(True))


def test_troubles_of_one_topic_are_lines_of_their_own() -> None:
    findings = [Finding("warn", "GPUs", f"clocks held (GPU {n})", f"h{n}") for n in range(8)]
    findings += [Finding("warn", "GPUs", "MIG is on (GPU 1, 2)", "h1")]
    findings += [Finding("ok", "disk", f"{n} GiB", f"h{n}") for n in range(8)]
    assert render(findings).splitlines()[:3] == [
        "warn  GPUs  clocks held (GPU 0)",
        "warn  GPUs  MIG is on (GPU 1, 2) [h1]",
        "ok    disk  0 GiB",
    ]
