"""What is planned of a rank's step is what the program does: operations and bytes to the last one, memory nearly so."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from flm_megatron.config.schema import (
    DataConfig,
    KernelsConfig,
    LoraConfig,
    ModelConfig,
    ParallelConfig,
    RunConfig,
    StageConfig,
)
from flm_megatron.planner.layout import CUDA, as_chosen, stage_workload
from flm_megatron.planner.rehearsal.against_plan import RoleCheck, check_role, verification_data, verification_text
from flm_megatron.planner.rehearsal.rank import rehearse_rank
from flm_megatron.planner.rehearsal.roles import global_rank, roles

MODEL = ModelConfig(num_layers=4, hidden_size=256, ffn_hidden_size=688, num_attention_heads=4, vocab_size=2000)
GPT = replace(MODEL, normalization="layernorm", activation="gelu", bias=True, position="xpos", query_key_norm=True)
ADAPTED = replace(MODEL, lora=LoraConfig(rank=8))
WINDOWED = replace(MODEL, sliding_window=64, num_query_groups=2, qkv_bias=True, query_key_norm=True)
PARALLEL = replace(WINDOWED, parallel_residual=True, rotary_percent=0.25)
NEOX = replace(PARALLEL, normalization="layernorm", activation="gelu", bias=True, qkv_bias=False)
TIED = replace(MODEL, tie_embeddings=True)
GPT2 = replace(
    TIED, normalization="layernorm", activation="gelu_tanh", bias=True, position="learned", max_positions=300
)
GEMMA = replace(TIED, activation="geglu", head_dim=80, input_mult=16.0)
WIDE = replace(MODEL, vocab_size=1_200_000)
"""Its logits are large as a whole, and not on the part of a sequence that a rank has."""
FUSED = KernelsConfig(head_and_loss="fused")
SEQUENCE = 256


def checks(parallel: ParallelConfig, gpus: int, kernels: KernelsConfig | None = None, **fields: Any) -> list[RoleCheck]:
    """Every role of a stage of eight or more micro-batches of two samples, rehearsed in this process."""
    stage = StageConfig(model=MODEL, parallel=parallel, global_batch=32, micro_batch=2, precision="bf16", tokens=10**7)
    stage = replace(stage, **fields)
    kernels = kernels or KernelsConfig()
    run = RunConfig(data=DataConfig(sequence_length=SEQUENCE), stages=[stage], kernels=kernels)
    work = stage_workload(stage, SEQUENCE, gpus, as_chosen(CUDA, kernels))
    return [
        check_role(
            work,
            rehearse_rank(run, stage, global_rank(parallel, gpus, role.pipeline_ranks[0]), gpus),
            stage.name,
            role.name,
        )
        for role in roles(stage.model, parallel)
    ]


def case(name: str, parallel: ParallelConfig, gpus: int, slow: bool = True, **fields: Any) -> Any:
    """A layout and what is special about its stage."""
    return pytest.param(parallel, gpus, fields, id=name, marks=[pytest.mark.slow] if slow else [])


P = ParallelConfig
CASES = [
    case("sequence and pipeline", P(tensor=2, pipeline=2, sequence=True), 8, False, recompute="selective"),
    case("chunks that overlap", P(pipeline=2, virtual_pipeline=2, overlap_grad_reduce=True), 4, False, model=PARALLEL),
    case("one after the other", P(pipeline=2, virtual_pipeline=2, overlap_grad_reduce=True), 4, model=WINDOWED),
    case("parallel residual", P(tensor=2, pipeline=2, sequence=True), 4, model=NEOX, recompute="selective"),
    case("both ends of a pipeline", P(tensor=2, pipeline=2), 8, model=TIED),
    case("learned positions", P(tensor=2, pipeline=2, sequence=True), 8, model=GPT2, recompute="selective"),
    case("learned positions alone", P(tensor=2), 4, model=GPT2),
    case("gated by GELU", P(tensor=2, pipeline=2, sequence=True), 4, model=GEMMA, fp8="tensorwise"),
    case("copies without shards", P(pipeline=2, distributed_optimizer=False), 4, model=TIED),
    case("tied chunks", P(pipeline=2, virtual_pipeline=2, overlap_grad_reduce=True), 4, model=TIED),
    case("tied alone", P(tensor=2), 4, model=TIED, recompute="selective"),
    case("replicas", P(tensor=2, distributed_optimizer=False), 4, False, model=GPT, recompute="full"),
    case("adapters", P(tensor=2, sequence=True), 2, False, model=ADAPTED, recompute="selective", fp8="tensorwise"),
    case("one operation", P(tensor=2, sequence=True), 2, False, model=WIDE),
    case("alone", P(), 1),
    case("tensor", P(tensor=4), 4, recompute="full"),
    case("no layers", P(tensor=2, sequence=True), 4, model=replace(MODEL, num_layers=0), recompute="selective"),
    case("middle ranks", P(tensor=2, pipeline=4, sequence=True), 8, model=GPT, recompute="full"),
    case("more chunks", P(pipeline=4, virtual_pipeline=2), 8, model=replace(MODEL, num_layers=8)),
    case("uneven", P(tensor=2, pipeline=2, pipeline_layers=[1, 3]), 4, model=replace(MODEL, num_query_groups=2)),
    case("gathering that overlaps", P(tensor=2, overlap_grad_reduce=True, overlap_param_gather=True), 4),
    case("replicas of chunks", P(pipeline=2, virtual_pipeline=2, distributed_optimizer=False), 4),
    case("adapters without sequence", P(tensor=2), 2, model=ADAPTED, recompute="full", kernels=FUSED),
    case("fp32", P(tensor=2, pipeline=2, sequence=True), 4, precision="fp32"),
    case("rows in FP8", P(tensor=2, pipeline=2, sequence=True), 4, fp8="rowwise", recompute="selective"),
]


@pytest.mark.parametrize(("parallel", "gpus", "fields"), CASES)
def test_every_role_does_what_is_planned(parallel: ParallelConfig, gpus: int, fields: dict[str, Any]) -> None:
    for check in checks(parallel, gpus, **fields):
        assert check.flops == check.planned_flops, check
        assert check.traffic == check.planned_traffic, check
        assert abs(check.difference) < 0.06, check  # of a model so small, temporaries are a part


def test_what_differs_is_named_with_both_figures() -> None:
    traffic = {("all-gather", 2): (3, 4000), ("send", 4): (1, 8)}
    check = RoleCheck("one", "first", 0, 2**30, 2**30, {"attention": 10}, {"attention": 10}, traffic, traffic)
    assert verification_text([check]).endswith(" +0.0%  equal      equal")
    odd = replace(check, flops={"attention": 11}, traffic={("all-gather", 2): (3, 4002), ("broadcast", 1): (1, 4)})
    assert odd.differing_flops == ["attention"]
    assert odd.differing_traffic == [("all-gather", 2), ("send", 4), ("broadcast", 1)]
    assert verification_text([odd]).splitlines()[2:] == [
        "one    first              0     1.00       1.00       +0.0%  1 differ   3 differ",
        "one, first: 10 FLOPs of attention planned, 11 done",
        "one, first: all-gather of 2 ranks: 3 of 4,000 bytes together planned, 3 of 4,002 bytes together done",
        "one, first: send of 4 ranks: 1 of 8 bytes together planned, none done",
        "one, first: broadcast of 1 ranks: none planned, 1 of 4 bytes together done",
    ]
    (data,) = verification_data([odd])
    assert data["flops"] == {"planned": {"attention": 10}, "rehearsed": {"attention": 11}}
    assert data["transfers"]["rehearsed"][1] == {"kind": "broadcast", "ranks": 1, "count": 1, "bytes": 4}  # type: ignore[index]
