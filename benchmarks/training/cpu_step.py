"""One training step on one CPU process, side by side with `transformers` Llama of the same shape.

    OMP_NUM_THREADS=2 python benchmarks/training/cpu_step.py

Both models hold fp32 weights of the same shape and take the same tokens in turn, A B A B, so that a change of the
machine's speed meets both. `transformers` runs scaled dot-product attention and torch's fused AdamW with gradient
clipping; ours runs the whole training step of `flm train` on one process. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable

import torch

from flm_megatron.config.schema import DistributedConfig, ModelConfig, ParallelConfig, StageConfig
from flm_megatron.training.parallel import layout, world

MODEL = ModelConfig(num_layers=6, hidden_size=512, ffn_hidden_size=1344, num_attention_heads=8, vocab_size=8064)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=15, help="measured steps of each (default: 15)")
    parser.add_argument("--sequence", type=int, default=512, help="tokens in a sample (default: 512)")
    parser.add_argument("--batch", type=int, default=4, help="samples in a step (default: 4)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, world(DistributedConfig(), 0, 1, f"file://{folder}/store"):
        stage = StageConfig(model=MODEL, parallel=ParallelConfig(), micro_batch=args.batch, global_batch=args.batch)
        with layout(stage.parallel, 600):
            ours, theirs = engine_step(stage, args.sequence), transformers_step(args.sequence)
            times = [measure(ours, theirs, args) for _ in range(args.steps + 2)][2:]
    report(times, args)


def measure(
    ours: Callable[[torch.Tensor], None], theirs: Callable[[torch.Tensor], None], args: argparse.Namespace
) -> tuple[float, float]:
    """Seconds of one step of each on the same tokens."""
    text = torch.randint(MODEL.vocab_size or 0, (args.batch, args.sequence + 1))
    return seconds(ours, text), seconds(theirs, text)


def seconds(step: Callable[[torch.Tensor], None], text: torch.Tensor) -> float:
    """Wall time of one call."""
    began = time.perf_counter()
    step(text)
    return time.perf_counter() - began


def engine_step(stage: StageConfig, sequence: int) -> Callable[[torch.Tensor], None]:
    """Our training step."""
    from flm_megatron.checkpoint.engine import load_state
    from flm_megatron.checkpoint.initial import InitialCheckpoint
    from flm_megatron.optim.learning_rate import set_learning_rates
    from flm_megatron.training.step import Engine

    engine = Engine(stage, sequence)
    load_state(InitialCheckpoint(stage.model, 1), engine.chunks, engine.optimizer)
    set_learning_rates(engine.optimizer, stage, 1e-4)

    def step(text: torch.Tensor) -> None:
        positions = torch.arange(sequence).expand(len(text), sequence)
        mask = torch.ones(len(text), sequence)
        batch = {"tokens": text[:, :-1], "labels": text[:, 1:], "position_ids": positions, "loss_mask": mask}
        engine.train_step([batch])

    return step


def transformers_step(sequence: int) -> Callable[[torch.Tensor], None]:
    """The same step with `transformers`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=MODEL.vocab_size,
        hidden_size=MODEL.hidden_size,
        intermediate_size=MODEL.ffn_hidden_size,
        num_hidden_layers=MODEL.num_layers,
        num_attention_heads=MODEL.num_attention_heads,
        max_position_embeddings=sequence,
        attn_implementation="sdpa",
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step(text: torch.Tensor) -> None:
        optimizer.zero_grad()
        logits = model(text[:, :-1]).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), text[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def report(times: list[tuple[float, float]], args: argparse.Namespace) -> None:
    """Print medians and the median ratio of pairs."""
    ours, theirs = (statistics.median(column) for column in zip(*times, strict=True))
    ratio = statistics.median(a / b for a, b in times)
    print(f"{args.steps} steps each, batch {args.batch} x {args.sequence} tokens, {torch.get_num_threads()} threads\n")
    print("| program | median step, s |\n|---|---|")
    print(f"| flm_megatron | {ours:.3f} |\n| transformers Llama (SDPA, fused AdamW) | {theirs:.3f} |")
    print(f"\nMedian ratio of pairs: {ratio:.3f}")


if __name__ == "__main__":
    main()
