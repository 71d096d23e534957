"""Benchmarks that run models: the command over two processes, waiting for a slow one, and other programs' steps."""

from __future__ import annotations

import json
import math
import sys
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from flm_megatron.config.schema import KernelsConfig, ModelConfig, ParallelConfig, StageConfig
from flm_megatron.config.schema.stage import Precision
from flm_megatron.model.parameters import parameter_count
from tests.support.pool import Pool
from tests.support.runs import flm

MODEL = ModelConfig(num_layers=2, hidden_size=64, ffn_hidden_size=96, num_attention_heads=4, vocab_size=512)
STAGE = StageConfig(name="small", model=MODEL, micro_batch=2, global_batch=4)
SEQUENCE = 32
PEERS = ["transformers", "bare-megatron"] + (["torchtitan"] if find_spec("torchtitan") else [])

RUN = """
data: {sequence_length: 32}
stages:
  - name: small
    model: {num_layers: 8, hidden_size: 64, ffn_hidden_size: 96, num_attention_heads: 4}
    parallel: {tensor: 2, sequence: true}
    recompute: full
    micro_batch: 2
    global_batch: 4
"""


def test_the_command_measures_a_layer_stack_under_its_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(RUN)
    options = ["--stage", "small", "--layers", "2", "--steps", "3", "--warmup", "1", "--profile", "1"]
    monkeypatch.setattr(sys, "argv", ["flm", "bench", str(path)])
    ended = flm("bench", path, *options, "--out", tmp_path / "out")
    assert ended.returncode == 0, ended.stderr
    written = json.loads((tmp_path / "out" / "bench-small.json").read_text())
    assert (tmp_path / "out" / "bench-small.svg").exists()
    assert (tmp_path / "out" / "bench-small.md").read_text().startswith(ended.stdout.split("\nwritten")[0].strip())
    (found,) = written["measurements"]
    assert "2 layers" in written["model"]
    assert found["layout"] == "tensor 2 + sequence x pipeline 1 x data 1"
    assert (found["processes"], len(found["step_times_s"])) == (2, 3)
    assert found["step_tokens"] == 4 * 32
    # One more forward pass of the layers, on top of three of everything.
    assert 1.2 < found["hardware_flops_per_token"] / found["model_flops_per_token"] < 4 / 3
    assert 0 < found["planned_gib"] < found["memory_gib"] + 0.01
    assert all(found["parts_s"][part] > 0 for part in ("attention", "MLP", "norms", "head and loss", "optimizer"))
    assert "bench" in written["environment"]["command"]


def wait_for_rank_0() -> dict[str, float]:
    """Parts of a step in which rank 0 comes late to a sum."""
    import torch
    import torch.distributed as dist

    from flm_megatron.benchmarking.parts import profile_parts

    def step(batches: list[dict[str, torch.Tensor]]) -> float:
        if dist.get_rank() == 0:
            time.sleep(0.5)
        dist.all_reduce(torch.ones(1))
        return 0.0

    dist.barrier()
    with torch.profiler.profile():  # the first profile of a process takes its time
        dist.barrier()
    return profile_parts([], step, [], 1)


def test_waiting_for_another_process_is_communication(pool: Pool) -> None:
    late, waiting = pool.run(2, wait_for_rank_0)
    assert waiting["communication"] > 0.4
    assert late["communication"] < waiting["communication"] / 2
    assert late["idle"] > 0.45


def train_in_every_program(stage: StageConfig) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Losses of a few steps on the same tokens in each program, and parameters of other programs' models."""
    from flm_megatron.benchmarking.measure import PROGRAM
    from flm_megatron.benchmarking.peers.compare import BUILDERS
    from flm_megatron.benchmarking.steps import synthetic_batches
    from flm_megatron.distributed.world import layout
    from flm_megatron.engine.prepare import prepare

    prepare()
    batches = synthetic_batches(stage, SEQUENCE, 1)
    with layout(ParallelConfig(), 120):
        steps = {name: build(stage, SEQUENCE) for name, build in BUILDERS.items() if name in (PROGRAM, *PEERS)}
        # In turn, as they are measured: none may change what another one runs.
        losses = [[step(batches) for step in steps.values()] for _ in range(4)]
        return dict(zip(steps, map(list, zip(*losses, strict=True)), strict=True)), count_parameters(stage)


def rope_frequencies() -> dict[str, list[float]]:
    """Radians per position of each pair of a head's channels, in models of other programs."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from flm_megatron.benchmarking.peers.bare_megatron import bare_model
    from flm_megatron.benchmarking.peers.peer import llama_fields
    from flm_megatron.distributed.world import layout
    from flm_megatron.engine.prepare import prepare

    stage = replace(STAGE, model=replace(MODEL, rope_theta=500.0))
    prepare()
    with layout(ParallelConfig(), 120):
        bare = bare_model(stage, SEQUENCE).rotary_pos_emb.inv_freq.tolist()
    llama = LlamaForCausalLM(LlamaConfig(**llama_fields(stage.model, SEQUENCE)))
    return {"bare-megatron": bare, "transformers": llama.model.rotary_emb.inv_freq.tolist()}


def test_every_program_turns_by_the_rope_of_the_run_file(pool: Pool) -> None:
    (found,) = pool.run(1, rope_frequencies)
    for program, frequencies in found.items():
        assert frequencies == pytest.approx([500.0 ** (-channel / 16) for channel in range(0, 16, 2)]), program


def count_parameters(stage: StageConfig) -> dict[str, int]:
    """Parameters of each program's model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from flm_megatron.benchmarking.peers.bare_megatron import bare_model
    from flm_megatron.benchmarking.peers.peer import llama_fields

    models: dict[str, Any] = {
        "bare-megatron": bare_model(stage, SEQUENCE),
        "transformers": LlamaForCausalLM(LlamaConfig(**llama_fields(stage.model, SEQUENCE))),
    }
    if "torchtitan" in PEERS:
        from flm_megatron.benchmarking.peers.torchtitan import titan_config

        models["torchtitan"] = titan_config(stage, SEQUENCE).build()
    return {name: sum(parameter.numel() for parameter in model.parameters()) for name, model in models.items()}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_program_trains_the_same_model(pool: Pool, precision: Precision) -> None:
    """Small random weights predict every token alike, and a few steps on the same tokens are learned from."""
    stage = replace(STAGE, precision=precision, optimizer=replace(STAGE.optimizer, lr=3e-3))
    ((losses, parameters),) = pool.run(1, train_in_every_program, stage)
    assert parameters == dict.fromkeys(PEERS, parameter_count(MODEL))
    assert set(losses) == {"flm_megatron", *PEERS}
    for program, values in losses.items():
        assert values[0] == pytest.approx(math.log(512), rel=0.02), program
        assert values[-1] < values[0], program


def compare_with_transformers() -> list[dict[str, object]]:
    """A short comparison in a world of one process."""
    from flm_megatron.benchmarking.peers.compare import measure_side_by_side
    from flm_megatron.benchmarking.workload import Request
    from flm_megatron.distributed.world import layout
    from flm_megatron.engine.prepare import prepare

    prepare()
    with layout(ParallelConfig(), 120):
        return measure_side_by_side(Request(STAGE, SEQUENCE, KernelsConfig(), steps=3, warmup=1), ["transformers"])


def test_programs_are_measured_on_the_same_steps(pool: Pool) -> None:
    from flm_megatron.benchmarking.peers.compare import ratios
    from flm_megatron.benchmarking.result import Measurement

    (found,) = pool.run(1, compare_with_transformers)
    ours, theirs = (Measurement(**values) for values in found)
    assert (ours.program, theirs.program) == ("flm_megatron", "transformers")
    assert ours.step_tokens == theirs.step_tokens == 4 * SEQUENCE
    assert len(ours.step_times_s) == len(theirs.step_times_s) == 3
    pairs = sorted(b / a for a, b in zip(ours.step_times_s, theirs.step_times_s, strict=True))
    assert ratios([ours, theirs]) == {"transformers": pairs[1]}
