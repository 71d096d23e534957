"""An advice as text, and as plain data."""

from __future__ import annotations

from flm_megatron.planner.advice.advice import Advice, Option
from flm_megatron.planner.advice.equivalence import GrowthPoint
from flm_megatron.training.metrics.log import short

HEAD = (
    "small model",
    "parameters",
    "cost",
    "grow after",
    "loss",
    "saves at most",
    "pays above",
    "operator",
    "expected",
)
SIZES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups")


def advice_text(advice: Advice) -> str:
    """The report of `flm advise`."""
    lines = [
        f"last model: {short(advice.parameters)} parameters; {short(advice.tokens)} tokens from scratch "
        f"({advice.tokens / advice.parameters:.3g} per parameter), {advice.flops:.3g} FLOPs",
        f"laws: {advice.laws}",
        f"token credit: {advice.credit_source}",
        "",
        f"advice: {_verdict(advice)}",
        *_how(advice),
        "",
        *_table([HEAD, *(_row(option) for option in advice.options)]),
        "",
        f"Savings are shares of the {advice.unit} from scratch, from the least to the most over the laws and, where an "
        "operator was measured, over its spread. `saves at most` is by equality of losses: growth that loses nothing. "
        "`pays above`: the share of that credit which growth has to keep to save anything. Laws hold for tuned runs "
        "whose learning rate decays.",
    ]
    return "\n".join(lines)


def advice_data(advice: Advice) -> dict[str, object]:
    """Plain data: tokens, FLOPs, shares of the cost from scratch."""
    return {
        "verdict": advice.verdict,
        "tokens": advice.tokens,
        "flops": advice.flops,
        "unit": advice.unit,
        "laws": advice.laws,
        "credit_source": advice.credit_source,
        "growth": advice.growth,
        "options": [
            {
                "small": option.candidate.name,
                "model": _sizes(option),
                "dimensions": sorted(option.candidate.factors),
                "factor": option.factor,
                "cost_ratio": option.cost_ratio,
                "operator": option.credit.operator if option.credit else None,
                "bound": vars(option.bound) if option.bound else None,
                "expected": vars(option.expected) if option.expected else None,
            }
            for option in advice.options
        ],
    }


def _verdict(advice: Advice) -> str:
    best = advice.best
    assert best is not None
    name, unit = best.candidate.name, advice.unit
    if best.bound is None:
        return f"do not grow: no smaller model saves {unit}, even if growth lost nothing"
    bound = f"{_percent(best.bound.low)} to {_percent(best.bound.high)} of the {unit}"
    if advice.verdict == "not measured":
        return (
            f"not measured: growth out of {name} saves {bound} if it loses nothing, and pays only if the operator "
            f"keeps more than {_percent(best.bound.needed)} of that credit; none was measured on "
            f"{', '.join(sorted(best.candidate.factors))}"
        )
    if advice.verdict == "grow" and best.expected and best.credit:
        return (
            f"grow, out of {name} by {best.credit.operator!r}: expected to save {_percent(best.expected.saved)} of the "
            f"{unit} ({_percent(best.expected.low)} to {_percent(best.expected.high)})"
        )
    if best.expected:
        return (
            f"do not grow: the best, out of {name}, is expected to save {_percent(best.expected.saved)} of the {unit}, "
            f"too little or within its uncertainty ({_percent(best.expected.low)} to {_percent(best.expected.high)})"
        )
    if best.credit:
        return f"do not grow: no measured operator keeps enough to save {unit}; out of {name} the bound is {bound}"
    return f"do not grow: the best, out of {name}, saves {bound} even if it loses nothing"


def _how(advice: Advice) -> list[str]:
    """The stages of a run file that does it."""
    best, point = advice.best, advice.point
    if best is None or point is None or advice.verdict == "do not grow":
        return []
    model = ", ".join(f"{name}: {size}" for name, size in _sizes(best).items())
    growth = advice.growth or {}
    block = f"\n    growth: {{{', '.join(f'{name}: {value}' for name, value in growth.items())}}}" if growth else ""
    return [
        "",
        "defaults: {schedule: {kind: wsd, boundary: rewarm}}",
        "stages:",
        f"  - name: small    # until its loss is about {point.loss:.3f}",
        f"    model: {{{model}}}",
        f"    tokens: {point.small_tokens:.0f}",
        f"  - name: large    # the run's last model\n    tokens: {point.large_tokens:.0f}{block}",
    ]


def _sizes(option: Option) -> dict[str, int]:
    model = option.candidate.model
    return {name: size for name in SIZES if (size := getattr(model, name)) is not None}


def _row(option: Option) -> tuple[str, ...]:
    bound, expected = option.bound, option.expected
    when: GrowthPoint | None = expected or bound
    return (
        option.candidate.name,
        f"1/{option.factor:.3g}",
        f"1/{1 / option.cost_ratio:.3g}",
        short(when.small_tokens) if when else "-",
        f"{when.loss:.3f}" if when else "-",
        f"{_percent(bound.low)} to {_percent(bound.high)}" if bound else "nothing",
        _percent(bound.needed) if bound else "-",
        option.credit.operator if option.credit else "not measured",
        _expected(option),
    )


def _expected(option: Option) -> str:
    if option.credit is None:
        return "-"
    point = option.expected
    return f"{_percent(point.saved)} ({_percent(point.low)} to {_percent(point.high)})" if point else "nothing"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
