"""The parts of a new run file: what is chosen for the machine, and why, as lines of YAML with comments."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache

from flm_megatron.api.new_run.shapes import usual_rate
from flm_megatron.config.fields import all_fields
from flm_megatron.config.schema import StageConfig
from flm_megatron.errors import RequestError
from flm_megatron.model.parameters import parameter_count
from flm_megatron.planner.machine import Machine
from flm_megatron.planner.search import describe, search, smallest_fit
from flm_megatron.training.metrics.log import short

MODEL_FIELDS = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups")
TOKENS_PER_PARAMETER = 20
WARMUP_SHARE = 0.01
GOODPUT = 0.9
"""Share of the hours that goes into steps that count."""


@dataclass(frozen=True)
class Layout:
    """How a stage is laid out, why, and the tokens a second of one device, where a machine is planned for."""

    fields: Mapping[str, object]
    micro_batch: int
    recompute: str
    why: str
    tokens_per_s_per_device: float | None = None


@cache
def _help() -> dict[str, str]:
    return {field.path: field.help for field in all_fields()}


def about(path: str) -> str:
    """What a field is for: the first sentence of its help text."""
    text = " ".join(_help()[path].split())
    first = re.split(r"(?<=[.;:])\s", text)[0].rstrip(".;:")
    return first if first.split()[0][1:] != first.split()[0][1:].lower() else first[:1].lower() + first[1:]


def commented(line: str, why: str) -> str:
    """A line of YAML and why it is so, beside it."""
    return f"{line}  # {why}"


def layout_on(stage: StageConfig, length: int, machine: Machine | None, gpus: int) -> Layout:
    """The fastest layout of `gpus` accelerators that fits, or data parallelism alone on processors.

    Raises:
        RequestError: no layout fits; the message says on how many it would.
    """
    if machine is None:
        per_rank = stage.global_batch // gpus
        micro = max(size for size in (1, 2, 4, 8) if per_rank % size == 0)
        why = "processors: data parallelism alone; sizes beyond 1 are tried here as on a cluster"
        return Layout({"data": gpus}, micro, "none", why)
    found = search(stage, length, machine, gpus).candidates
    if not found:
        least = smallest_fit(stage, length, machine)
        more = f"it would on {least.world_size:,}" if least else "nor on any number of them"
        raise RequestError(
            f"{short(parameter_count(stage.model))} parameters do not fit on {gpus:,} {machine.name}: {more}"
        )
    best = found[0]
    parallel = best.work.parallel
    fields = {
        "tensor": parallel.tensor,
        "pipeline": parallel.pipeline,
        "virtual_pipeline": parallel.virtual_pipeline,
        "sequence": parallel.tensor > 1 and length % parallel.tensor == 0,
    }
    kept = {name: value for name, value in fields.items() if value not in (1, False)}
    why = (
        f"fastest of {len(found)} layouts that fit, by `flm plan --search`: {describe(best.work)}; "
        f"{best.memory_gib:.0f} of {machine.hardware.memory_gib:.0f} GiB, "
        f"{short(best.tokens_per_s_per_device)} tokens/s/device"
    )
    return Layout(kept, best.work.micro_batch, best.work.recompute, why, best.tokens_per_s_per_device)


def batch_for(parameters: int, length: int, gpus: int, wanted: int | None = None) -> int:
    """Samples of a step: what a preset wants, or about half a million tokens at 1B parameters, and more with the
    square root of the size; a multiple of the devices, so that any layout divides it."""
    usual = 5e5 * math.sqrt(parameters / 1e9) / length
    target = wanted or max(8, round(usual))
    return math.ceil(target / gpus) * gpus


def sequence_length_for(parameters: int, gpu: bool) -> int:
    """Tokens of a sample."""
    if not gpu:
        return 128 if parameters < 10**7 else 512
    return 2048 if parameters < 10**9 else 4096


def flow(values: Mapping[str, object]) -> str:
    """A mapping in one line of YAML."""
    shown = (f"{name}: {str(value).lower() if isinstance(value, bool) else value}" for name, value in values.items())
    return f"{{{', '.join(shown)}}}"


def layout_lines(layout: Layout, global_batch: int, length: int) -> Iterator[str]:
    """The fields of a stage that say how it runs."""
    yield commented(f"parallel: {flow(layout.fields)}", layout.why)
    yield commented(f"micro_batch: {layout.micro_batch}", about("stages.micro_batch"))
    yield commented(
        f"global_batch: {global_batch}", f"x {length} tokens = {short(global_batch * length)} tokens a step"
    )
    if layout.recompute != "none":
        yield commented(f"recompute: {layout.recompute}", "memory for arithmetic, as the layout above needs it")


def budget_line(tokens: int, parameters: int, why: str) -> str:
    """The tokens of a stage."""
    return commented(f"tokens: {tokens}", f"{tokens / parameters:.3g} per parameter; {why}")


def optimizer_lines(parameters: int, trained: bool) -> Iterator[str]:
    """Learning rate and what goes with it."""
    rate = usual_rate(parameters) * (0.3 if trained else 1.0)
    why = "GPT-3's table of sizes" + (", a third of it for a model that is trained already" if trained else "")
    values = {"lr": f"{rate:.1e}", "min_lr": f"{rate / 10:.1e}", "weight_decay": 0.1, "betas": "[0.9, 0.95]"}
    yield commented(f"optimizer: {flow(values)}", f"{why}; tune it with `flm mup search`")


def schedule_line(tokens: int, length: int, grows: bool) -> str:
    """How the learning rate goes: up over the first hundredth, and down at the end."""
    samples = max(1, round(WARMUP_SHARE * tokens / length))
    if grows:
        return commented(
            f"schedule: {flow({'kind': 'wsd', 'boundary': 'rewarm'})}", "warm, stable, decay; warmed again after growth"
        )
    values = {"kind": "cosine", "warmup_samples": samples, "decay_tokens": "null"}
    return commented(f"schedule: {flow(values)}", "warm-up over a hundredth of the budget, then down to min_lr")


def model_line(stage: StageConfig) -> str:
    """The sizes of a model."""
    model = {name: size for name in MODEL_FIELDS if (size := getattr(stage.model, name)) is not None}
    return commented(f"model: {flow(model)}", f"{short(parameter_count(stage.model))} parameters")


def with_model(stage: StageConfig, vocab_size: int) -> StageConfig:
    """The stage with a vocabulary, by which it can be counted and planned."""
    return replace(stage, model=replace(stage.model, vocab_size=stage.model.vocab_size or vocab_size))
