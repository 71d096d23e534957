"""Bits per byte against transformers, against the closed form of a uniform model, and requests that are refused."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from flm_megatron.cli.main import main
from flm_megatron.data.tokenizer import open_tokenizer
from flm_megatron.distributed.world import one_process
from flm_megatron.evaluation.model import load_model
from flm_megatron.evaluation.perplexity.bits_per_byte import DomainScore, WindowSettings, score_documents, weighted
from tests.support.evaluation_cases import TEXT, evaluated_in, make_folder, make_tokenizer, reference_model

DOCUMENTS = [TEXT[:500], "x", "naïve — 文字\n" + TEXT[700:900]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenizer and Llama folder."""
    return make_folder(tmp_path_factory.mktemp("evaluation"))


def reference_nats(folder: Path, documents: list[str], length: int, stride: int) -> float:
    """The sliding-window loop of transformers' perplexity guide."""
    model, tokenizer = reference_model(folder), open_tokenizer(folder / "tokenizer.model")
    total = 0.0
    for text in documents:
        ids = torch.tensor([[tokenizer.eod, *tokenizer.encode(text)]])
        counted = 1
        end = min(length + 1, ids.shape[1])
        while True:
            inputs = ids[:, max(0, end - length - 1) : end]
            labels = inputs.clone()
            labels[:, : inputs.shape[1] - (end - counted)] = -100
            with torch.no_grad():
                total += float(model(inputs, labels=labels).loss.double()) * (end - counted)
            if end == ids.shape[1]:
                break
            counted, end = end, min(end + stride, ids.shape[1])
    return total


@pytest.mark.parametrize(("length", "stride"), [(64, 32), (16, 16), (10, 3)])
def test_nats_are_those_of_transformers(folder: Path, length: int, stride: int) -> None:
    evaluated = evaluated_in(folder)
    with one_process():
        from flm_megatron.config.schema import ParallelConfig

        chunk = load_model(evaluated, ParallelConfig())
        score = score_documents(chunk, evaluated.tokenizer, DOCUMENTS, WindowSettings(length, stride, batch=3))
    expected = reference_nats(folder, DOCUMENTS, length, stride)
    assert score.nats == pytest.approx(expected, rel=2e-6)
    assert score.text_bytes == len("".join(DOCUMENTS).encode())
    assert score.bits_per_byte == pytest.approx(expected / math.log(2) / score.text_bytes, rel=2e-6)


def test_a_uniform_model_takes_log2_of_the_vocabulary_for_each_token(folder: Path, tmp_path: Path) -> None:
    uniform = tmp_path / "uniform"
    shutil.copytree(folder / "llama", uniform)
    model = reference_model(folder)
    torch.nn.init.zeros_(model.lm_head.weight)
    model.save_pretrained(uniform)
    text, result = tmp_path / "text.txt", tmp_path / "result.json"
    text.write_text(TEXT[:300])
    arguments = ["eval", "bpb", str(uniform), "--text", f"code={text}", "--window", "16", "--json", str(result)]
    assert main(arguments) == 0
    found = json.loads(result.read_text())["checkpoints"][0]["domains"]["code"]
    tokens = len(open_tokenizer(folder / "tokenizer.model").encode(TEXT[:300]))
    assert found["tokens"] == tokens
    assert found["bits_per_byte"] == pytest.approx(tokens * math.log2(400) / 300, rel=1e-6)


def test_shares_weigh_domains() -> None:
    scores = {"a": DomainScore(math.log(2) * 10, 5, 10), "b": DomainScore(math.log(2) * 40, 5, 20)}
    assert weighted(scores, {"a": 3, "b": 1}) == pytest.approx((3 * 1 + 1 * 2) / 4)
    assert sum(scores.values(), DomainScore(0, 0, 0)).bits_per_byte == pytest.approx(50 / 30)


def test_a_table_has_a_row_for_each_domain(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("one", "two"):
        (tmp_path / f"{name}.txt").write_text(f"{name} " * 20)
    texts = [f"first={tmp_path}/one.txt", str(tmp_path / "two.txt")]
    shares = ["first=0.75", "two=0.25"]
    assert main(["eval", "bpb", str(folder / "llama"), "--text", *texts, "--weights", *shares, "--batch", "2"]) == 0
    rows = {line.split()[0]: float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()[1:]}
    assert set(rows) == {"first", "two", "all", "weighted"}
    assert rows["weighted"] == pytest.approx(0.75 * rows["first"] + 0.25 * rows["two"], abs=1e-4)


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The one line that a refused command leaves."""
    assert main([str(argument) for argument in arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


def test_requests_that_cannot_be_met_are_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (good := tmp_path / "good.txt").write_text("text")
    (latin := tmp_path / "latin.txt").write_bytes(b"na\xefve")
    (lines := tmp_path / "lines.jsonl").write_text('{"text": "a"}\n{"body": "b"}\n')
    bpb = ("eval", "bpb", folder / "llama", "--text")
    assert f"{latin} is not UTF-8: byte 0xef at offset 2" in refusal(capsys, *bpb, f"a={latin}")
    assert f"{lines} line 2 has no field 'text'" in refusal(capsys, *bpb, f"a={lines}")
    assert "is not there" in refusal(capsys, *bpb, "a=/nowhere")
    assert "weights are for b, texts for a" in refusal(capsys, *bpb, f"a={good}", "--weights", "b=1")
    assert "names 'a' twice" in refusal(capsys, *bpb, f"a={good}", f"a={good}")
    assert "windows of 8 tokens cannot move by 9" in refusal(
        capsys, *bpb, f"a={good}", "--window", "8", "--stride", "9"
    )
    assert "cannot be split over tensor size 4" in refusal(capsys, *bpb, f"a={good}", "--tensor", "4")
    assert "run.yaml" in refusal(capsys, "eval", "bpb", "--all-stages", tmp_path, "--text", f"a={good}")
    assert "one of the two" in refusal(capsys, "eval", "bpb", "--text", f"a={good}")


def test_another_tokenizer_is_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (text := tmp_path / "text.txt").write_text("text")
    other = make_tokenizer(tmp_path / "other.model", text=TEXT[::-1])
    bpb = ("eval", "bpb", folder / "llama", "--text", f"a={text}")
    line = refusal(capsys, *bpb, "--tokenizer", other.path)
    assert other.fingerprint[:12] in line and "is not the one that" in line
    shutil.copytree(folder / "llama", tmp_path / "bare")
    (tmp_path / "bare" / "tokenizer.model").unlink()
    assert "it names no tokenizer" in refusal(capsys, "eval", "bpb", tmp_path / "bare", "--text", f"a={text}")
