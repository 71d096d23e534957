"""Generation with the tokenizer of a published model: rows that only fill up its embedding, and several ends."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from flm_megatron.data.tokenizer import open_tokenizer
from flm_megatron.evaluation.generation.generate import GenerationRequest, _Row
from tests.support.tokenizer_cases import END, START, TURN, hugging_face


def test_only_ids_of_tokens_are_chosen(tmp_path: Path) -> None:
    row = _Row(GenerationRequest(0, [5]), hugging_face(tmp_path))
    logits = torch.zeros(512)
    logits[450], logits[77] = 9.0, 1.0
    assert row.choose(logits) == 77


def test_an_answer_ends_with_any_of_the_ids_that_the_files_name(tmp_path: Path) -> None:
    hugging_face(tmp_path, eos=TURN)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 2]}))
    tokenizer = open_tokenizer(tmp_path)
    names = tokenizer.special_tokens
    assert tokenizer.eod == names[TURN] and tokenizer.ends == {names[TURN], names[END]}
    for name, reason in ((TURN, "eod"), (END, "eod"), (START, None)):
        row = _Row(GenerationRequest(0, [5]), tokenizer)
        row.take(names[name], None)
        assert row.reason == reason
