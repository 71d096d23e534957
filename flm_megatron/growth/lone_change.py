"""A run of two stages around one checkpoint: its model, and the same with a few fields changed.

So a checkpoint changes its shape without a run file: `flm grow base --out grown --model.num_layers 40`.
"""

from __future__ import annotations

from flm_megatron.checkpoint.described import required_model
from flm_megatron.checkpoint.logical import LogicalCheckpoint
from flm_megatron.checkpoint.own_tokenizer import tokenizer_files
from flm_megatron.config.loader import run_from_dict, run_to_dict
from flm_megatron.config.overrides import Overrides, apply_overrides, given_values
from flm_megatron.config.schema import GrowthConfig, RunConfig, StageConfig
from flm_megatron.errors import RequestError
from flm_megatron.growth.foreseen import check_boundary
from flm_megatron.growth.rules import grown_dimensions
from flm_megatron.growth.shrink.rules import smaller_dimensions
from flm_megatron.json_text import JsonObject

OF_RUN = ("tokenizer", "data", "seed", "distributed")
OF_STAGE = ("model", "parallel", "precision", "transformer_engine")
"""Fields of the run, and of the second stage beside its section, that mean something without a run file."""
WITHOUT_MASKS = dict.fromkeys(("hidden", "ffn", "heads", "layers"), "zero")
"""Masks open over the steps of a stage, and here is none."""


def run_of_change(
    source: LogicalCheckpoint, where: str, change: Overrides, section: JsonObject, suffix: str
) -> RunConfig:
    """A run whose first stage is the model of `source` and whose second has the `change`.

    A path of `change` is that of a field of the second stage (`model.num_layers`, `growth.layers`) or of the run
    (`tokenizer`, `data.sequence_length`; without these they are the checkpoint's). `section` are further fields of the
    second stage, below the change; its name is that of the first with `suffix`. `where` names the checkpoint in errors.

    Raises:
        RequestError: the checkpoint does not say what model it is of; a field that means nothing here; or an unknown
            one, or a value of a wrong type.
    """
    model = required_model(source, where)
    before = source.manifest.position.stage or "before"
    document = run_to_dict(RunConfig(stages=[StageConfig(before, model), StageConfig(f"{before}-{suffix}", model)]))
    for stage in document["stages"]:
        stage["tokens"] = 1
    files = tokenizer_files(getattr(source, "path", None), source.manifest)
    document["tokenizer"] = str(files[0]) if files else None
    length = source.manifest.run.sequence_length
    document["data"]["sequence_length"] = min(length, model.max_positions or length)
    document["stages"][1] |= section
    values = {}
    for path, value in given_values(change):
        first = path.split(".")[0]
        if first not in (*OF_RUN, *OF_STAGE, *section):
            fitting = ", ".join(f"--{name}…" for name in (*OF_STAGE, *section, *OF_RUN))
            raise RequestError(f"--{path} means nothing without a run file: give one, or fields of {fitting}")
        values[path if first in OF_RUN else f"stages.1.{path}"] = value
    apply_overrides(document, values)
    return run_from_dict(document, "the options")


def lone_growth(source: LogicalCheckpoint, where: str, change: Overrides) -> RunConfig:
    """`run_of_change` that grows, with `zero` in every dimension for which the change gives no operator.

    Raises:
        RequestError: as `run_of_change`; a `mask`, which opens over the steps of a stage; or nothing grows, or may.
    """
    run = run_of_change(source, where, change, {"growth": dict(WITHOUT_MASKS)}, "grown")
    growth = run.stages[1].growth or GrowthConfig()
    if growth.shrink is None and (masked := [name for name in WITHOUT_MASKS if getattr(growth, name) == "mask"]):
        raise RequestError(
            f"growth.{masked[0]} is `mask`, and masks open over the steps of a stage: give a run file, or use zero or "
            "clone (for layers copy)"
        )
    if not grown_dimensions(run.stages[0].model, run.stages[1].model) and {growth.shrink, growth.rejuvenate} == {None}:
        check_boundary(run, 1)  # it says so if what was to change is what a growth keeps
        raise RequestError(f"nothing of {where} grows: give what does, such as --model.num_layers 40")
    return run


def lone_shrinking(source: LogicalCheckpoint, where: str, change: Overrides) -> RunConfig:
    """`run_of_change` that shrinks.

    Raises:
        RequestError: as `run_of_change`; or nothing shrinks.
    """
    run = run_of_change(source, where, change, {"shrink": {}}, "shrunk")
    if not smaller_dimensions(run.stages[0].model, run.stages[1].model):
        raise RequestError(f"nothing of {where} shrinks: give what does, such as --model.num_layers 20")
    return run
