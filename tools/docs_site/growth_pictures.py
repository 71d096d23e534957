"""Draw the pictures of docs/growth.md: `python -m tools.docs_site.growth_pictures [FOLDER]`, a minute on two cores.

Nothing is drawn by hand: grown matrices are read from grown checkpoints, masks and layers come from the program's own
schedule and choice, and the certificate's bars from growths of a model trained on these pages.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import pyplot
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from flm_megatron.checkpoint.lazy.initial import InitialCheckpoint
from flm_megatron.config.schema import (
    DataConfig,
    GrowthConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    SourceConfig,
    StageConfig,
)
from flm_megatron.growth.grown.checkpoint import GrownCheckpoint
from flm_megatron.growth.layers import select_layers
from flm_megatron.growth.plan import GrowthPlan, make_plan
from flm_megatron.growth.schedule import mask_value

ROOT = Path(__file__).parents[2]
PICTURES = ROOT / "docs" / "pictures"
THEMES = {
    "light": {"ink": "#1f2328", "paper": "#ffffff", "soft": "#8c959f", "old": "#0969da", "new": "#bc4c00"},
    "dark": {"ink": "#e6edf3", "paper": "#0d1117", "soft": "#6e7681", "old": "#58a6ff", "new": "#ffa657"},
}
Theme = dict[str, str]

SMALL = ModelConfig(num_layers=4, hidden_size=24, ffn_hidden_size=32, num_attention_heads=4, head_dim=6, vocab_size=64)
LARGE = replace(SMALL, num_layers=6, hidden_size=36, ffn_hidden_size=52, num_attention_heads=6)
DOUBLE = replace(LARGE, hidden_size=48, num_attention_heads=8)
"""Clones of channels need a whole factor."""
READER, WRITER = "decoder.layers.mlp.linear_fc1.weight", "decoder.layers.mlp.linear_fc2.weight"
MASK_STEPS = 100


def plan_of(old: ModelConfig, new: ModelConfig, growth: GrowthConfig) -> GrowthPlan:
    """How `old` grows, by the program's own plan."""
    return make_plan(old, new, replace(growth, mask_steps=MASK_STEPS), seed=1)


def matrices() -> list[tuple[str, list[np.ndarray], tuple[int, int]]]:
    """What each operator makes of a matrix that reads the residual stream (its gate half) and one that writes it.

    Each entry has a title, the two matrices and the old sizes (channels, units).
    """
    source = InitialCheckpoint(SMALL, seed=1)
    old = (SMALL.hidden_size, SMALL.ffn_hidden_size)
    made = [("before", [source.read(READER)[0].numpy(), source.read(WRITER)[0].numpy()], old)]
    for name, new, operator in (("zero", LARGE, "zero"), ("mask", LARGE, "mask"), ("clone", DOUBLE, "clone")):
        growth = GrowthConfig(hidden=operator, ffn=operator, heads=operator, layers="zero")  # type: ignore[arg-type]
        grown = GrownCheckpoint(source, plan_of(SMALL, new, growth))
        made.append((name, [grown.read(READER)[0].numpy(), grown.read(WRITER)[0].numpy()], old))
    return [(name, [reader[: len(reader) // 2], writer], old) for name, (reader, writer), old in made]


def draw_matrices(figure: Figure, theme: Theme) -> None:
    """Heat maps with the old block outlined."""
    shown = matrices()
    axes = figure.subplots(2, len(shown))
    colours = matplotlib.colors.LinearSegmentedColormap.from_list(
        "values", [theme["old"], theme["paper"], theme["new"]]
    )
    for column, (name, pair, (channels, units)) in enumerate(shown):
        for row, (values, block) in enumerate(zip(pair, ((channels, units), (units, channels)), strict=True)):
            axis = axes[row, column]
            largest = 3 * float(np.std(shown[0][1][row]))
            axis.imshow(values, cmap=colours, vmin=-largest, vmax=largest, interpolation="nearest")
            whole = (values.shape[1], values.shape[0])
            for sides, colour, width in ((whole, theme["soft"], 0.8), (block, theme["ink"], 1.4)):
                axis.add_patch(Rectangle((-0.5, -0.5), *sides, fill=False, edgecolor=colour, linewidth=width))
            axis.set(xticks=[], yticks=[], xlim=(-1, DOUBLE.hidden_size if row == 0 else LARGE.ffn_hidden_size))
            axis.set_ylim(LARGE.ffn_hidden_size if row == 0 else DOUBLE.hidden_size, -1)
            for side in axis.spines.values():
                side.set_visible(False)
            if row == 0:
                axis.set_title(name)
            if column == 0:
                axis.set_ylabel("gate: reads channels" if row == 0 else "fc2: writes channels")


def draw_masks(figure: Figure, theme: Theme) -> None:
    """The masks' value at every step of a stage."""
    axis = figure.subplots()
    steps = range(MASK_STEPS + 41)
    for shape, colour in (("linear", theme["old"]), ("cosine", theme["new"])):
        plan = plan_of(SMALL, LARGE, GrowthConfig(mask_shape=shape))  # type: ignore[arg-type]
        axis.plot(steps, [mask_value(plan, step) for step in steps], color=colour, label=f"mask_shape: {shape}")
    axis.axvline(MASK_STEPS, color=theme["soft"], linewidth=0.8, linestyle=":")
    axis.text(MASK_STEPS + 1.5, 0.05, "mask_steps:\nmasks are taken off", color=theme["soft"], fontsize=8)
    axis.set(xlabel="step of the stage", ylabel="mask v on what is new", ylim=(-0.03, 1.06), xlim=(0, steps[-1]))
    axis.legend(frameon=False, labelcolor=theme["ink"], loc="upper left")


def layers() -> dict[str, list[tuple[int | None, bool]]]:
    """For each way to choose, the old layer behind every new one and whether it is a copy."""
    distances = [0.9, 0.5, 0.2, 0.1, 0.15, 0.3, 0.6, 1.0]
    chosen = {}
    for way in ("stack", "middle", "interleave", "top", "distance"):
        growth = GrowthConfig(layer_selection=way)  # type: ignore[arg-type]
        sources = select_layers(len(distances), 12, growth, distances if way == "distance" else None)
        chosen[way] = [(each.source, each.copy) for each in sources]
    return chosen


def draw_layers(figure: Figure, theme: Theme) -> None:
    """One row for each way, from the first layer to the last; copies are filled."""
    axis = figure.subplots()
    for row, (_, sources) in enumerate(layers().items()):
        for place, (source, copy) in enumerate(sources):
            face = theme["new"] if copy else theme["paper"]
            axis.add_patch(Rectangle((place, row), 0.9, 0.75, facecolor=face, edgecolor=theme["old"], linewidth=1.2))
            colour = theme["paper"] if copy else theme["ink"]
            axis.text(place + 0.45, row + 0.38, str(source), ha="center", va="center", color=colour, fontsize=9)
    axis.set(
        xlim=(-0.1, 12), ylim=(len(layers()) - 0.1, -0.2), xticks=[], xlabel="layers of the grown model, first to last"
    )
    axis.set_yticks([row + 0.38 for row in range(len(layers()))], list(layers()))
    axis.tick_params(length=0)
    for side in axis.spines.values():
        side.set_visible(False)


GROWTHS = {
    "zero": GrowthConfig(hidden="zero", ffn="zero", heads="zero", layers="zero"),
    "mask": GrowthConfig(),
    "clone": GrowthConfig(hidden="clone", ffn="clone", heads="clone", layers="zero"),
    "zero, layers: copy": GrowthConfig(hidden="zero", ffn="zero", heads="zero", layers="copy"),
    "shrink: 0.5": GrowthConfig(shrink=0.5),
}


def certificates(folder: Path) -> dict[str, tuple[float, float]]:
    """Train a small model on these pages, grow it by each of `GROWTHS`, and take its certificate.

    For each: the largest difference of a logit in standard deviations, and the change of the loss, in fp32.
    """
    import flm_megatron as flm
    from flm_megatron.data.corpus.build import build_dataset
    from flm_megatron.data.tokenizer import train_tokenizer
    from flm_megatron.evaluation.stages import last_checkpoints

    texts = [page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs").glob("*.md"))]
    tokenizer = train_tokenizer(texts, folder / "tokenizer.model", 512)
    build_dataset(texts, tokenizer, folder / "train", workers=1)
    (folder / "text.txt").write_text(texts[-1], encoding="utf-8")
    small = StageConfig(
        name="small",
        model=replace(SMALL, vocab_size=None),
        global_batch=8,
        tokens=200 * 8 * 64,
        optimizer=OptimizerConfig(lr=1e-2, min_lr=1e-3),
        schedule=ScheduleConfig(warmup_samples=80),
    )
    data = DataConfig(sequence_length=64, train=[SourceConfig(str(folder / "train"))])
    run = RunConfig(
        name="pictures",
        output=str(folder / "run"),
        tokenizer=str(folder / "tokenizer.model"),
        data=data,
        logging=LoggingConfig(interval_steps=100),
    )
    flm.train(replace(run, stages=[small]))
    trained = last_checkpoints(folder / "run")[0]
    found = {}
    for number, (name, growth) in enumerate(GROWTHS.items()):
        model = replace(DOUBLE if growth.hidden == "clone" else LARGE, vocab_size=None)
        grown = replace(run, stages=[small, replace(small, name="large", model=model, growth=growth)])
        out = folder / f"grown-{number}"
        done = flm.grow(trained, grown, "large", out, certify=folder / "text.txt")
        assert done.certificate is not None
        compared = done.certificate.comparisons[-1]
        found[name] = (compared.max_difference / compared.logit_std, compared.loss_change)
    return found


def draw_certificates(figure: Figure, theme: Theme, found: dict[str, tuple[float, float]]) -> None:
    """A bar for each growth, on a logarithmic axis, beside what a preserving growth may differ by."""
    axis = figure.subplots()
    for row, (differs, _) in enumerate(found.values()):
        colour = theme["old"] if differs < 1e-4 else theme["new"]
        axis.barh(row, differs, color=colour, height=0.6, left=1e-8)
        axis.text(differs * 1.5, row, f"{differs:.1e}", va="center", color=theme["ink"], fontsize=9)
    axis.axvline(1e-4, color=theme["soft"], linewidth=0.8, linestyle=":")
    axis.text(1.2e-4, -0.75, "what rounding in fp32 may do", color=theme["soft"], fontsize=8)
    axis.set(xscale="log", xlim=(1e-8, 300), ylim=(len(found) - 0.4, -1.0))
    axis.set_xlabel("largest change of a logit at the boundary, in standard deviations of the logits")
    axis.set_yticks(range(len(found)), list(found))
    axis.tick_params(axis="y", length=0)


def draw(name: str, size: tuple[float, float], drawn: Callable[[Figure, Theme], None], folder: Path) -> None:
    """Write a picture for light pages and one for dark ones."""
    matplotlib.use("Agg")
    for theme_name, theme in THEMES.items():
        style: dict[Any, object] = {
            **dict.fromkeys(
                ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), theme["ink"]
            ),
            **{"figure.facecolor": theme["paper"], "axes.facecolor": theme["paper"], "font.size": 10},
            **{"axes.spines.top": False, "axes.spines.right": False},
        }
        with pyplot.rc_context(style):
            figure = pyplot.figure(figsize=size, layout="constrained")
            drawn(figure, theme)
            figure.savefig(folder / f"{name}-{theme_name}.png", dpi=110, metadata={"Software": None})
            pyplot.close(figure)


DRAWN: dict[str, tuple[tuple[float, float], Callable[[Figure, Theme], None]]] = {
    "growth-matrix": ((9, 5), draw_matrices),
    "growth-masks": ((7, 3.2), draw_masks),
    "growth-layers": ((7, 3), draw_layers),
}
"""Size in inches and drawing of each picture that needs no training."""


def main(folder: Path = PICTURES) -> None:
    """Draw all pictures."""
    for name, (size, drawn) in DRAWN.items():
        draw(name, size, drawn, folder)
    with tempfile.TemporaryDirectory() as scratch:
        found = certificates(Path(scratch))
    draw("growth-certificate", (7, 2.8), lambda figure, theme: draw_certificates(figure, theme, found), folder)
    for title, (logit, loss) in found.items():
        print(f"{title}: largest logit difference {logit:.2e} standard deviations, loss changes by {loss:.2e}")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
