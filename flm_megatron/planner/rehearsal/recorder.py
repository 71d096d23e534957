"""Watches every operation of a rank that is rehearsed: memory, FLOPs, and what it sends to other ranks."""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FakeWork
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from flm_megatron.planner.rehearsal.ledger import Ledger
from flm_megatron.planner.rehearsal.timing.operation_times import FACTORS, tensors_in
from flm_megatron.planner.rehearsal.timing.timeline import Timeline
from flm_megatron.planner.report.traffic import Traffic

KINDS = {
    "allreduce_": "all-reduce",
    "allreduce_coalesced_": "all-reduce",
    "_allgather_base_": "all-gather",
    "allgather_into_tensor_coalesced_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "reduce_scatter_tensor_coalesced_": "reduce-scatter",
    "broadcast_": "broadcast",
    "send": "send",
    "recv_": "receive",
    "barrier": "barrier",
    "alltoall_base_": "all-to-all",
}
"""torch's operations by the names of the collectives."""
WITHOUT_SHAPES = ("allreduce_coalesced_", "allgather_into_tensor_coalesced_", "reduce_scatter_tensor_coalesced_")
"""Those that torch has no form of for tensors without values."""
ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
ADDED = torch.ops.aten.addmm, torch.ops.aten.addmm_
"""A product that is added to a matrix, which torch's own counter leaves out where that is in place."""
ANSWER = 1
"""What a computed value is that the program reads: there are tokens, a norm is finite. What a rank says of itself, as
whether it has failed, is known."""
PACKAGES = ("flm_megatron", "megatron")
OWN = str(Path(__file__).parent)


@dataclass(frozen=True)
class Transfer:
    """One collective or point-to-point transfer that this rank takes part in.

    `group` are the global ranks of its group; `peer` is the other rank of a point-to-point transfer. `nbytes` is the
    size of the tensor that is whole on a rank: what is reduced, broadcast or sent, what is gathered, what is
    scattered. `site` is the line of the program or the engine that asked for it.
    """

    kind: str
    group: tuple[int, ...]
    nbytes: int
    dtype: str
    site: str
    repeats: bool
    """Whether it is done once for every micro-batch."""
    peer: int | None = None

    def matches(self, other: Transfer) -> bool:
        """Whether two ranks of one group may be at this point together."""
        return (self.kind, self.nbytes, self.dtype) == (other.kind, other.nbytes, other.dtype)


def _once(_: Transfer) -> float:
    return 1.0


def traffic(transfers: Iterable[Transfer], times: Callable[[Transfer], float] = _once) -> Traffic:
    """Count and bytes by kind and number of ranks, of transfers that are each done so many `times`."""
    counts: dict[tuple[str, int], float] = defaultdict(float)
    sizes: dict[tuple[str, int], float] = defaultdict(float)
    for transfer in transfers:
        key = (transfer.kind, len(transfer.group))
        counts[key] += times(transfer)
        sizes[key] += times(transfer) * transfer.nbytes
    return {key: (round(counts[key]), round(sizes[key])) for key in counts}


class Recorder(TorchDispatchMode):
    """Stands above torch's fake tensors, or (with `values`) above real ones.

    `micro_batched` is true while what is done is done for each micro-batch, but for what `replicas`, the global ranks
    of the data-parallel group, do together: weights are gathered in the first one, gradients reduced in the last.
    """

    def __init__(self, values: bool = False) -> None:
        super().__init__()
        self.values = values
        self.ledger = Ledger()
        self.flops: Counter[str] = Counter()
        self.transfers: list[Transfer] = []
        self.micro_batched = False
        self.replicas: tuple[int, ...] = ()
        self.timeline: Timeline | None = None

    def __enter__(self) -> Recorder:
        """Watch, storages that are resized too: that is no operation.

        Copies between storages without values do nothing; torch's fake tensors would remember both for good.
        """
        resize, copy = self._storage = torch.UntypedStorage.resize_, torch.UntypedStorage.copy_

        def noted(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            """The storage, at its new size."""
            resize(storage, size)
            self.ledger.resize(storage, "resize_")
            return storage

        torch.UntypedStorage.resize_ = noted  # type: ignore[method-assign, assignment]
        torch.UntypedStorage.copy_ = copy if self.values else _not_copied  # type: ignore[method-assign, assignment]
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        """Look away."""
        torch.UntypedStorage.resize_, torch.UntypedStorage.copy_ = self._storage  # type: ignore[method-assign]
        super().__exit__(*error)

    @contextmanager
    def timing(self, timeline: Timeline | None) -> Iterator[None]:
        """While the block runs, a timeline is told how long all takes."""
        self.timeline = timeline
        with timeline.watching() if timeline else nullcontext():
            yield
        self.timeline = None

    def begin_pass(self, backward: bool | None, chunk: int = 0) -> None:
        """A pass of a micro-batch through a model chunk begins, or (none) all of them are done."""
        if self.timeline:
            self.timeline.begin(backward, chunk)

    def launched(self, tensors: Sequence[torch.Tensor]) -> None:
        """A Triton kernel has been called with some tensors."""
        if self.timeline:
            self.timeline.launched(tensors)

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        """Run one operation and take note of it."""
        if not self.values and func is torch.ops.aten._local_scalar_dense.default:
            known = getattr(args[0], "constant", None)
            return ANSWER if known is None else known.item()
        if func.namespace == "c10d":
            return self._transfer(func, args, kwargs or {})
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.prim.device.default:
            return out
        self._count(func, args, kwargs or {}, out)
        for tensor in tensors_in(out):
            self.ledger.enter(tensor, func._opname)
        return out

    def forget(self) -> tuple[Transfer, ...]:
        """The transfers so far; they and the arithmetic are counted anew from now on."""
        transfers = tuple(self.transfers)
        self.transfers.clear()
        self.flops.clear()
        return transfers

    def _transfer(self, func: torch._ops.OpOverload, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        """Take note of a collective, and do it: others say what this rank says."""
        transfer = self._note_transfer(func, args)
        if not self.values and func._opname in WITHOUT_SHAPES:
            done = FakeWork().boxed()
            self._time_transfer(transfer, done)
            return done
        said = _flags(args)
        out = func(*args, **kwargs)
        self._time_transfer(transfer, out)
        for flag, value in said:
            flag.constant = value
        for tensor in tensors_in(out):
            self.ledger.enter(tensor, func._opname)
        return out

    def _count(
        self, func: torch._ops.OpOverload, args: tuple[object, ...], kwargs: dict[str, object], out: object
    ) -> None:
        packet, timeline = func._overloadpacket, self.timeline
        if packet in (ATTENTION, ATTENTION_BACKWARD):
            flops = _attention_flops(packet, args)
            self.flops["attention"] += flops
            if timeline:
                causal = next((arg for arg in args if isinstance(arg, bool)), bool(kwargs.get("is_causal")))
                query, keys = list(tensors_in(args[packet is ATTENTION_BACKWARD :]))[:2]
                timeline.work("attention", timeline.times.attention(query, keys, flops, causal))
            return
        if packet in ADDED:
            self.flops["matrix products"] += flop_registry[torch.ops.aten.addmm](*args[:3], out_val=out)
        elif packet in flop_registry:
            self.flops["matrix products"] += flop_registry[packet](*args, **kwargs, out_val=out)
        if timeline and packet in FACTORS:
            factors = [*tensors_in(args[FACTORS[packet] :][:2])]
            timeline.work("matmul", timeline.times.product(factors))
            if packet in ADDED and isinstance(out, torch.Tensor) and out.dtype is not factors[0].dtype:
                timeline.work("memory_bound", timeline.times.adding(out, factors[0]))
        elif timeline:
            timeline.work("memory_bound", timeline.times.operation(func, args, out))

    def _time_transfer(self, transfer: Transfer, boxed: object) -> None:
        """`boxed` has the handle of a transfer."""
        if self.timeline is None or transfer.kind in ("send", "receive"):
            return
        (handle,) = (dist.Work.unbox(leaf) for leaf in tree_leaves(boxed) if isinstance(leaf, torch.ScriptObject))
        self.timeline.collective(transfer.kind, transfer.nbytes, transfer.group, handle)

    def _note_transfer(self, func: torch._ops.OpOverload, args: tuple[object, ...]) -> Transfer:
        kind = KINDS.get(func._opname)
        if kind is None:
            raise NotImplementedError(f"rehearsal does not know torch's collective {func._opname}")
        group = next(dist.ProcessGroup.unbox(arg) for arg in args if isinstance(arg, torch.ScriptObject))
        ranks = tuple(dist.get_process_group_ranks(group))
        dtype = next((str(tensor.dtype).removeprefix("torch.") for tensor in tensors_in(args)), "")
        peer = next((arg for arg in args if isinstance(arg, int)), None) if kind in ("send", "receive") else None
        transfer = Transfer(
            kind,
            ranks,
            max(sum(tensor.nbytes for tensor in tensors_in(arg)) for arg in args),
            dtype,
            _site(),
            self.micro_batched and (len(ranks) == 1 or ranks != self.replicas),
            None if peer is None else ranks[peer],
        )
        self.transfers.append(transfer)
        return transfer


def _not_copied(storage: torch.UntypedStorage, source: object, non_blocking: bool | None = None) -> object:
    """In place of torch's copy of a storage."""
    return storage


def _flags(args: tuple[object, ...]) -> list[tuple[FakeTensor, torch.Tensor]]:
    """Tensors that this rank has given a value of its own, such as a flag that asks whether any rank has failed."""
    fakes = (tensor for tensor in tensors_in(args) if isinstance(tensor, FakeTensor))
    return [(fake, fake.constant) for fake in fakes if fake.constant is not None]


def _attention_flops(packet: object, args: tuple[object, ...]) -> int:
    """FLOPs over all keys, as torch counts them; backward flash attention computes the scores again."""
    backward = packet is ATTENTION_BACKWARD
    query, key, value = (_shape(tensor) for tensor in args[backward : 3 + backward])
    keys, values = _expanded(key, query), _expanded(value, query)
    if backward:
        return int(sdpa_backward_flop_count(_shape(args[0]), query, keys, values))
    return int(sdpa_flop_count(query, keys, values))


def _shape(tensor: object) -> tuple[int, ...]:
    assert isinstance(tensor, torch.Tensor)
    return tuple(tensor.shape)


def _expanded(key: tuple[int, ...], query: tuple[int, ...]) -> tuple[int, ...]:
    """The shape [batch, heads, sequence, channels] of keys as each query head sees them."""
    return (key[0], query[1], *key[2:])


def _site() -> str:
    """File and line of the innermost frame of the program, or of the engine, that is not of this room."""
    frame = sys._getframe(3)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name.split(".")[0] in PACKAGES and not frame.f_code.co_filename.startswith(OWN):
            return f"{name}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "unknown"
