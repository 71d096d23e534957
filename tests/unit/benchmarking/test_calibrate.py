"""Calibration of the planner on this device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flm_megatron.benchmarking.calibrate import BASE, Effort, calibrate, copy_bandwidth, seconds, time_products
from flm_megatron.device import current
from flm_megatron.device.hardware import find_hardware
from flm_megatron.errors import RequestError
from flm_megatron.planner.cost.matmul import matmul_time
from flm_megatron.planner.machine import find_machine

SMALL = Effort(smallest=128, largest=256, copied_bytes=2**22, repeats=3)


def test_the_file_makes_a_plan_for_this_device(tmp_path: Path) -> None:
    path = tmp_path / "here.yaml"
    text = calibrate(path, SMALL)
    known = find_hardware(current().hardware_name())
    machine = find_machine(known.name if known else BASE, overrides=path)
    assert machine.source == str(path)
    assert current().hardware_name() in path.read_text()
    assert "not measured: links" in text
    for name in ("matmul", "attention", "memory"):
        assert 0 < getattr(machine.efficiency, name) <= 1
    if known is None:
        # What was measured is what is planned: a device that is not in the table gets its own rates.
        assert machine.hardware.name == current().hardware_name()
        product = torch.randn(256, 256)
        measured = seconds(lambda: product @ product, 5)
        assert 0.1 < matmul_time(machine, "fp32", 256, 256, 256) / measured < 10


def test_products_are_timed_up_to_the_longest() -> None:
    assert len(list(time_products("fp32", SMALL))) == 8  # four shapes of two sizes
    assert len(list(time_products("fp32", Effort(smallest=128, largest=256, longest_s=0.0, repeats=1)))) == 4


def test_copies_count_what_is_read_and_written() -> None:
    """A tenth to a thousand GB/s is what memory moves; a count in bits or in kilobytes is outside."""
    assert 1e8 < copy_bandwidth(SMALL) < 1e13


def test_a_file_that_cannot_be_written_is_refused_before_anything_is_timed(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="there is no folder"):
        calibrate(tmp_path / "no" / "here.yaml", SMALL)
