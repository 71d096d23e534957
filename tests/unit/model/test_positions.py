"""Learned positions: which ones tokens have, alone and beside others."""

from __future__ import annotations

import pytest
import torch

from flm_megatron.config.schema import ModelConfig
from flm_megatron.distributed.world import one_process
from flm_megatron.errors import RequestError
from flm_megatron.model.attention.segments import segment_ends
from flm_megatron.model.positions import positions_of
from tests.support.filled_model import filled_model, seeded_batch
from tests.support.reference_model import random_tensors

MODEL = ModelConfig(
    num_layers=2, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, vocab_size=201, position="learned",
    max_positions=12,
)  # fmt: skip
SEGMENTS = torch.tensor([[1] * 5 + [2] * 7, [1] * 12])


def test_positions_begin_anew_with_each_segment_and_behind_a_mask() -> None:
    tokens = torch.zeros(2, 12, dtype=torch.long)
    expected = torch.tensor([[*range(5), *range(7)], [*range(12)]])
    hidden = (SEGMENTS[:, :, None] != SEGMENTS[:, None, :]).unsqueeze(1)
    assert torch.equal(positions_of(tokens, segment_ends(SEGMENTS), 0), expected)
    assert torch.equal(positions_of(tokens, hidden, 0), expected)
    assert torch.equal(positions_of(tokens[:, 8:], hidden[:, :, 8:], 8), expected[:, 8:])
    assert torch.equal(positions_of(tokens[:, :3], None, 4), torch.tensor([[4, 5, 6]] * 2))


def test_a_packed_segment_is_what_it_is_alone() -> None:
    with one_process():
        chunk = filled_model(MODEL, random_tensors(MODEL))[0]
        tokens, _ = seeded_batch(MODEL, batch=2, sequence=12)
        packed = chunk(tokens, attention_mask=segment_ends(SEGMENTS))[0, :, :201]
        alone = torch.cat([chunk(part)[0, :, :201] for part in (tokens[:1, :5], tokens[:1, 5:])])
        torch.testing.assert_close(packed, alone)
        with pytest.raises(RequestError, match=r"a sequence has 13 tokens, the model has 12 learned positions"):
            chunk(torch.zeros(1, 13, dtype=torch.long))
