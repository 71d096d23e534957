"""Rules on the parallel layout of a stage: each says in one line what does not fit, or gives None.

They take the sequence length of the run and the number of processes, which is none where it is not known yet.
"""

from __future__ import annotations

from flm_megatron.config.ranges import LARGEST_COUNT, LARGEST_WORLD, out_of_range
from flm_megatron.config.rules.distillation import teacher_layout_fits
from flm_megatron.config.rules.pipeline import pipeline_split
from flm_megatron.config.rules.precision import PRECISION_RULES
from flm_megatron.config.schema import ParallelConfig, StageConfig
from flm_megatron.errors import RequestError

SIZES = ("tensor", "pipeline", "virtual_pipeline", "data", "context", "expert")


def data_parallel_size(parallel: ParallelConfig, world_size: int | None) -> int | None:
    """Data-parallel size: as given, or what is left of the world; none where neither is known."""
    if parallel.data is not None or world_size is None:
        return parallel.data
    return world_size // parallel.model_size


def layout_sizes_are_counts(stage: StageConfig) -> list[str]:
    """Parallel sizes and batches are at least 1, and not beyond reason."""
    values = {f"parallel.{name}": (getattr(stage.parallel, name), 1, LARGEST_WORLD) for name in SIZES}
    values["micro_batch"] = (stage.micro_batch, 1, LARGEST_COUNT)
    values["global_batch"] = (stage.global_batch, 1, LARGEST_COUNT)
    return out_of_range(values)


def context_is_not_offered(stage: StageConfig, sequence_length: int, world_size: int | None) -> str | None:
    """Context parallelism needs Transformer Engine's attention."""
    if stage.parallel.context > 1:
        return f"parallel.context is {stage.parallel.context}: context parallelism is not offered, set it to 1"
    return None


def expert_is_not_offered(stage: StageConfig, sequence_length: int, world_size: int | None) -> str | None:
    """The models here have no experts."""
    if stage.parallel.expert > 1:
        return f"parallel.expert is {stage.parallel.expert}: expert parallelism is not offered, set it to 1"
    return None


def tensor_divides_model(stage: StageConfig, sequence_length: int, world_size: int | None) -> str | None:
    """Every tensor-parallel rank holds whole heads, whole query groups and an equal shard of the feed-forward layer."""
    tensor, model = stage.parallel.tensor, stage.model
    values = {
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.query_groups,
        "ffn_hidden_size": model.ffn_hidden_size,
    }
    wrong = [f"{name} {value}" for name, value in values.items() if value % tensor]
    if wrong:
        verb = "does" if len(wrong) == 1 else "do"
        return f"model.{' and '.join(wrong)} {verb} not divide by parallel.tensor {tensor}: change one of them"
    return None


def sequence_needs_tensor(stage: StageConfig, sequence_length: int, world_size: int | None) -> str | None:
    """Sequence parallelism splits within tensor groups."""
    if stage.parallel.sequence and stage.parallel.tensor == 1:
        return "parallel.sequence is true with parallel.tensor 1: set it to false, or tensor to 2 or more"
    return None


def tensor_divides_sequence(stage: StageConfig, sequence_length: int, world_size: int | None) -> str | None:
    """Under sequence parallelism every tensor-parallel rank holds an equal shard of the sequence."""
    tensor = stage.parallel.tensor
    if stage.parallel.sequence and sequence_length % tensor:
        return (
            f"data.sequence_length {sequence_length} does not divide by parallel.tensor {tensor}, "
            "as parallel.sequence needs: change one of the three"
        )
    return None


def layers_fit_pipeline(stage: StageConfig, sequence_length: int, world_size: int | None) -> str | None:
    """The layers can be split over the pipeline, as `pipeline_layers` says or evenly."""
    try:
        pipeline_split(stage.model.num_layers, stage.parallel)
    except RequestError as error:
        return f"parallel: {error}"
    return None


def world_is_the_product(stage: StageConfig, sequence_length: int, world_size: int | None) -> str | None:
    """Processes = tensor x pipeline x data."""
    parallel = stage.parallel
    if world_size is None:
        return None
    product = f"parallel.tensor {parallel.tensor} x pipeline {parallel.pipeline}"
    if world_size % parallel.model_size:
        return f"{world_size} processes do not divide by {product} = {parallel.model_size}: change one of the three"
    if parallel.data is not None and world_size != parallel.processes:
        return (
            f"{world_size} processes are not {product} x data {parallel.data} = {parallel.processes}: "
            "start as many, or leave parallel.data out"
        )
    return None


def batch_divides(stage: StageConfig, sequence_length: int, world_size: int | None) -> str | None:
    """Every data-parallel rank has the same number of whole micro-batches."""
    data = data_parallel_size(stage.parallel, world_size) or 1
    if stage.global_batch % (stage.micro_batch * data):
        return (
            f"global_batch {stage.global_batch} does not divide by micro_batch {stage.micro_batch} x data-parallel "
            f"size {data} = {stage.micro_batch * data}: change one of the three"
        )
    return None


def interleaving_divides(stage: StageConfig, sequence_length: int, world_size: int | None) -> str | None:
    """The interleaved schedule runs micro-batches in groups of the pipeline size."""
    data = data_parallel_size(stage.parallel, world_size)
    pipeline = stage.parallel.pipeline
    if stage.parallel.virtual_pipeline == 1 or not data:
        return None
    micro_batches = stage.global_batch // (stage.micro_batch * data)
    if micro_batches % pipeline:
        return (
            f"global_batch {stage.global_batch} makes {micro_batches} micro-batches on each of {data} data-parallel "
            f"ranks, not a multiple of pipeline {pipeline} as virtual_pipeline {stage.parallel.virtual_pipeline} needs"
        )
    return None


def gather_needs_sharding(stage: StageConfig, sequence_length: int, world_size: int | None) -> str | None:
    """Only the distributed optimizer gathers parameters, and it overlaps that together with the gradients."""
    parallel = stage.parallel
    if not parallel.overlap_param_gather:
        return None
    for name in ("distributed_optimizer", "overlap_grad_reduce"):
        if not getattr(parallel, name):
            return f"parallel.overlap_param_gather needs parallel.{name}: set both to true, or this one to false"
    return None


LAYOUT_RULES = (
    context_is_not_offered,
    expert_is_not_offered,
    tensor_divides_model,
    sequence_needs_tensor,
    tensor_divides_sequence,
    layers_fit_pipeline,
    world_is_the_product,
    batch_divides,
    interleaving_divides,
    gather_needs_sharding,
    teacher_layout_fits,
    *PRECISION_RULES,
)
