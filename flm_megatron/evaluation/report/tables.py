"""The tables of a report: runs, stages, growths, restarts and refused steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from statistics import median

from flm_megatron.config.schema import StageConfig
from flm_megatron.evaluation.report.history import Happening, History
from flm_megatron.evaluation.report.saving import Saving, percent
from flm_megatron.growth.record import Comparison
from flm_megatron.model.parameters import parameter_count
from flm_megatron.training.metrics.events import ChangeEvent, RefusedEvent, StepEvent
from flm_megatron.training.metrics.goodput import Goodput
from flm_megatron.training.metrics.log import duration, short

NONE = "-"


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """An HTML table; cells are shown as text."""
    names = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join(f"<tr>{''.join(f'<td>{escape(str(cell))}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{names}</tr></thead><tbody>{body}</tbody></table></div>'


def runs_table(histories: Sequence[History]) -> str:
    """Where each run stands."""
    head = ["run", "stages begun", "tokens", "model FLOPs", "training time", "loss", "validation loss"]
    rows = []
    for history in histories:
        at, last = history.steps[-1]
        validation = history.validations[-1][1].loss if history.validations else None
        rows.append(
            [
                history.name,
                f"{len(list(history.stages()))} of {len(history.run.stages)}",
                short(at.tokens),
                f"{at.flops:.3g}",
                duration(at.seconds),
                number(last.loss),
                number(validation),
                history.restarts,
                history.refused_steps,
                f"{100 * history.goodput.share:.1f}%" if history.goodput else NONE,
            ]
        )
    return table([*head, "restarts", "refused steps", "goodput"], rows)


def goodput_table(histories: Sequence[History]) -> str:
    """Where the wall time of each run went that metered it."""
    metered = [(history.name, history.goodput) for history in histories if history.goodput]
    head = ["run", "wall time", "starts", "steps that count", *(Goodput().parts), "steps lost"]
    rows = []
    for name, g in metered:
        seconds = (g.steps_s - g.lost_s, *g.parts.values())
        rows.append([name, duration(g.wall_s), g.starts, *map(duration, seconds), g.lost_steps])
    return table(head, rows) if rows else ""


def stages_table(histories: Sequence[History]) -> str:
    """What each stage was and how it went."""
    head = ["run", "stage", "parameters", "layers / hidden / FFN / heads", "tensor / pipeline", "steps", "tokens"]
    head += ["loss, first → last", "step time", "tokens/s per device", "TFLOP/s per device", "memory, GiB"]
    return table(
        head, [_stage_row(history, stage, steps) for history in histories for stage, steps in history.stages()]
    )


def _stage_row(history: History, stage: StageConfig, steps: list[StepEvent]) -> list[object]:
    model, parallel = stage.model, stage.parallel
    return [
        history.name,
        stage.name,
        short(parameter_count(model)),
        f"{model.num_layers} / {model.hidden_size} / {model.ffn_hidden_size} / {model.num_attention_heads}",
        f"{parallel.tensor} / {parallel.pipeline}",
        steps[-1].step,
        short(steps[-1].tokens),
        f"{number(steps[0].loss)} → {number(steps[-1].loss)}",
        f"{median(step.step_time_s for step in steps):.3g} s",
        short(median(step.tokens_per_s_per_device for step in steps)),
        f"{median(step.tflops_per_device for step in steps):.3g}",
        f"{max(step.peak_memory_gib for step in steps):.2f}",
    ]


def growths_table(histories: Sequence[History]) -> str:
    """Each growth or shrinking with the loss around it, and its certificate where one was made."""
    head = ["run", "into stage", "at tokens", "loss of the step before → after", "precision"]
    head += ["max |Δ logit| / std", "rms Δ / std", "certified loss before → after", "relative change"]
    rows = []
    for history in histories:
        for at, stage in history.boundaries:
            before = next(step for place, step in reversed(history.steps) if place.tokens <= at.tokens)
            after = next(step for _, step in history.steps if step.stage == stage)
            common = [history.name, stage, short(at.tokens), f"{number(before.loss)} → {number(after.loss)}"]
            certificate = history.certificates.get(stage)
            comparisons = certificate.comparisons if certificate else ()
            measured = [_comparison(each) for each in comparisons] or [["no certificate", *[NONE] * 4]]
            rows += [[*common, *cells] for cells in measured]
    return table(head, rows) if rows else ""


def _comparison(measured: Comparison) -> list[str]:
    return [
        measured.precision,
        f"{measured.max_difference / measured.logit_std:.2e}",
        f"{measured.rms_difference / measured.logit_std:.2e}",
        f"{measured.loss_before:.6f} → {measured.loss_after:.6f}",
        f"{measured.loss_change:.2e}",
    ]


def saving_table(rows: Sequence[Saving]) -> str:
    """What each grown run saved beside from scratch; bounds where the curve does not reach so far."""
    head = ["run", "beside", "loss compared", "final loss", "FLOPs T", "T_eq", "1 - T / T_eq", "tokens per parameter"]
    head += ["token credit", "pays above"]
    cells = [
        [
            row.name,
            row.scratch,
            row.measured,
            number(row.loss),
            f"{row.flops:.3g}",
            f"{row.bound}{row.equivalent:.3g}",
            percent(row),
            f"{(row.small_tokens + row.large_tokens) / row.parameters:.3g}",
            f"{row.bound}{row.token_credit:.3f}",
            f"{row.flops_ratio:.3f}",
        ]
        for row in rows
    ]
    return table(head, cells)


def events_table(histories: Sequence[History]) -> str:
    """Restarts, changes and refused steps in order."""
    rows = []
    for history in histories:
        for at, event in history.events:
            rows.append([history.name, event.stage, event.step, short(at.tokens), _event(event)])
    return table(["run", "stage", "step", "at tokens", "what happened"], rows) if rows else ""


def _event(event: Happening) -> str:
    """What happened, in words."""
    if isinstance(event, RefusedEvent):
        return f"refused ({event.policy}): {event.reason}"
    if isinstance(event, ChangeEvent):
        return f"{event.what} was {event.before}, is {event.now}"
    return "restarted"


def number(value: float | None) -> str:
    """A loss with four decimals, as a cell of a table."""
    if value is None:
        return NONE
    return f"{value:.4f}" if math.isfinite(value) else str(value)
