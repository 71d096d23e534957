"""A run of two stages around one checkpoint: its model, and the same with a few fields changed.

So a checkpoint changes its shape without a run file: `flm grow base --out grown --model.num_layers 40`.
"""

from __future__ import annotations

from dataclasses import fields

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
        RequestError: the checkpoint does not say what model it is of; or an unknown field, or a value of a wrong type.
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
    of_run = {field.name for field in fields(RunConfig)} - {"stages"}
    values = {path if path.split(".")[0] in of_run else f"stages.1.{path}": v for path, v in given_values(change)}
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
