"""What is noted of memory, arithmetic and transfers, beside torch's own counters and by hand."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from flm_megatron.device import current
from flm_megatron.planner.rehearsal.recorder import Recorder
from flm_megatron.planner.rehearsal.world import rehearsed_world


def test_flops_are_those_of_torchs_counter() -> None:
    def work(device: str) -> None:
        """A product, its gradient, and attention of as many queries as keys."""
        weight = torch.randn(6, 5, device=device, requires_grad=True)
        (torch.randn(7, 6, device=device) @ weight).sum().backward()

    with FlopCounterMode(display=False) as oracle:
        work("cpu")
    with FakeTensorMode(), Recorder() as recorder:
        work("cpu")
    assert sum(recorder.flops.values()) == oracle.get_total_flops() > 0


def test_a_product_added_in_place_counts_as_any_other() -> None:
    with FakeTensorMode(), Recorder() as recorder:
        rows, grad = (torch.empty(7, columns, dtype=torch.bfloat16) for columns in (5, 6))
        total = torch.empty(6, 5)
        total.addmm_(grad.float().t(), rows.float())
        torch.addmm(total, grad.t(), rows, out_dtype=torch.float32, out=total)
    assert recorder.flops["matrix products"] == 2 * 2 * 6 * 7 * 5


def test_attention_of_grouped_queries_counts_every_query_head() -> None:
    batch, heads, groups, sequence, channels = 2, 8, 2, 16, 4
    with FakeTensorMode(), Recorder() as recorder:
        query = torch.randn(batch, heads, sequence, channels, requires_grad=True)
        key, value = (torch.randn(batch, groups, sequence, channels, requires_grad=True) for _ in "kv")
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        forward = recorder.flops["attention"]
        out.sum().backward()
    product = 2 * batch * heads * sequence * sequence * channels
    assert forward == 2 * product
    assert recorder.flops["attention"] == forward + 5 * product  # flash attention computes the scores again


def test_memory_is_counted_from_first_to_last_reference() -> None:
    mib = 2**20
    with FakeTensorMode(), Recorder() as recorder:
        ledger = recorder.ledger
        ledger.moment = "now"
        weight = torch.empty(mib, dtype=torch.bfloat16)
        view = weight.view(2, -1)
        assert ledger.live == 2 * mib
        ledger.use = "temporaries"
        ledger.begin_forward()
        kept, lost = torch.empty(mib, dtype=torch.uint8), torch.empty(3 * mib, dtype=torch.uint8)
        ledger.classify(weight, "gradients")
        del lost
        ledger.end_forward()
        assert ledger.by_use() == dict.fromkeys(ledger.by_use(), 0) | {"gradients": 2 * mib, "activations": mib}
        del kept, weight, view
        assert ledger.live == 0
        assert ledger.peak.nbytes == 6 * mib and ledger.peak.by_use["temporaries"] == 4 * mib
        assert ledger.peak.moment == "now: empty"
        small = torch.empty(1)
        assert ledger.live == 512  # as CUDA's allocator rounds
        del small


def test_values_that_are_read_are_one() -> None:
    with FakeTensorMode(), Recorder():
        assert torch.zeros(2).sum().item() == 1 and torch.zeros(()) > 0


def test_transfers_have_their_group_size_and_site() -> None:
    device = current()
    with rehearsed_world(3, 8):
        assert (dist.get_rank(), dist.get_world_size()) == (3, 8) and current() is not device
        pair = dist.new_group([3, 5])
        said: list[object] = [None] * 8
        dist.all_gather_object(said, "own")
        with FakeTensorMode(), Recorder() as recorder:
            recorder.micro_batched = True
            values = torch.ones(6)
            dist.all_reduce(values, group=pair)
            dist.all_gather_into_tensor(torch.empty(48), values)
            recorder.micro_batched = False
            dist.send(values, 5)
    assert said == ["own"] * 8
    assert current() is device and not dist.is_initialized()
    kinds = [(t.kind, t.group, t.nbytes, t.dtype, t.repeats, t.peer) for t in recorder.transfers]
    assert kinds == [
        ("all-reduce", (3, 5), 24, "float32", True, None),
        ("all-gather", tuple(range(8)), 192, "float32", True, None),
        ("send", tuple(range(8)), 24, "float32", False, 5),
    ]


def test_the_world_is_left_after_an_error() -> None:
    device = current()
    with pytest.raises(KeyError), rehearsed_world(0, 2):
        raise KeyError
    assert current() is device and not dist.is_initialized()


@pytest.mark.parametrize("failed", [False, True])
def test_what_a_rank_says_of_itself_is_what_all_say(failed: bool) -> None:
    with rehearsed_world(0, 4), FakeTensorMode(allow_non_fake_inputs=True), Recorder():
        flag = torch.tensor(float(failed))
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        assert bool(flag.item()) is failed


def test_memory_that_an_output_gives_back_is_not_held() -> None:
    with FakeTensorMode(), Recorder() as recorder:
        kept = torch.empty(2**20, dtype=torch.uint8)
        kept.untyped_storage().resize_(0)
        assert recorder.ledger.live == 0
        kept.untyped_storage().resize_(2**20)
        assert recorder.ledger.live == 2**20
        del kept
        assert recorder.ledger.live == 0


def test_recomputed_outputs_are_not_held_for_good() -> None:
    with FakeTensorMode(), Recorder() as recorder:
        for _ in range(3):
            kept, again = (torch.empty(2**20, dtype=torch.uint8) for _ in range(2))
            kept.untyped_storage().resize_(0)
            kept.untyped_storage().resize_(2**20)
            kept.untyped_storage().copy_(again.untyped_storage())
            del kept, again
        assert recorder.ledger.live == 0 and recorder.ledger.peak.nbytes == 2**21
