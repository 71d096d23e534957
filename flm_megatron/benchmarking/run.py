"""A whole benchmark: its measurements one after the other, and its report."""

from __future__ import annotations

from dataclasses import dataclass, replace

from flm_megatron import kernels
from flm_megatron.benchmarking.environment import command_line, environment
from flm_megatron.benchmarking.measure import measure_training_step, on_ranks
from flm_megatron.benchmarking.report import Report
from flm_megatron.benchmarking.result import Measurement
from flm_megatron.benchmarking.workload import Request, describe, local_layouts
from flm_megatron.config.rules.distillation import require_no_teacher
from flm_megatron.errors import FlmError, RequestError
from flm_megatron.model.parameters import parameter_count


@dataclass(frozen=True)
class Wanted:
    """The stage's own layout, or all layouts of these numbers of processes; with `peers` other programs beside it."""

    sizes: list[int]
    peers: list[str] | None = None


def benchmark(request: Request, wanted: Wanted) -> Report | None:
    """Measure `request`, whose rules are checked, on this machine; none on ranks that do not report.

    Raises:
        RequestError: the stage distils, what is wanted does not go together, or no layout, program or kernel can run.
        FlmError: a process failed.
    """
    from flm_megatron.distributed.world import launched

    require_no_teacher(request.stage, "a benchmark runs")
    if launched() and (wanted.sizes or wanted.peers is not None):
        raise RequestError("--layouts and --compare start their own processes: leave the launcher out")
    if wanted.sizes and wanted.peers is not None:
        raise RequestError("--layouts and --compare do not go together: give one of them")
    here = {**environment(command_line()), "kernels": kernels.choose(request.kernels).describe()}
    if wanted.peers is not None:
        return _side_by_side(request, wanted.peers, here)
    found, notes = _sweep(request, wanted.sizes) if wanted.sizes else (_measure(request), [])
    return _report(request, found, here, notes=notes) if found else None


def _measure(request: Request) -> list[Measurement]:
    """The stage under its own layout; nothing on ranks that do not report."""
    values = on_ranks(request.stage.parallel, request.timeout_s, measure_training_step, request)
    return [Measurement(**values)] if values else []


def _sweep(request: Request, sizes: list[int]) -> tuple[list[Measurement], list[str]]:
    """The stage under all layouts of these numbers of processes, and why others were not measured."""
    found: list[Measurement] = []
    notes: list[str] = []
    for size in sizes:
        fitting, rejected = local_layouts(request.stage, request.sequence_length, size)
        notes += [f"not measured: {line}" for line in rejected]
        for stage in fitting:
            try:
                found += _measure(replace(request, stage=stage))
            except RequestError:
                raise
            except FlmError as error:  # such as a layout that does not fit in memory: the others can still run
                notes.append(f"failed: {describe(stage.parallel)}: {str(error).strip().splitlines()[-1]}")
    if not found:
        raise FlmError(f"no layout could be measured; {notes[-1]}")
    return found, notes


def _side_by_side(request: Request, peers: list[str], here: dict[str, str]) -> Report | None:
    from flm_megatron.benchmarking.peers.compare import measure_side_by_side, ratios
    from flm_megatron.benchmarking.peers.peer import check_peers, missing_peers

    check_peers(peers, request.stage)
    missing = missing_peers(peers)
    present = [name for name in peers if name not in missing]
    if not present:
        raise RequestError(f"--compare: {', '.join(missing)} not installed: install one, or leave --compare out")
    values = on_ranks(request.stage.parallel, request.timeout_s, measure_side_by_side, request, present)
    if values is None:
        return None
    found = [Measurement(**value) for value in values]
    notes = [f"not measured: {name} is not installed" for name in missing]
    return _report(request, found, here, ratios(found), notes)


def _report(
    request: Request,
    found: list[Measurement],
    here: dict[str, str],
    ratios: dict[str, float] | None = None,
    notes: list[str] | None = None,
) -> Report:
    return Report(
        title=f"Throughput of {request.stage.name}",
        stage=request.stage,
        sequence_length=request.sequence_length,
        parameters=parameter_count(request.stage.model),
        environment=here,
        measurements=found,
        ratios=ratios or {},
        notes=notes or [],
    )
