"""How the next token is chosen, against transformers' own processors, and text as it streams."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from flm_megatron.data.tokenizer import Tokenizer
from flm_megatron.errors import RequestError
from flm_megatron.evaluation.generation.sampling import Sampler, SamplingSettings, penalised, top_k, top_p
from flm_megatron.evaluation.perplexity.text_stream import TextStream
from tests.support.evaluation_cases import make_tokenizer

LOGITS = torch.randn(60, generator=torch.Generator().manual_seed(1)) * 3


@pytest.mark.parametrize("k", [1, 7, 100])
def test_top_k_is_that_of_transformers(k: int) -> None:
    from transformers import TopKLogitsWarper

    assert torch.equal(top_k(LOGITS, k), TopKLogitsWarper(k)(torch.zeros(1, 1), LOGITS[None])[0])


@pytest.mark.parametrize("p", [0.01, 0.5, 0.9, 0.999])
def test_top_p_is_that_of_transformers(p: float) -> None:
    from transformers import TopPLogitsWarper

    assert torch.equal(top_p(LOGITS, p), TopPLogitsWarper(p)(torch.zeros(1, 1), LOGITS[None])[0])


def test_the_repetition_penalty_is_that_of_transformers() -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    seen = torch.tensor([3, 9, 9, 41])
    expected = RepetitionPenaltyLogitsProcessor(1.4)(seen[None], LOGITS.clone()[None])[0]
    assert torch.equal(penalised(LOGITS, seen, 1.4), expected)


def test_draws_have_the_distribution_they_are_drawn_from() -> None:
    sampler = Sampler(SamplingSettings(temperature=2.0, top_k=5))
    counts = torch.zeros(60)
    for _ in range(4000):
        counts[sampler.choose(LOGITS, torch.tensor([]))] += 1
    exact = (top_k(LOGITS, 5) / 2.0).softmax(-1)
    assert (counts / 4000 - exact).abs().max() < 0.03 and counts[exact == 0].sum() == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"temperature": -1.0}, "temperature -1"), ({"top_k": -2}, "top-k -2"), ({"top_p": 0.0}, "top-p 0")],
)
def test_values_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        SamplingSettings(**settings)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A byte-fallback tokenizer that has never seen Chinese."""
    return make_tokenizer(tmp_path_factory.mktemp("stream") / "tokenizer.model")


def streamed(tokenizer: Tokenizer, text: str, *stop: str) -> tuple[list[str], TextStream]:
    """What is shown id by id."""
    stream = TextStream(tokenizer, tokenizer.encode("a prompt "), stop)
    return [*(stream.feed(token) for token in tokenizer.encode(text)), stream.finish()], stream


def test_characters_are_shown_whole(tokenizer: Tokenizer) -> None:
    shown, stream = streamed(tokenizer, "def 文字 - é ")
    assert "".join(shown) == stream.text == "def 文字 - é "
    assert "\ufffd" not in "".join(shown)
    assert "文" in shown  # as soon as its last byte is there


def test_nothing_of_a_stop_string_is_shown(tokenizer: Tokenizer) -> None:
    shown, stream = streamed(tokenizer, "one <_user> two", "<_user>", "never")
    assert stream.stopped and "".join(shown) == stream.text == "one "
    shown, stream = streamed(tokenizer, "one <_use", "<_user>")
    assert not stream.stopped and "".join(shown) == stream.text == "one <_use"
    assert "<" not in "".join(shown[:-1])


def test_what_ends_in_half_a_character_is_shown_at_the_end(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("é")[:1]
    stream = TextStream(tokenizer, tokenizer.encode("a"))
    assert stream.feed(ids[0]) == "" and stream.finish() == "\ufffd"


def test_the_prompt_file_is_read_as_lines_or_json(tmp_path: Path) -> None:
    from flm_megatron.evaluation.generation.run import read_prompts

    (lines := tmp_path / "a.txt").write_text("one\n\ntwo\n")
    (records := tmp_path / "a.jsonl").write_text('{"prompt": "one\\nmore"}\n')
    assert read_prompts(lines) == ["one", "two"] and read_prompts(records) == ["one\nmore"]
    records.write_text('{"text": "x"}\n')
    with pytest.raises(RequestError, match="line 1 has no field 'prompt'"):
        read_prompts(records)
