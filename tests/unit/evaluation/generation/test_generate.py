"""Generation: the tokens of transformers, whatever the batch, and the same with the cache as without."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flm_megatron.cli.main import main
from flm_megatron.config.schema import ModelConfig, ParallelConfig, RopeScaling
from flm_megatron.distributed.world import one_process
from flm_megatron.errors import RequestError
from flm_megatron.evaluation.generation.generate import GenerationRequest, generate
from flm_megatron.evaluation.generation.sampling import SamplingSettings
from flm_megatron.evaluation.generation.terminal import line_reader, relayed_lines
from flm_megatron.evaluation.model import load_model
from flm_megatron.model.forward import Batch, forward
from tests.support.evaluation_cases import MODEL, evaluated_in, make_folder, reference_model

PROMPTS = ["import torch", "def", "class Batch:\n    tokens: Tensor", "文"]
NEW = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenizer and Llama folder."""
    return make_folder(tmp_path_factory.mktemp("generation"))


def requests(tokenizer: Any, sampling: SamplingSettings, new: int = NEW) -> list[GenerationRequest]:
    """All prompts."""
    return [GenerationRequest(i, tokenizer.encode(text), new, (), sampling) for i, text in enumerate(PROMPTS)]


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_tokens_are_those_of_transformers(folder: Path, penalty: float) -> None:
    evaluated, reference = evaluated_in(folder), reference_model(folder)
    with one_process():
        chunk = load_model(evaluated, ParallelConfig())
        asked = requests(evaluated.tokenizer, SamplingSettings(repetition_penalty=penalty))
        found = generate(chunk, evaluated.tokenizer, asked)
    for request, completion in zip(asked, found, strict=True):
        ids = torch.tensor([list(request.prompt)])
        with torch.no_grad():
            output = reference.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=NEW,
                do_sample=False,
                repetition_penalty=penalty,
                eos_token_id=evaluated.tokenizer.eod,
            )
        expected = output[0, ids.shape[1] :].tolist()
        assert completion.ids == [i for i in expected if i != evaluated.tokenizer.eod]
        assert completion.finish_reason == ("eod" if expected[-1] == evaluated.tokenizer.eod else "length")
        assert completion.text == evaluated.tokenizer.decode(completion.ids)


def test_sampling_does_not_depend_on_the_batch(folder: Path) -> None:
    evaluated = evaluated_in(folder)
    sampling = SamplingSettings(temperature=0.9, top_k=50, top_p=0.95, seed=5)
    with one_process():
        chunk = load_model(evaluated, ParallelConfig())
        asked = requests(evaluated.tokenizer, sampling)
        together = generate(chunk, evaluated.tokenizer, asked)
        alone = [generate(chunk, evaluated.tokenizer, [request])[0] for request in asked]
        again = generate(chunk, evaluated.tokenizer, requests(evaluated.tokenizer, replace(sampling, seed=6)))
    assert together == alone
    assert [c.ids for c in together] != [c.ids for c in again]


@pytest.mark.parametrize(
    "model",
    [
        replace(MODEL, query_key_norm=True, rope_scaling=RopeScaling("yarn", 4.0, 8, beta_fast=1.0, beta_slow=0.1)),
        replace(MODEL, parallel_residual=True, rotary_percent=0.5),
        replace(MODEL, position="xpos", xpos_scale_base=8.0, sliding_window=4),
        replace(MODEL, position="learned", max_positions=12),
    ],
    ids=["rope", "neox", "xpos", "learned"],
)
def test_the_cache_gives_the_logits_of_whole_forward_passes(folder: Path, model: ModelConfig) -> None:
    evaluated = evaluated_in(folder, model)
    ids = torch.randint(4, 400, (2, 12), generator=torch.Generator().manual_seed(0))
    with one_process():
        chunk = load_model(evaluated, ParallelConfig())
        whole = forward(chunk, [Batch(ids)], 1, lambda _, logits: logits.clone())[0]
        with chunk.cached(12):
            for start, end in ((0, 5), (5, 9), (9, 10), (10, 11), (11, 12)):  # several new positions, then single ones
                logits = forward(chunk, [Batch(ids[:, start:end])], 1, lambda _, logits: logits.clone())[0]
                assert logits.shape[1] == 1
                torch.testing.assert_close(logits[:, 0], whole[:, end - 1], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(forward(chunk, [Batch(ids)], 1, lambda _, logits: logits.clone())[0], whole)


def test_learned_positions_count_from_the_first_token_of_each_prompt_and_end(folder: Path) -> None:
    evaluated = evaluated_in(folder, replace(MODEL, position="learned", max_positions=32))
    assert evaluated.window() == 32
    with pytest.raises(RequestError, match=r"windows of 33 tokens: .* has 32 learned positions"):
        evaluated.window(33)
    with one_process():
        chunk = load_model(evaluated, ParallelConfig())
        most = max(len(request.prompt) for request in requests(evaluated.tokenizer, SamplingSettings()))
        asked = requests(evaluated.tokenizer, SamplingSettings(temperature=0.9, seed=5), 32 - most)
        together = generate(chunk, evaluated.tokenizer, asked)
        assert together == [generate(chunk, evaluated.tokenizer, [request])[0] for request in asked]
        with pytest.raises(RequestError, match=r"go beyond the model's 32 learned positions: give fewer"):
            generate(chunk, evaluated.tokenizer, [replace(asked[0], max_new_tokens=32)])


def test_a_stop_string_ends_a_completion_and_is_not_part_of_it(folder: Path) -> None:
    evaluated = evaluated_in(folder)
    with one_process():
        chunk = load_model(evaluated, ParallelConfig())
        prompt = evaluated.tokenizer.encode("import torch")
        free = generate(chunk, evaluated.tokenizer, [GenerationRequest(0, prompt, NEW)])[0]
        stop = free.text[6:8]
        shown: list[str] = []
        request = GenerationRequest(0, prompt, NEW, (stop,))
        found = generate(chunk, evaluated.tokenizer, [request], lambda _, text: shown.append(text))[0]
    assert found.finish_reason == "stop"
    assert found.text == free.text[: free.text.index(stop)] == "".join(shown)
    assert len(found.ids) < len(free.ids)


def test_a_chat_remembers_what_was_said(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("import torch\n\nagain\n"))
    settings = ["--max-new-tokens", "5", "--system", "be brief", "--no-stream"]
    assert main(["generate", str(folder / "llama"), "--chat", *settings]) == 0
    answers = capsys.readouterr().out
    evaluated = evaluated_in(folder)
    encode, eod = evaluated.tokenizer.encode, evaluated.tokenizer.eod
    first = encode("<_system>be brief<_user>import torch<_bot>")
    with one_process():
        chunk = load_model(evaluated, ParallelConfig())
        one = generate(chunk, evaluated.tokenizer, [GenerationRequest(0, first, 5)])[0]
        again = [*first, *encode(one.text), eod, *encode("<_user>again<_bot>")]
        two = generate(chunk, evaluated.tokenizer, [GenerationRequest(0, again, 5)])[0]
    assert answers == f"{one.text}\n{two.text}\n"


def test_lines_reach_a_process_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n"))
    with relayed_lines() as address, line_reader(address) as read:
        assert [read("> "), read("> "), read("> ")] == ["one", "two", None]


def test_requests_of_the_command_that_cannot_be_met_are_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (latin := tmp_path / "prompts.txt").write_bytes(b"na\xefve")
    command = ["generate", str(folder / "llama")]
    for arguments, message in (
        (["--prompts", str(latin)], "is not UTF-8: byte 0xef at offset 2"),
        (["--prompt", "a", "--system", "b"], "--system is for --chat"),
        (["--prompt", "a", "--top-p", "1.5"], "--top-p: 1.5 is above 1"),
        (["--prompt", "a", "--pipeline", "8"], "pipeline"),
        (["--chat", "--template", "/nowhere.jinja"], "template /nowhere.jinja cannot be read"),
    ):
        assert main([*command, *arguments]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and message in lines[0]


def test_an_empty_prompt_or_no_room_is_refused() -> None:
    with pytest.raises(RequestError, match="a prompt of 0 ids"):
        GenerationRequest(0, [])
    with pytest.raises(RequestError, match="0 new"):
        GenerationRequest(0, [1], 0)
