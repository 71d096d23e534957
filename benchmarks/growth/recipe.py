"""The staged recipe of Tele-FLM-1T in small, whole, against from scratch at the last size with equal FLOPs.

    flm data stdlib --out DATA --vocab-size 512 --max-bytes 40000000
    python -m benchmarks.growth.recipe --data DATA --out OUT [--seeds 1 2 3]

Three stages in the proportions of 52B, 102B and 1T (layers 64 : 80 : 140, width 2 : 2.5 : 5, a wider feed-forward layer
at the last) with their tokens per parameter (38, 2.9 and 0.016), grown by masks with layers chosen by distance. Beside
it, for the same FLOPs: the last model from scratch at three learning rates, and the first two models trained on without
the next growth. Writes results.jsonl and tables.md into OUT; what has a result is not run again.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from benchmarks.growth.study.runs import flm, model_fields, run_head
from benchmarks.growth.study.sizes import SEQUENCE
from flm_megatron.config.schema import ModelConfig, MupConfig
from flm_megatron.json_text import JsonObject
from flm_megatron.model.parameters import parameter_count
from flm_megatron.training.metrics.events import ValidationEvent, read_events
from flm_megatron.training.metrics.flops import training_flops_per_token

HEAD_DIM = 8
TUNED: JsonObject = {"input_mult": 10.0, "matrix_init_std": 0.1}
LR = 1.2e-2
"""Values of tuning.md, at the base width 32."""


@dataclass(frozen=True)
class Size:
    """One model of the recipe: its tokens per parameter are the paper's."""

    layers: int
    hidden: int
    ffn: int
    tokens_per_parameter: float
    batch: int

    def model(self, vocab: int) -> ModelConfig:
        """The model over a vocabulary."""
        return ModelConfig(
            num_layers=self.layers,
            hidden_size=self.hidden,
            ffn_hidden_size=self.ffn,
            num_attention_heads=self.hidden // HEAD_DIM,
            head_dim=HEAD_DIM,
            vocab_size=vocab,
            mup=MupConfig(enabled=True, base_hidden_size=32),
            **TUNED,
        )

    def flops(self, vocab: int) -> float:
        """Training FLOPs per token."""
        return training_flops_per_token(self.model(vocab), SEQUENCE)

    def tokens(self, vocab: int) -> int:
        """The stage's budget."""
        return self.rounded(self.tokens_per_parameter * parameter_count(self.model(vocab)))

    def rounded(self, tokens: float) -> int:
        """Tokens in whole steps, at least one."""
        step = self.batch * SEQUENCE
        return max(1, round(tokens / step)) * step


SIZES = {
    "52B": Size(4, 32, 88, 38.0, 16),
    "102B": Size(5, 40, 106, 2.9, 16),
    "1T": Size(9, 80, 384, 0.0157, 2),
}
RUNS: dict[str, tuple[str, ...]] = {
    "recipe": ("52B", "102B", "1T"),
    "1T from scratch": ("1T",),
    "1T from scratch, half the rate": ("1T",),
    "1T from scratch, twice the rate": ("1T",),
    "52B, 102B, not grown again": ("52B", "102B"),
    "52B, not grown": ("52B",),
}
RATES = {"1T from scratch, half the rate": 0.5, "1T from scratch, twice the rate": 2.0}
"""Multiples of LR: the run from scratch is much shorter than what the values were searched for."""
DECAY, LAST_STAGE_DECAY = 0.2, 0.5
"""Share of the run over which the rate decays, but no more than this share of a grown last stage: new width has to
learn while its masks open."""


def document(name: str, seed: int, vocab: int, data: Path, output: Path) -> JsonObject:
    """The run file: the last stage takes what the recipe's FLOPs leave to it."""
    left = sum(size.flops(vocab) * size.tokens(vocab) for size in SIZES.values())
    stages: list[JsonObject] = []
    for key in RUNS[name]:
        size = SIZES[key]
        tokens = size.tokens(vocab) if key != RUNS[name][-1] else size.rounded(left / size.flops(vocab))
        left -= tokens * size.flops(vocab)
        stages.append(
            {
                "name": key,
                "model": model_fields(size.model(vocab)),
                "global_batch": size.batch,
                "micro_batch": size.batch,
                "tokens": tokens,
                **({"growth": {"certify_samples": 0}} if stages else {}),
            }
        )
    trained = sum(stage["tokens"] for stage in stages)
    decay = min(DECAY, LAST_STAGE_DECAY * stages[-1]["tokens"] / trained) if len(stages) > 1 else DECAY
    return run_head(f"{name} {seed}", seed, data, output) | {
        "defaults": {
            "optimizer": {"lr": LR * RATES.get(name, 1.0), "min_lr": 0.0},
            "schedule": {"kind": "wsd", "boundary": "rewarm", "wsd_decay_fraction": decay},
            "validation": {"samples": 1024},
        },
        "stages": stages,
        "checkpoint": {"keep_last": 1},
    }


def main() -> None:
    """Run what has no result yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder made by `flm data stdlib`")
    parser.add_argument("--out", type=Path, required=True, help="folder for runs and results")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    args = parser.parse_args()
    from flm_megatron.data.tokenizer import open_tokenizer

    vocab = open_tokenizer(str(args.data / "tokenizer.model")).vocab_size
    args.out.mkdir(parents=True, exist_ok=True)
    kept = args.out / "results.jsonl"
    results: list[JsonObject] = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    for seed in args.seeds:
        for name in RUNS:
            if any((r["run"], r["seed"]) == (name, seed) for r in results):
                continue
            results.append(_result(name, seed, vocab, args.data.resolve(), args.out.resolve()))
            with kept.open("a") as file:
                file.write(json.dumps(results[-1]) + "\n")
    (args.out / "tables.md").write_text(table(results) + "\n")
    print(table(results))


def _result(name: str, seed: int, vocab: int, data: Path, out: Path) -> JsonObject:
    """Train one run; its tokens by stage, FLOPs and losses at the stages' ends."""
    folder = out / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    content = document(name, seed, vocab, data, folder)
    run_file = folder / "recipe.yaml"
    run_file.write_text(json.dumps(content, indent=1))
    flm("train", str(run_file))
    tokens = {stage["name"]: stage["tokens"] for stage in content["stages"]}
    flops = sum(SIZES[stage].flops(vocab) * count for stage, count in tokens.items())
    losses = {event.stage: event.loss for event in read_events(folder, ValidationEvent)}
    return {"run": name, "seed": seed, "tokens": tokens, "flops": flops, "losses": losses}


def table(results: list[JsonObject]) -> str:
    """Final losses by run, and what each stage had."""
    rows = ["| run | tokens by stage | FLOPs | loss at each stage's end (mean) | final loss (seeds) |"]
    rows.append("|---|---|---|---|---|")
    for name, stages in RUNS.items():
        own = [r for r in results if r["run"] == name]
        if not own:
            continue
        tokens = ", ".join(f"{own[0]['tokens'][stage]:,}" for stage in stages)
        means = ", ".join(f"{fmean(r['losses'][stage] for r in own):.4f}" for stage in stages)
        final = [r["losses"][stages[-1]] for r in own]
        listed = ", ".join(f"{loss:.4f}" for loss in final)
        rows.append(f"| {name} | {tokens} | {own[0]['flops']:.3g} | {means} | {fmean(final):.4f} ({listed}) |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
