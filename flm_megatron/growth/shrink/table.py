"""Importance of units as text."""

from __future__ import annotations

from torch import Tensor

from flm_megatron.growth.shrink.importance import Importance


def importance_table(importance: Importance) -> str:
    """A row for each layer: its own importance, and mean and spread of that of its feed-forward units and heads.

    The spread is the standard deviation over the mean: where it is small, units are alike and little depends on which
    are kept. The last line has the same of the hidden channels, and what the upper half of them holds.
    """
    criteria, hidden = importance.criteria, importance.hidden
    columns = (criteria["layers"], f"ffn {criteria['ffn']}", "spread", f"heads {criteria['heads']}", "spread")
    rows = [" ".join(["layer", *(f"{name:>17}" if name != "spread" else f"{name:>8}" for name in columns)])]
    for i, layer in enumerate(importance.layers.tolist()):
        ffn, heads = importance.ffn[i], importance.heads[i]
        units = (f"{float(x.mean()):17.3e} {_spread(x):8.3f}" for x in (ffn, heads))
        rows.append(f"{i:5d} {layer:17.3e} {' '.join(units)}")
    upper = hidden.sort(descending=True).values[: (len(hidden) + 1) // 2].sum() / hidden.sum()
    rows.append(
        f"hidden {criteria['hidden']}: mean {float(hidden.mean()):.3e}, spread {_spread(hidden):.3f}; "
        f"the upper half of the channels has {float(upper):.1%} of the sum"
    )
    return "\n".join(rows)


def importance_data(importance: Importance) -> dict[str, object]:
    """The same numbers as plain data: `layers`, and mean and spread of `ffn` and `heads`, have an entry per layer."""
    return {
        "criteria": dict(importance.criteria),
        "samples": importance.samples,
        "tokens": importance.tokens,
        "layers": importance.layers.tolist(),
        "ffn": [_summary(units) for units in importance.ffn],
        "heads": [_summary(units) for units in importance.heads],
        "hidden": _summary(importance.hidden),
    }


def _summary(units: Tensor) -> dict[str, float]:
    return {"mean": float(units.mean()), "spread": _spread(units)}


def _spread(units: Tensor) -> float:
    """Standard deviation over the mean."""
    return float(units.std(correction=0) / units.mean())
