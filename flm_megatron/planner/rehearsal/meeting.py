"""Whether ranks do together what they have to: a collective that one of them would not join is a deadlock."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

from flm_megatron.errors import FlmError
from flm_megatron.planner.rehearsal.rank import RankReport
from flm_megatron.planner.rehearsal.recorder import Transfer

POINT_TO_POINT = ("send", "receive")


def check_meetings(reports: Sequence[RankReport]) -> None:
    """Compare what every two of these ranks do in the groups that both are in; all have run as many micro-batches.

    Raises:
        FlmError: at some point one of them would wait for ever; the message has both call sites.
    """
    for index, one in enumerate(reports):
        for other in reports[index + 1 :]:
            for group in sorted(_groups(one) | _groups(other)):
                if one.rank in group and other.rank in group:
                    _compare(one, other, group)
            _compare_transfers(one, other)
            _compare_transfers(other, one)


def _all(report: RankReport) -> tuple[Transfer, ...]:
    """Transfers of the step, of the one under masks, and of validation."""
    return report.transfers + report.life.transfers


def _groups(report: RankReport) -> set[tuple[int, ...]]:
    return {transfer.group for transfer in _all(report)}


def _compare(one: RankReport, other: RankReport, group: tuple[int, ...]) -> None:
    """Collectives of one group have to come in the same order on both."""
    ours, theirs = (
        [t for t in _all(report) if t.group == group and t.kind not in POINT_TO_POINT] for report in (one, other)
    )
    for number, (mine, its) in enumerate(zip_longest(ours, theirs), 1):
        if mine is None or its is None or not mine.matches(its):
            raise FlmError(
                f"deadlock: collective {number} of the group of {len(group)} ranks from rank {group[0]} on is "
                f"{_said(mine)} on rank {one.rank} and {_said(its)} on rank {other.rank}"
            )


def _compare_transfers(one: RankReport, other: RankReport) -> None:
    """What one sends the other has to receive."""
    sent = [t for t in _all(one) if t.kind == "send" and t.peer == other.rank]
    received = [t for t in _all(other) if t.kind == "receive" and t.peer == one.rank]
    for number, (out, back) in enumerate(zip_longest(sent, received), 1):
        if out is None or back is None or (out.nbytes, out.dtype) != (back.nbytes, back.dtype):
            raise FlmError(
                f"deadlock: transfer {number} from rank {one.rank} to rank {other.rank} is {_said(out)} there and "
                f"{_said(back)} here"
            )


def _said(transfer: Transfer | None) -> str:
    if transfer is None:
        return "nothing"
    return f"{transfer.kind} of {transfer.nbytes:,} bytes of {transfer.dtype} at {transfer.site}"
