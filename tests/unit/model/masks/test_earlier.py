"""A stage that began with masks at each module of a path goes on with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from flm_megatron.checkpoint.logical import LogicalCheckpoint
from flm_megatron.checkpoint.manifest import Manifest, StagePosition
from flm_megatron.config.schema import ModelConfig, ParallelConfig
from flm_megatron.distributed.world import one_process
from flm_megatron.evaluation.evaluated import EvaluatedCheckpoint
from flm_megatron.evaluation.model import load_model
from flm_megatron.growth.grown.folding import folded
from flm_megatron.model.forward import Batch, forward
from tests.support.checkpoint_cases import edited
from tests.support.growth_cases import MemoryCheckpoint, old_model, plan_for, trained, weights
from tests.support.reference_model import reference_logits

TOKENS = torch.randint(0, 37, (2, 11), generator=torch.Generator().manual_seed(3))
BLOCKS: dict[str, dict[str, Any]] = {
    "teleflm": {},
    "gpt3": {"normalization": "layernorm", "activation": "gelu", "bias": True},
}
WRITTEN = {  # every 97th logit at v = 0.5, as commit 6c21263 computed them
    "teleflm": [0.65868, -1.47329, 0.39623, -1.48575, -3.16537, 0.52419, 0.07404, -0.05414, 1.26496],
    "gpt3": [-1.7493, 0.37367, 0.42321, -0.17754, 2.59339, -1.92669, 2.11136, -1.88418, 0.56549],
}


def half_open(case: str, block: str) -> tuple[MemoryCheckpoint, ModelConfig]:
    """A checkpoint at v = 0.5 with random weights, whose plan says nothing of masked paths."""
    plan = plan_for(case, "mask", old_model(**BLOCKS[block]))
    checkpoint = trained(plan.new, torch.float32)
    stored = {name: value for name, value in plan.to_json().items() if name != "masked_paths"}
    checkpoint.manifest = edited(Manifest(position=StagePosition(2, stage="big")), growth={"plan": stored})
    return checkpoint, plan.new


def logits(checkpoint: LogicalCheckpoint, model: ModelConfig) -> torch.Tensor:
    """Logits [batch, sequence, vocabulary] of TOKENS through the engine, masks included."""
    none: Any = None  # a forward pass needs no tokenizer
    evaluated = EvaluatedCheckpoint(Path("memory"), checkpoint, model, none, "fp32", 16)
    with one_process():
        return forward(load_model(evaluated, ParallelConfig()), [Batch(TOKENS)], 1, lambda _, x: x.clone())[0]


@pytest.mark.parametrize("block", BLOCKS)
def test_it_computes_what_it_computed(block: str) -> None:
    found = logits(*half_open("all", block)).flatten()[::97]
    torch.testing.assert_close(found, torch.tensor(WRITTEN[block]), rtol=0, atol=5e-5)


@pytest.mark.parametrize("case", ["ffn", "heads_and_groups"])
def test_its_masks_are_folded_where_they_lie(case: str) -> None:
    checkpoint, model = half_open(case, "gpt3" if case == "heads_and_groups" else "teleflm")
    inside = reference_logits(model, weights(folded(checkpoint, fold=True), model), TOKENS)
    torch.testing.assert_close(inside.float(), logits(checkpoint, model), rtol=0, atol=5e-5)
