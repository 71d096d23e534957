"""Carries out an exchange: one message for each pair of ranks and round, point to point over the world's group."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.distributed as dist

from flm_megatron.checkpoint.exchange.description import Description, Held, NamedRegion, described
from flm_megatron.checkpoint.exchange.plan import ROUND_BYTES, Part, Plan, Round, make_plan
from flm_megatron.device import current
from flm_megatron.distributed.channels import gathered

ALIGNMENT = 16
"""Each part of a message begins at a multiple of these bytes."""
Arrived = tuple[int, list[torch.Tensor]]
"""Number of a group, and the values of its regions."""


@dataclass
class Moved:
    """What an exchange took this rank: bytes and messages that it sent, seconds in which it sent and received."""

    sent: int = 0
    received: int = 0
    messages: int = 0
    seconds: float = 0.0


def agreed_plan(held: Sequence[Held], wanted: Sequence[Sequence[NamedRegion]], round_bytes: int = ROUND_BYTES) -> Plan:
    """This rank's part in the exchange of what all ranks of the world hold and want. All of them must call.

    It serves any number of exchanges of other values under the same names and regions.

    Raises:
        RequestError: (on every rank) as `make_plan`.
    """
    own = described(held, wanted)
    descriptions = [Description.unpacked(data) for data in gathered(own.packed())]
    return make_plan(descriptions, dist.get_rank(), round_bytes)


def exchange(held: Sequence[Held], wanted: Sequence[Held], plan: Plan) -> Moved:
    """Fill the memory of what this rank wants from the ranks that hold it. All ranks of the world must call.

    Values are sent in the dtype in which they are held and converted to that of the memory. The `plan` is the agreed
    one of the same names and regions, each wanted one a group of its own.
    """
    moved = Moved()
    for arrived in arrivals(plan, [tensor for _, _, tensor in held], moved):
        for group, (values,) in arrived:
            wanted[group][2].copy_(values)
    return moved


@torch.no_grad()
def arrivals(plan: Plan, held: Sequence[torch.Tensor], moved: Moved) -> Iterator[list[Arrived]]:
    """Carry out `plan`, given the memory of all that this rank holds; adds to `moved` what it took.

    Yields round by round the groups that have arrived, which are to be used before the next round. Values that lie
    whole in this rank's memory are views of it. All ranks of the world must go through all rounds.
    """
    regions = [each for group in plan.own.wanted for each in group]
    first = [0, *accumulate(len(group) for group in plan.own.wanted)]
    for each in plan.rounds:
        began = time.perf_counter()
        values = _local(plan, each, regions, held)
        messages = {peer: _empty(_nbytes(plan, regions, parts)) for peer, parts in each.receives.items()}
        _send_and_receive({peer: _packed(plan, parts, held) for peer, parts in each.sends.items()}, messages, moved)
        for peer, parts in each.receives.items():
            _unpack(plan, regions, parts, messages.pop(peer), values)
        moved.seconds += time.perf_counter() - began
        yield [(group, [values[index] for index in range(first[group], first[group + 1])]) for group in each.groups]


def _local(
    plan: Plan, each: Round, regions: Sequence[NamedRegion], held: Sequence[torch.Tensor]
) -> dict[int, torch.Tensor]:
    """What this rank holds itself of the regions that it wants in a round, by number of the region."""
    values: dict[int, torch.Tensor] = {}
    for here, there in each.local:
        part = held[here.index][here.region.within(plan.own.held[here.index][1]).slices]
        if there.region == regions[there.index][1]:
            values[there.index] = part
        else:
            _place(plan, regions, there, part, values)
    return values


def _place(
    plan: Plan, regions: Sequence[NamedRegion], part: Part, found: torch.Tensor, values: dict[int, torch.Tensor]
) -> None:
    """Copy a part of a wanted region to its place in the memory of the region, which is made for its first part."""
    name, region = regions[part.index]
    if part.index not in values:
        values[part.index] = torch.empty(region.sizes, dtype=plan.dtypes[name], device=current().torch_device)
    values[part.index][part.region.within(region).slices] = found


def _nbytes(plan: Plan, regions: Sequence[NamedRegion], parts: Sequence[Part]) -> int:
    """Bytes of a message of parts."""
    return sum(_room(part.region.numel * plan.dtypes[regions[part.index][0]].itemsize) for part in parts)


def _room(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _empty(nbytes: int) -> torch.Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, device=current().torch_device)


def _packed(plan: Plan, parts: Sequence[Part], held: Sequence[torch.Tensor]) -> torch.Tensor:
    """The message of the parts of what this rank holds."""
    message, at = _empty(_nbytes(plan, plan.own.held, parts)), 0
    for part in parts:
        name, region = plan.own.held[part.index]
        nbytes = part.region.numel * plan.dtypes[name].itemsize
        room = message[at : at + nbytes].view(plan.dtypes[name]).view(part.region.sizes)
        room.copy_(held[part.index][part.region.within(region).slices])
        at += _room(nbytes)
    return message


def _unpack(
    plan: Plan,
    regions: Sequence[NamedRegion],
    parts: Sequence[Part],
    message: torch.Tensor,
    values: dict[int, torch.Tensor],
) -> None:
    """Put the parts of a message where they belong."""
    at = 0
    for part in parts:
        dtype = plan.dtypes[regions[part.index][0]]
        nbytes = part.region.numel * dtype.itemsize
        _place(plan, regions, part, message[at : at + nbytes].view(dtype).view(part.region.sizes), values)
        at += _room(nbytes)


def _send_and_receive(sends: dict[int, torch.Tensor], receives: dict[int, torch.Tensor], moved: Moved) -> None:
    """Send and receive messages by peer; returns when all are through."""
    operations = [dist.P2POp(dist.isend, message, peer) for peer, message in sends.items()]
    operations += [dist.P2POp(dist.irecv, message, peer) for peer, message in receives.items()]
    for work in dist.batch_isend_irecv(operations) if operations else ():
        work.wait()
    moved.sent += sum(message.nbytes for message in sends.values())
    moved.received += sum(message.nbytes for message in receives.values())
    moved.messages += len(sends)
