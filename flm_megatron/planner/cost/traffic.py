"""What a rank sends and receives in a step: kind, ranks of the group, count and bytes of every transfer.

Times of communication are made of the same bytes. Bytes are those of the tensor that is whole on a rank: what is
reduced, broadcast or sent, what is gathered, what is scattered.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from typing import Literal

from flm_megatron.planner.cost.activations import fuses_head, head_tokens, residual_bytes, stream_bytes
from flm_megatron.planner.cost.buckets import rank_buckets
from flm_megatron.planner.layout import Workload

Kind = Literal["all-reduce", "all-gather", "reduce-scatter", "broadcast", "send", "receive"]
MATRICES = ("qkv", "projection", "fc1", "fc2")
COLUMNS = ("qkv", "fc1")
"""Those whose output is split."""
FEED_FORWARD = ("fc1", "fc2")
FLAGS = 2
"""Flags that ranks pass on along with the losses of a step."""


@dataclass(frozen=True)
class Transfers:
    """`count` transfers of one kind in groups of `ranks` ranks, of `nbytes` each."""

    kind: Kind
    ranks: int
    count: int
    nbytes: int


@dataclass(frozen=True)
class Exchanges:
    """How often the residual stream of a micro-batch is exchanged over the tensor group, by kind."""

    gathers: int = 0
    scatters: int = 0
    reduces: int = 0
    casts: int = 0
    """Gathered in FP8, which is half as many bytes."""

    @property
    def rings(self) -> float:
        """Times around the ring: an all-reduce is a reduce-scatter and an all-gather."""
        return self.gathers + self.scatters + 2 * self.reduces + self.casts / 2

    def __add__(self, other: Exchanges) -> Exchanges:
        """Both."""
        return Exchanges(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __mul__(self, times: int) -> Exchanges:
        """All of them so many times."""
        return Exchanges(*(each * times for each in astuple(self)))


@dataclass(frozen=True)
class PassExchanges:
    """Exchanges of a forward pass, and of a backward pass: those `alone`, and those that the engine runs `beside` the
    gradient of a weight."""

    forward: Exchanges = Exchanges()
    alone: Exchanges = Exchanges()
    beside: Exchanges = Exchanges()

    @property
    def all(self) -> Exchanges:
        """Of both passes."""
        return self.forward + self.alone + self.beside


def pair_exchanges(work: Workload) -> PassExchanges:
    """Around a pair of matrices, split by columns and by rows, each with its backward pass.

    With sequence parallelism the first matrix's input is gathered again for its weight gradient; forward as its cast,
    if the matrix is multiplied in FP8.
    """
    if not work.parallel.sequence:
        return PassExchanges(forward=Exchanges(reduces=1), beside=Exchanges(reduces=1))
    return PassExchanges(
        forward=Exchanges(gathers=int(work.fp8 == "none"), scatters=1, casts=int(work.fp8 != "none")),
        alone=Exchanges(gathers=1),
        beside=Exchanges(gathers=int(work.trains_weights), scatters=1),
    )


def head_exchanges(work: Workload) -> PassExchanges:
    """Around the head; where it is one operation with the loss its weight gradient is there before its input's."""
    if not work.parallel.sequence:
        back = Exchanges(reduces=1)
        return PassExchanges(alone=back) if fuses_head(work) else PassExchanges(beside=back)
    forward, back = Exchanges(gathers=1), Exchanges(scatters=1)
    if fuses_head(work):
        return PassExchanges(forward=forward, alone=back)
    return PassExchanges(forward=forward, beside=back + Exchanges(gathers=int(work.trains_weights)))


def embedding_exchanges(work: Workload) -> PassExchanges:
    """After the embedding; learned positions are added to all of a sequence, which is split then."""
    if not work.parallel.sequence:
        return PassExchanges(forward=Exchanges(reduces=1))
    if not work.model.rotates:
        return PassExchanges(forward=Exchanges(reduces=1), alone=Exchanges(gathers=int(work.trains_weights)))
    return PassExchanges(forward=Exchanges(scatters=1), alone=Exchanges(gathers=int(work.trains_weights)))


def transfer_bytes(work: Workload) -> int:
    """Bytes of a micro-batch between two pipeline ranks."""
    shared = work.parallel.tensor // work.sequence_parallel if work.implementation.scatters_transfers else 1
    return round(residual_bytes(work)) // shared


def step_traffic(work: Workload, rank: int) -> list[Transfers]:
    """All transfers of a step in which a rank of pipeline rank `rank` takes part."""
    return [*_tensor(work, rank), *_pipeline(work, rank), *_ends(work, rank), *_data(work, rank), *_control(work)]


def by_kind(transfers: Sequence[Transfers]) -> dict[tuple[str, int], tuple[int, int]]:
    """Count and bytes by kind and number of ranks."""
    found: dict[tuple[str, int], tuple[int, int]] = {}
    for each in transfers:
        if each.count:
            count, nbytes = found.get((each.kind, each.ranks), (0, 0))
            found[each.kind, each.ranks] = (count + each.count, nbytes + each.count * each.nbytes)
    return found


def _tensor(work: Workload, rank: int) -> Iterator[Transfers]:
    ranks, steps = work.parallel.tensor, work.micro_batches
    if ranks == 1:
        return
    yield from _transfers(work, _exchanges(work, rank), stream_bytes(work))
    for of_layer, nbytes in (*_adapters(work), *_largest_values(work)):
        yield from _transfers(work, of_layer * sum(work.chunks(rank)), nbytes)
    if rank == work.parallel.pipeline - 1:
        # Of every token each rank says two fp32 numbers of its part of the vocabulary.
        chunks, rest = divmod(work.tokens, head_tokens(work))
        yield Transfers("all-gather", ranks, steps * chunks, 8 * ranks * head_tokens(work))
        yield Transfers("all-gather", ranks, steps * bool(rest), 8 * ranks * rest)
    if summed := work.summed_parameters(rank):
        yield Transfers("all-reduce", ranks, 1, 4 * summed)


def _transfers(work: Workload, exchanges: Exchanges, nbytes: int) -> Iterator[Transfers]:
    """Exchanges of a micro-batch in a whole step."""
    ranks, steps = work.parallel.tensor, work.micro_batches
    yield Transfers("all-gather", ranks, exchanges.gathers * steps, nbytes)
    yield Transfers("all-gather", ranks, exchanges.casts * steps, nbytes // work.bytes)
    if work.fp8 == "rowwise":
        yield Transfers("all-gather", ranks, exchanges.casts * steps, 4 * work.tokens)  # their scales
    yield Transfers("reduce-scatter", ranks, exchanges.scatters * steps, nbytes)
    yield Transfers("all-reduce", ranks, exchanges.reduces * steps, nbytes)


def _exchanges(work: Workload, rank: int) -> Exchanges:
    """Of a micro-batch on a pipeline rank."""
    pair = pair_exchanges(work)
    again = sum(work.forward_passes(matrix in FEED_FORWARD) - 1 for matrix in COLUMNS)
    found = (pair.all * 2 + pair.forward * again) * sum(work.chunks(rank))
    if rank == 0:
        found += embedding_exchanges(work).all
    if rank == work.parallel.pipeline - 1:
        found += head_exchanges(work).all
    return found


def _adapters(work: Workload) -> Iterator[tuple[Exchanges, int]]:
    """Of a layer, what the first factor of each adapter gives: it is as narrow as the adapter."""
    for target in work.model.lora.targets if work.model.lora else ():
        column = target in COLUMNS
        if work.parallel.sequence:
            forward, back = Exchanges(gathers=1), Exchanges(scatters=1)
            forward, back = (forward, back) if column else (back, forward)
        else:
            forward, back = Exchanges(reduces=int(not column)), Exchanges(reduces=int(column))
        assert work.model.lora
        yield (
            forward * work.forward_passes(target in FEED_FORWARD) + back,
            work.tokens * work.model.lora.rank * work.bytes,
        )


def _largest_values(work: Workload) -> Iterator[tuple[Exchanges, int]]:
    """Of a layer, the fp32 numbers by which matrices that are split get one scale in FP8: those of input and weight,
    and that of the output's gradient where it is split."""
    if work.fp8 != "tensorwise":
        return
    for matrix in MATRICES:
        yield Exchanges(reduces=work.forward_passes(matrix in FEED_FORWARD)), 8
        yield Exchanges(reduces=int(matrix in COLUMNS)), 4


def _pipeline(work: Workload, rank: int) -> Iterator[Transfers]:
    """Every chunk but the model's last sends its output on and receives its gradient; every chunk but the first
    receives its input and sends the gradient back."""
    parallel = work.parallel
    if parallel.pipeline == 1:
        return
    ends = [rank == 0, rank == parallel.pipeline - 1]
    count = work.micro_batches * (2 * parallel.virtual_pipeline - sum(ends))
    send = receive = parallel.pipeline
    if parallel.virtual_pipeline > 1 and parallel.pipeline == 2:
        # The engine has one direction go through the group of all ranks, so that both can be under way.
        send, receive = (send, work.world_size) if rank == 0 else (work.world_size, receive)
    yield Transfers("send", send, count, transfer_bytes(work))
    yield Transfers("receive", receive, count, transfer_bytes(work))


def _ends(work: Workload, rank: int) -> Iterator[Transfers]:
    """Both ends of a pipeline add up the gradients of an embedding that is the head too."""
    if work.copied_embedding and rank in (0, work.parallel.pipeline - 1):
        yield Transfers("all-reduce", 2, 1, work.implementation.gradient_bytes * work.embedding_parameters)


def _data(work: Workload, rank: int) -> Iterator[Transfers]:
    if work.data == 1:
        return
    for bucket in (bucket for chunk in rank_buckets(work, rank) for bucket in chunk):
        if work.parallel.distributed_optimizer:
            yield Transfers("reduce-scatter", work.data, 1, work.implementation.gradient_bytes * bucket)
            yield Transfers("all-gather", work.data, 1, work.bytes * bucket)
        else:
            yield Transfers("all-reduce", work.data, 1, work.implementation.gradient_bytes * bucket)


def _control(work: Workload) -> Iterator[Transfers]:
    """Numbers by which all ranks act alike; a broadcast goes out to a group of one too."""
    world = work.world_size
    yield Transfers("broadcast", work.parallel.pipeline, 1, 4)  # tokens of a data rank
    yield Transfers("all-reduce", work.data, int(work.data > 1), 4)  # tokens of the step
    squares = 1 if work.parallel.distributed_optimizer else work.data  # of gradients: each replica has its own sum
    yield Transfers("all-reduce", world, int(world > 1), 8 * (2 + FLAGS + squares))  # with loss, tokens and flags
