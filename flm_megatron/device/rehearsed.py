"""A device that computes nothing: tensors have shapes and dtypes but no values, and collectives reach nobody."""

from __future__ import annotations

from flm_megatron.device.cpu import CpuDevice


class RehearsedDevice(CpuDevice):
    """Stands for one GPU of any world. Operations run under torch's fake tensors, in a world of the `fake` backend."""

    name = "rehearsed"
    backend = "fake"
    fills_in_threads = False
    has_values = False

    def engine_options(self) -> dict[str, object]:
        """As on a CPU, but what a pipeline rank has sent is freed, as on a GPU."""
        return {**super().engine_options(), "deallocate_pipeline_outputs": True}

    def synchronize(self) -> None:
        """Nothing is queued."""

    def peak_memory_gib(self) -> float:
        """None of the tensors takes memory here; `planner.rehearsal` counts what they would take."""
        return 0.0

    def reset_peak_memory(self) -> None:
        """There is no peak."""
