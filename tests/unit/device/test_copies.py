"""In which order a GPU is asked to copy beside its work: on a machine without one, by what it is asked."""

from __future__ import annotations

import mmap
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from flm_megatron.device.cpu import CpuDevice
from flm_megatron.device.cuda import CudaDevice


class Recording:
    """Streams and events that write down what happens to them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[str] = []
        note = self.asked.append
        self.main = SimpleNamespace(wait_event=lambda event: note("main waits for the copies"))
        self.side = SimpleNamespace(wait_stream=lambda stream: note(f"side waits for {self._name(stream)}"))
        event = SimpleNamespace(
            record=lambda stream: note(f"event on {self._name(stream)}"), synchronize=lambda: note("host waits")
        )
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: note("stream") or self.side)
        monkeypatch.setattr(torch.cuda, "Event", lambda: event)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.main)
        monkeypatch.setenv("LOCAL_RANK", "3")
        monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext(note(f"on GPU {device.index}")))
        monkeypatch.setattr(torch.cuda, "check_error", lambda result: None)
        driver = SimpleNamespace(cudaHostRegister=lambda *_: note("lock"), cudaHostUnregister=lambda *_: note("unlock"))
        monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext(note(f"on {self._name(stream)}")))
        monkeypatch.setattr(
            torch.Tensor, "record_stream", lambda tensor, stream: note(f"kept for {self._name(stream)}")
        )

    def _name(self, stream: object) -> str:
        return "side" if stream is self.side else "main"


def test_a_gpu_copies_on_a_stream_of_its_own_and_holds_changes_back_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Recording(monkeypatch).asked
    device, host, tensor = CudaDevice(), torch.zeros(3), torch.ones(3)
    device.hold_changes()
    assert not asked, "nothing is under way"
    copying = device.copy_aside([(host, tensor)])
    assert asked == ["stream", "side waits for main", "on side", "kept for side", "event on side"]
    assert torch.equal(host, tensor)
    del asked[:]
    copying.wait()
    device.hold_changes()
    device.hold_changes()
    assert asked == ["on GPU 3", "host waits", "main waits for the copies"]
    device.copy_aside([])
    assert "stream" not in asked, "one stream serves all saves"


def test_threads_lock_memory_for_the_gpu_of_their_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new thread's own is GPU 0, on which the driver would set up a context for every process of the host."""
    asked, memory = Recording(monkeypatch).asked, mmap.mmap(-1, 64)
    CudaDevice().pin(memory)
    CudaDevice().unpin(memory)
    assert asked == ["on GPU 3", "lock", "on GPU 3", "unlock"]


def test_a_cpu_copies_at_once() -> None:
    device, host, tensor = CpuDevice(), torch.zeros(3), torch.ones(3)
    copying = device.copy_aside([(host, tensor)])
    device.hold_changes()
    tensor.zero_()
    copying.wait()
    assert host.tolist() == [1.0, 1.0, 1.0]
