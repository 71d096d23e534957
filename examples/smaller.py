"""Shrink the quickstart's last model and train it on, with and without it as a teacher: `python examples/smaller.py`.

It begins where `make quickstart` ended. A half and a quarter of every dimension are cut out of the large model, by what
`flm importance` measures. Each is trained on, with and without distillation, beside a model of its shape that is
trained from scratch on as many tokens. Bits per byte are of held-out files of the standard library. Run again, it goes
on where it stands; remove `runs/smaller` to start anew.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import flm_megatron as flm
from flm_megatron.cli.main import main as command

TRUNK = "examples/quickstart.yaml"
OUT = Path("runs/smaller")
TOKENS = 100_000
SHAPES = {"half": (5, 120, 576, 10), "quarter": (3, 60, 288, 5)}
"""Layers, hidden size, feed-forward size and heads; those of the large model are 9, 240, 1152 and 20."""
HELD_OUT_FILES, LARGEST_FILE = 12, 20_000


def main() -> int:
    """Measure, shrink, train, and compare."""
    trunk = flm.load_run(TRUNK)
    large = last_checkpoint(trunk)
    if large is None:
        print(f"{trunk.output} has no checkpoint of its last stage: run `make quickstart` first", file=sys.stderr)
        return 2
    units = OUT / "units.safetensors"
    if not units.exists() and (status := command(["importance", str(large), TRUNK, "--out", str(units)])):
        return status
    compared = {"large": large}
    for name in SHAPES:
        shrunk, distilled, scratch = runs_of(name, trunk, large, units)
        if not (cut := OUT / f"{name}-cut").exists():
            flm.shrink(large, shrunk, name, cut)
        compared[f"{name}, cut out of it"] = cut
        for run, what in ((shrunk, "trained on"), (distilled, "distilled"), (scratch, "from scratch")):
            if status := flm.train(run):
                return status
            compared[f"{name}, {what}"] = last_checkpoint(run) or cut
    scores = OUT / "scores.json"
    text = ["--text", f"code={held_out()}", "--json", str(scores), "--batch", "4"]
    if status := command(["eval", "bpb", *map(str, compared.values()), *text]):
        return status
    found = [score["all"]["bits_per_byte"] for score in json.loads(scores.read_text())["checkpoints"]]
    print("\n".join(table(compared, found)))
    return 0


def runs_of(name: str, trunk: flm.RunConfig, large: Path, units: Path) -> Iterator[flm.RunConfig]:
    """Three runs of one shape: cut out of the large model, the same with it as a teacher, and from fresh weights.

    The first two are the quickstart's run with one more stage, in a folder of their own, from the large model on.
    """
    last = trunk.stages[-1]
    schedule = flm.ScheduleConfig(kind="wsd", warmup_samples=160, wsd_decay_fraction=0.3)
    layers, hidden, ffn, heads = SHAPES[name]
    model = replace(
        last.model,
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=heads,
        head_dim=last.model.kv_channels,
    )
    layout = flm.ParallelConfig(data=2)
    stage = replace(last, name=name, model=model, parallel=layout, tokens=TOKENS, growth=None, schedule=schedule)
    checkpoint = replace(trunk.checkpoint, branch_of=str(large))
    shrunk = replace(stage, shrink=flm.ShrinkConfig(importance=str(units)))
    distilled = replace(shrunk, distill=flm.DistillConfig(teacher=str(large)))
    for folder, added in ((f"{name}-trained", shrunk), (f"{name}-distilled", distilled)):
        stages = [*trunk.stages, added]
        yield replace(trunk, name=folder, output=str(OUT / folder), stages=stages, checkpoint=checkpoint)
    yield replace(trunk, name=f"{name}-scratch", output=str(OUT / f"{name}-scratch"), stages=[stage])


def held_out() -> Path:
    """A file with held-out files of the standard library, one a line."""
    from flm_megatron.data.corpus.standard_library import standard_library_documents

    file = OUT / "held_out.jsonl"
    documents = [text for text in standard_library_documents()[1] if len(text) < LARGEST_FILE][:HELD_OUT_FILES]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return file


def table(compared: dict[str, Path], bits_per_byte: list[float]) -> Iterator[str]:
    """A row for each model."""
    yield f"{'':24} {'parameters':>10} {'bits per byte':>13}"
    for (name, path), bits in zip(compared.items(), bits_per_byte, strict=True):
        tensors = flm.open_checkpoint(path).tensors
        count = sum(math.prod(info.shape) for tensor, info in tensors.items() if not tensor.startswith("optimizer."))
        yield f"{name:24} {count:10,} {bits:13.4f}"


def last_checkpoint(run: flm.RunConfig) -> Path | None:
    """The newest checkpoint of a run's last stage; none if it has none."""
    return max((Path(run.output) / "checkpoints" / run.stages[-1].name).glob("step_*"), default=None)


if __name__ == "__main__":
    sys.exit(main())
