"""Bytes of a step's transfers, counted by hand; `rehearsal/test_against_plan.py` has them beside the program's."""

from __future__ import annotations

from dataclasses import replace

import pytest

from flm_megatron.config.schema import ModelConfig, ParallelConfig
from flm_megatron.planner.cost import buckets
from flm_megatron.planner.cost.buckets import rank_buckets
from flm_megatron.planner.cost.traffic import Exchanges, by_kind, head_exchanges, pair_exchanges, step_traffic
from flm_megatron.planner.layout import Workload

MODEL = ModelConfig(num_layers=4, hidden_size=64, ffn_hidden_size=100, num_attention_heads=4, vocab_size=200)
QKV, PROJECTION, FC1, FC2, NORM, VOCABULARY = 192 * 64, 64 * 64, 200 * 64, 64 * 100, 64, 256 * 64
LAYER = QKV + PROJECTION + FC1 + FC2 + 2 * NORM
STREAM = 2 * 32 * 64 * 2


def workload(data: int = 1, **parallel: object) -> Workload:
    """Three micro-batches of two samples of 32 tokens."""
    return Workload(MODEL, 32, 6 * data, 2, ParallelConfig(**parallel), data)  # type: ignore[arg-type]


def test_one_bucket_holds_all_of_a_chunk_and_is_a_multiple_of_what_it_is_cut_into() -> None:
    (bucket,) = rank_buckets(workload(data=7), 0)[0]
    values = 2 * VOCABULARY + 4 * LAYER + NORM
    assert bucket % (7 * 128) == 0 and values <= bucket < values + 7 * 128
    assert rank_buckets(workload(data=7, distributed_optimizer=False), 0) == [[values]]


def test_every_chunk_has_its_layers_and_the_ends_theirs() -> None:
    work = workload(data=2, pipeline=2, virtual_pipeline=2, distributed_optimizer=False)
    assert rank_buckets(work, 0) == [[VOCABULARY + LAYER], [LAYER]]
    assert rank_buckets(work, 1) == [[LAYER], [LAYER + NORM + VOCABULARY]]


def test_buckets_fill_up_from_the_last_layer_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "SMALLEST_BUCKET", LAYER)
    monkeypatch.setattr(buckets, "BUCKET_PER_RANK", 1)
    work = workload(data=2, overlap_grad_reduce=True, distributed_optimizer=False)
    head = VOCABULARY + NORM + FC2 + FC1 + NORM
    between = QKV + PROJECTION + NORM + FC2 + FC1 + NORM
    assert rank_buckets(work, 0) == [[head, between, between, between, QKV + PROJECTION + NORM + VOCABULARY]]


def test_a_bucket_that_is_cut_begins_its_parameters_at_multiples_of_64() -> None:
    odd = replace(MODEL, hidden_size=60)
    (bucket,) = rank_buckets(replace(workload(data=2), model=odd), 0)[0]
    layer = (180 * 60 + 16) + (60 * 60 + 48) + (200 * 60 + 32) + (60 * 100 + 16) + 2 * 64
    values = 4 * layer + 64 + 2 * 256 * 60
    assert bucket == -(-values // 128) * 128


@pytest.mark.parametrize(("sequence", "rings"), [(False, 4), (True, 5)])
def test_a_pair_of_matrices_goes_round_the_ring_four_times_and_gathers_its_input_again(
    sequence: bool, rings: int
) -> None:
    assert pair_exchanges(workload(tensor=2, sequence=sequence)).all.rings == rings


def test_a_head_that_is_one_with_its_loss_gathers_once() -> None:
    work = workload(tensor=2, sequence=True)
    fused = replace(work, implementation=replace(work.implementation, fused_head_from_mib=0))
    assert head_exchanges(work).all == Exchanges(gathers=2, scatters=1)
    assert head_exchanges(fused).all == Exchanges(gathers=1, scatters=1)


def test_a_step_alone_sends_nothing() -> None:
    assert by_kind(step_traffic(workload(), 0)) == {("broadcast", 1): (1, 4)}


def test_a_step_of_four_ranks() -> None:
    work = workload(data=2, tensor=2, pipeline=1, distributed_optimizer=False)
    exchanges = 3 * (4 * 4 + 1 + 1)  # of layers, embedding, head
    ((gradients,),) = rank_buckets(work, 0)
    in_pairs = exchanges * STREAM + 4 * gradients + 4  # with the number of tokens
    assert by_kind(step_traffic(work, 0)) == {
        ("all-reduce", 2): (exchanges + 1 + 1, in_pairs),
        ("all-gather", 2): (3, 3 * 2 * 2 * 64 * 4),
        ("broadcast", 1): (1, 4),
        ("all-reduce", 4): (1, 8 * (4 + 2)),
    }


def test_neighbours_send_a_stream_there_and_its_gradient_back() -> None:
    work = workload(pipeline=4)
    counts = [by_kind(step_traffic(work, rank))["send", 4] for rank in range(4)]
    assert counts == [(3, 3 * STREAM), (6, 6 * STREAM), (6, 6 * STREAM), (3, 3 * STREAM)]
