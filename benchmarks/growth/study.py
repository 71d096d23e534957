"""Does growth pay? Validation loss against training FLOPs: from scratch, and grown by zero, mask and plain copies.

    flm data stdlib --out DATA --vocab-size 1024
    python benchmarks/growth/study.py --data DATA --out OUT [--seeds 1 2 3] [--tokens 4000000]

Every arm spends the FLOPs that the large model takes for --tokens. The grown arms spend a quarter of them (others: see
ARMS) on a smaller model: narrower and shallower for zero and mask, only shallower for plain copies (G_stack). All share
the data, the seed and muP hyperparameters found at one width. Writes results.json, study.md and study.png into OUT; a
run that is already finished there is not run again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flm_megatron.training.metrics.events import MetricsEvent, StepEvent, ValidationEvent, read_events
from flm_megatron.training.metrics.flops import training_flops_per_token

SEQUENCE, BATCH = 128, 16
HEAD_DIM = 16
DIMENSIONS = "hidden", "ffn", "heads", "layers"
ZERO, MASKED = dict.fromkeys(DIMENSIONS, "zero"), dict.fromkeys(DIMENSIONS, "mask")
SMALL = {"narrow": (2, 2), "shallow": (1, 4), "thin": (2, 1)}
"""By how much a small model's width and depth are below the large one's."""


@dataclass(frozen=True)
class Arm:
    """How one arm grows: out of which shape, by which operators, when, and for how long its masks open."""

    small: str
    growth: dict[str, str]
    grow_at: float = 0.25
    """Share of the FLOPs spent before the growth."""
    mask_share: float = 0.2
    """Share of the large stage in which masks open."""


ARMS: dict[str, Arm | None] = {
    "scratch": None,
    "zero": Arm("narrow", ZERO),
    "mask": Arm("narrow", MASKED),
    "copy": Arm("shallow", {"layers": "copy", "layer_selection": "stack"}),
    "zero, grown at 10%": Arm("narrow", ZERO, grow_at=0.1),
    "zero, grown at 50%": Arm("narrow", ZERO, grow_at=0.5),
    "mask, grown at 10%": Arm("narrow", MASKED, grow_at=0.1),
    "zero in depth": Arm("shallow", ZERO),
    "mask in depth": Arm("shallow", MASKED),
    "zero in width": Arm("thin", ZERO),
    "mask in width": Arm("thin", MASKED),
    "mask over 5%": Arm("narrow", MASKED, mask_share=0.05),
    "mask over 50%": Arm("narrow", MASKED, mask_share=0.5),
}
MAIN_ARMS = ["scratch", "zero", "mask", "copy"]
Curve = list[tuple[float, float]]
"""(FLOPs, validation loss) in order."""


def run_document(arm: str, seed: int, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The run file of one arm."""
    stages = [stage("large", shape("large", args), args.tokens, "cosine")]
    choice = ARMS[arm]
    if choice is not None:
        total = args.tokens * flops(shape("large", args), args)
        first = int(choice.grow_at * total / flops(shape(choice.small, args), args))
        rest = int((1 - choice.grow_at) * args.tokens)
        large = stage("large", shape("large", args), rest, "cosine")
        steps = max(1, int(choice.mask_share * rest / (SEQUENCE * BATCH)))
        large["growth"] = {"layer_selection": "interleave", "mask_steps": steps, "certify_samples": 0, **choice.growth}
        stages = [stage("small", shape(choice.small, args), first, "constant"), large]
    return {
        "name": arm,
        "output": str(folder),
        "seed": seed,
        "tokenizer": f"{args.data}/tokenizer.model",
        "data": {
            "sequence_length": SEQUENCE,
            "train": [{"path": f"{args.data}/train"}],
            "validation": [{"path": f"{args.data}/validation"}],
        },
        "defaults": {
            "global_batch": BATCH,
            "micro_batch": BATCH,
            "optimizer": {"lr": args.lr, "matrix_lr": args.matrix_lr, "min_lr": args.lr / 10},
            "validation": {"interval_steps": args.interval, "samples": 64},
        },
        "stages": stages,
        "logging": {"interval_steps": 100, "tensorboard": False},
        "checkpoint": {"keep_last": 1},
    }


def shape(size: str, args: argparse.Namespace) -> dict[str, Any]:
    """Model fields of the large model or one of SMALL."""
    width, depth = SMALL.get(size, (1, 1))
    hidden = args.hidden // width
    return {
        "num_layers": args.layers // depth,
        "hidden_size": hidden,
        "ffn_hidden_size": hidden * 8 // 3,
        "num_attention_heads": hidden // HEAD_DIM,
        "mup": {"enabled": True, "base_hidden_size": args.hidden // 2},
    }


def stage(name: str, model: dict[str, Any], tokens: int, kind: str) -> dict[str, Any]:
    """A stage with a warm-up over a twentieth of it."""
    schedule = {"kind": kind, "warmup_tokens": tokens // 20, "boundary": "restart"}
    return {"name": name, "model": model, "tokens": tokens, "schedule": schedule}


def flops(model: dict[str, Any], args: argparse.Namespace) -> float:
    """Training FLOPs per token."""
    from flm_megatron.config.schema import ModelConfig
    from flm_megatron.data.tokenizer import Tokenizer

    vocab = Tokenizer(f"{args.data}/tokenizer.model").vocab_size
    return training_flops_per_token(ModelConfig(**model, vocab_size=vocab), SEQUENCE)


def train(arm: str, seed: int, args: argparse.Namespace) -> Curve:
    """Train one arm under one seed, unless it is trained already; its curve."""
    folder = Path(args.out) / f"{arm.translate(str.maketrans(' ', '-', ',%'))}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    run_file = folder / "study.yaml"
    run_file.write_text(json.dumps(run_document(arm, seed, args, folder)))  # JSON is YAML
    subprocess.run([sys.executable, "-m", "flm_megatron.cli.main", "train", str(run_file)], check=True)
    choice = ARMS[arm]
    sizes = {"large": "large"} if choice is None else {"small": choice.small, "large": "large"}
    per_token = {name: flops(shape(size, args), args) for name, size in sizes.items()}
    return curve(read_events(folder, MetricsEvent), per_token)


def curve(events: list[MetricsEvent], per_token: dict[str, float]) -> Curve:
    """Validation loss against FLOPs spent."""
    found: Curve = []
    spent, tokens = 0.0, 0
    for event in events:
        if not isinstance(event, StepEvent | ValidationEvent):
            continue
        spent += (event.tokens - tokens) * per_token[event.stage]
        tokens = event.tokens
        if isinstance(event, ValidationEvent):
            found.append((spent, event.loss))
    return found


def reached(points: Curve, loss: float) -> float | None:
    """FLOPs at which a curve first comes down to `loss`, interpolated; none if it does not."""
    for (f0, l0), (f1, l1) in itertools.pairwise(points):
        if l1 <= loss:
            return f1 if l0 <= l1 else f0 + (f1 - f0) * min(1.0, (l0 - loss) / (l0 - l1))
    return None


def table(curves: dict[str, dict[int, Curve]]) -> str:
    """Final loss of each arm, and the share of the from-scratch FLOPs at which it reaches the from-scratch loss."""
    rows = ["| arm | final validation loss (seeds) | share of FLOPs to reach the from-scratch loss |", "|---|---|---|"]
    for arm, by_seed in curves.items():
        final = [points[-1][1] for points in by_seed.values()]
        shares = []
        for seed, points in by_seed.items():
            goal = curves["scratch"][seed][-1]
            at = reached(points, goal[1])
            shares.append("not reached" if at is None else f"{at / goal[0]:.0%}")
        losses = ", ".join(f"{x:.4f}" for x in final)
        rows.append(f"| {arm} | {statistics.mean(final):.4f} ({losses}) | {', '.join(shares)} |")
    return "\n".join(rows)


def plot(curves: dict[str, dict[int, Curve]], path: Path) -> None:
    """One line per arm and seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for index, (arm, by_seed) in enumerate(curves.items()):
        for n, points in enumerate(by_seed.values()):
            x, y = zip(*points, strict=True)
            axes.plot(x, y, color=f"C{index}", linewidth=1, label=arm if n == 0 else None)
    axes.set_xlabel("training FLOPs")
    axes.set_ylabel("validation loss, nats per token")
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run all arms and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder made by `flm data stdlib`")
    parser.add_argument("--out", required=True, help="folder for runs and results")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=MAIN_ARMS)
    parser.add_argument("--tokens", type=int, default=4_000_000, help="tokens of the from-scratch run")
    parser.add_argument("--hidden", type=int, default=192, help="width of the large model, a multiple of 96")
    parser.add_argument("--layers", type=int, default=8, help="layers of the large model, a multiple of 4")
    parser.add_argument("--interval", type=int, default=50, help="steps between validations")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--matrix-lr", type=float, default=3e-3, help="at half the large width")
    args = parser.parse_args()
    curves = {arm: {seed: train(arm, seed, args) for seed in args.seeds} for arm in args.arms}
    out = Path(args.out)
    (out / "results.json").write_text(json.dumps({"arguments": vars(args), "curves": curves}, indent=1))
    (out / "study.md").write_text(table(curves) + "\n")
    plot(curves, out / "study.png")
    print(table(curves))


if __name__ == "__main__":
    main()
