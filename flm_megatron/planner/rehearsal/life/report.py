"""The life of a rank beside its steps, as text for people and as plain data for programs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

from flm_megatron.planner.cost.memory import GIB
from flm_megatron.planner.rehearsal.life.counted import STATES, Amount, by_state, total
from flm_megatron.planner.rehearsal.life.life import Life
from flm_megatron.planner.rehearsal.life.loading import Loading
from flm_megatron.planner.rehearsal.life.masks import MaskedStep
from flm_megatron.planner.rehearsal.life.saving import Saving
from flm_megatron.planner.rehearsal.life.validation import ValidationPass
from flm_megatron.planner.rehearsal.recorder import traffic
from flm_megatron.planner.report.text import table
from flm_megatron.planner.report.traffic import traffic_data, traffic_table

FILES_SHOWN = 4


def life_text(life: Life) -> str:
    """What the rank reads and writes, a line for each file that is here, and masks and validation where it has them."""
    rows = [["GiB read and written", "regions", *STATES.values(), "new values"]]
    loadings = (life.starting, life.resuming)
    rows += [_row(one.how, by_state(one.tensors.items()), one.drawn) for one in loadings]
    rows.append(_row("saved", life.saving.states, Amount()))
    lines = [table(rows), *(line for one in loadings for line in (*_files(one), *_shared(one))), _saving(life)]
    lines += [_masked(life.masked)] if life.masked else []
    lines += [_validation(life.validation)] if life.validation else []
    return "\n".join(lines)


def life_data(life: Life) -> dict[str, object]:
    """The same as plain data: regions, bytes, operations, counts."""
    return {
        "starting": _loading(life.starting),
        "resuming": _loading(life.resuming),
        "saving": _saved(life.saving),
        "masked_step": None
        if life.masked is None
        else {
            "dimensions": list(life.masked.dimensions),
            "mask_bytes": life.masked.nbytes,
            "peak": asdict(life.masked.peak),
        },
        "validation": None if life.validation is None else _pass_data(life.validation),
    }


def _row(what: str, states: dict[str, Amount], drawn: Amount) -> list[str]:
    regions = total([*states.values(), drawn]).regions
    cells = [states.get(name, Amount()).nbytes for name in STATES.values()]
    return [what, f"{regions:,}", *(f"{nbytes / GIB:,.2f}" for nbytes in (*cells, drawn.nbytes))]


def _files(loading: Loading) -> Iterator[str]:
    """What is read of the files of a checkpoint that is here."""
    if loading.where is None:
        return
    shown = list(loading.files.items())[:FILES_SHOWN]
    parts = [f"{Path(file).name} ({_amount(amount)})" for file, amount in shown]
    more = f" and {len(loading.files) - FILES_SHOWN:,} other files" if len(loading.files) > FILES_SHOWN else ""
    yield f"{loading.how}: {loading.where}, Adam at step {loading.adam_step:,}: {', '.join(parts)}{more}"


def _shared(loading: Loading) -> Iterator[str]:
    """What replicas hold alike, which each of them reads a share of."""
    received = [t.nbytes for t in loading.transfers if t.kind == "broadcast"]
    if received:
        yield f"{loading.how}: {sum(received) / GIB:,.2f} GiB read among replicas, in {len(received):,} broadcasts"


def _amount(amount: Amount) -> str:
    return f"{amount.nbytes / GIB:,.2f} GiB in {amount.regions:,} regions"


def _saving(life: Life) -> str:
    saving = life.saving
    copy = f"; {saving.host_bytes / GIB:,.2f} GiB of host memory hold them meanwhile" if saving.host_bytes else ""
    return f"saved into {saving.file}{copy}"


def _masked(step: MaskedStep) -> str:
    names = ", ".join(step.dimensions)
    return (
        f"first step, {names} masked ({step.nbytes / 2**20:,.2f} MiB of masks): at most {step.peak.nbytes / GIB:.2f} "
        f"GiB, {step.peak.moment}"
    )


def _validation(one: ValidationPass) -> str:
    arithmetic = ", ".join(f"{count / 1e12:,.1f} TFLOP of {name}" for name, count in one.flops.items())
    transfers = traffic_table(traffic(one.transfers, one.per_pass))
    sets = f" of each of {one.sets} sets" if one.sets > 1 else ""
    work = f"{one.batches:,} x {one.micro_batches:,} micro-batches ({one.ran} run)"
    most = f"at most {one.peak.nbytes / GIB:.2f} GiB"
    return f"validation on {one.samples:,} samples{sets}: {work}, {most}, {arithmetic}\n{transfers}"


def _loading(loading: Loading) -> dict[str, object]:
    amounts = {key: _plain(getattr(loading, key)) for key in ("tensors", "files")}
    return amounts | {
        "how": loading.how,
        "where": loading.where,
        "states": _plain(by_state(loading.tensors.items())),
        "drawn": asdict(loading.drawn),
        "adam_step": loading.adam_step,
        "offset_bytes": loading.offset_bytes,
        "transfers": traffic_data(traffic(loading.transfers)),
    }


def _saved(saving: Saving) -> dict[str, object]:
    sizes = {key: getattr(saving, key) for key in ("file", "file_bytes", "host_bytes")}
    return sizes | {"states": _plain(saving.states), "transfers": traffic_data(traffic(saving.transfers))}


def _pass_data(one: ValidationPass) -> dict[str, object]:
    plain = {name: getattr(one, name) for name in ("sets", "samples", "batches", "micro_batches", "ran", "flops")}
    return plain | {"peak": asdict(one.peak), "transfers": traffic_data(traffic(one.transfers, one.per_pass))}


def _plain(amounts: Mapping[str, Amount]) -> dict[str, object]:
    return {name: asdict(amount) for name, amount in amounts.items()}
