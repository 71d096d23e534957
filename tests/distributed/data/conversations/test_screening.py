"""`flm data screen` with a checkpoint: its scores are those of plain PyTorch, and the files add up."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from flm_megatron.checkpoint.lazy.initial import InitialCheckpoint
from flm_megatron.cli.main import main as flm
from flm_megatron.data.conversations.conversation import read_conversations
from flm_megatron.data.conversations.template import ChatTemplate
from tests.support.chat_cases import conversation, tokenizer, write
from tests.support.reference_model import reference_loss
from tests.support.sft_cases import MODEL, SEED, chat_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenizer, conversations and a checkpoint."""
    return chat_folder(tmp_path_factory.mktemp("screen"))


def expected(folder: Path, line: int) -> tuple[float, float]:
    """Loss and difficulty of a conversation in float64."""
    template = ChatTemplate("tele-flm", tokenizer(folder))
    item = read_conversations(folder / "pool.jsonl")[line - 1]
    pieces = template.pieces(item.messages, item.where)
    alone = [([template.tokenizer.eod], False), *[piece for piece in pieces if piece[1]]]
    tensors = {
        name: InitialCheckpoint(MODEL, SEED).read(name).double() for name in InitialCheckpoint(MODEL, SEED).tensors
    }
    losses = []
    for parts in (pieces, alone):
        ids = torch.tensor([i for part, _ in parts for i in part])
        trained = torch.tensor([answer for part, answer in parts for _ in part])[1:]
        losses.append(float(reference_loss(MODEL, tensors, ids[None, :-1], ids[None, 1:])[0][trained].mean()))
    return losses[0], math.exp(losses[0] - losses[1])


def test_a_pool_is_screened_by_a_checkpoint(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [conversation(i) | {"category": "odd" if i % 2 else "even"} for i in range(12)]
    write(folder / "pool.jsonl", [*records, records[3]])
    out = tmp_path / "screened"
    command = ["data", "screen", str(folder / "pool.jsonl"), "--out", str(out), "--keep", "6", "--clusters", "2"]
    command += ["--checkpoint", str(folder / "base"), "--quota", "odd=0.5", "even=0.5", "--batch", "5", "--tensor", "2"]
    assert flm(command) == 0
    assert "kept 6 of 13" in capsys.readouterr().out
    report = json.loads((out / "report.json").read_text())
    assert report["dropped"] == {"exact duplicate": 1, "not chosen": 6}
    assert report["kept_by_category"] == {"even": 3, "odd": 3}
    kept = [json.loads(line) for line in (out / "kept.jsonl").read_text().splitlines()]
    assert all(record in records for record in kept)
    dropped = [json.loads(line) for line in (out / "dropped.jsonl").read_text().splitlines()]
    assert dropped[-1]["line"] == 13 and dropped[-1]["reason"].endswith("pool.jsonl line 4") and len(dropped) == 7
    scored = [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]
    assert [line["line"] for line in scored] == list(range(1, 13)) and {line["cluster"] for line in scored} == {0, 1}
    for line in (scored[0], scored[7]):
        assert (line["loss"], line["difficulty"]) == pytest.approx(expected(folder, line["line"]), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--max-loss", "3"], "--max-loss needs a model to measure by"),
        (["--quota", "odd"], "not of the form CATEGORY=SHARE"),
        (["--similarity", "3"], "--similarity: 3 is above 1"),
        (["--checkpoint", "/nowhere"], "/nowhere is not a checkpoint"),
    ],
)
def test_a_wrong_request_is_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    command = ["data", "screen", str(folder / "chat.jsonl"), "--out", str(tmp_path / "out"), *options]
    assert flm(command) == 2
    errors = capsys.readouterr().err
    assert words in errors and len(errors.strip().splitlines()) == 1 and not (tmp_path / "out").exists()
