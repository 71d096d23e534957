"""Windows predict every token once, with as much context as was asked for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flm_megatron.errors import RequestError
from flm_megatron.evaluation.perplexity.windows import check_window, sliding_windows, window_batch


@given(predictions=st.integers(0, 300), length=st.integers(1, 50), data=st.data())
def test_every_prediction_is_scored_once_with_context(predictions: int, length: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, length))
    scored: list[int] = []
    for window in sliding_windows(predictions, length, stride):
        assert window.end - window.start <= length
        for position in range(window.scored, window.end):
            scored.append(position)
            assert position - window.start >= min(position, length - stride)
    assert scored == list(range(predictions))


def test_a_batch_weighs_only_what_is_scored() -> None:
    ids = list(range(100, 108))
    windows = list(sliding_windows(7, 4, 2))
    batch = window_batch([(ids, window) for window in windows], rows=4, length=4)
    assert batch.tokens[1].tolist() == [102, 103, 104, 105]
    assert batch.labels is not None and batch.labels[1].tolist() == [103, 104, 105, 106]
    assert batch.weights is not None and batch.weights.tolist()[0:2] == [[1, 1, 1, 1], [0, 0, 1, 1]]
    assert batch.weights.sum() == 7 and batch.weights[3].sum() == 0


@pytest.mark.parametrize("stride", [0, 9])
def test_a_stride_that_skips_tokens_is_refused(stride: int) -> None:
    with pytest.raises(RequestError, match=f"windows of 8 tokens cannot move by {stride}"):
        check_window(8, stride)
