"""`flm init`: every file that it writes is one that `flm config` accepts, whatever the answers."""

from __future__ import annotations

import builtins
import re
import shlex
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from flm_megatron.api.new_run.shapes import parse_size, shape_of, usual_rate
from flm_megatron.checkpoint.run_file import open_run
from flm_megatron.config.loader import load_run
from flm_megatron.model.parameters import parameter_count
from tests.support.runs import flm


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with a text."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.txt").write_text("Once upon a time.\n")
    return tmp_path


GRID = [
    "",
    "--gpus 2 --tokens 1e6",
    "--model 3M --grow",
    "--model 30M --gpus 3 --tokens 1e8 --name other",
    "--model tiny --grow",
    "--model 125M --gpu a100-40gb --gpus 1 --hours 24",
    *(
        pytest.param(options, marks=pytest.mark.slow)
        for options in (
            "--model 1.3B --gpu h100 --gpus 8 --hours 72 --grow",
            "--model 7B --gpu h100 --gpus 64 --tokens 140e9",
            "--model 70B --gpu mi300x --gpus 96",
            "--model tele-flm-52b --gpu a800 --gpus 64 --tokens 1e11",
        )
    ),
]


@pytest.mark.parametrize("options", GRID)
def test_what_is_written_is_accepted(place: Path, options: str) -> None:
    done = flm("init", "--yes", "--data", "book.txt", *options.split())
    assert done.returncode == 0, done.stderr
    checked = flm("config", "run.yaml")
    assert checked.returncode == 0, checked.stderr
    run = load_run(place / "run.yaml")
    assert len(run.stages) == (2 if "--grow" in options else 1)
    assert all(stage.tokens >= 1 for stage in run.stages)
    text = (place / "run.yaml").read_text()
    assert text.count("#") > 10 and max(map(len, text.splitlines())) < 400
    commands = [line.strip() for line in done.stdout.splitlines() if line.startswith("  flm ")]
    assert any("data build" in command for command in commands)
    assert "flm config run.yaml" in commands


def test_hours_are_those_of_all_stages_together(place: Path) -> None:
    options = "--model 7B --gpu h100 --gpus 8 --hours 10 --grow"
    done = flm("init", "--yes", "--data", "book.txt", *options.split())
    assert done.returncode == 0, done.stderr
    tokens = [stage.tokens for stage in load_run(place / "run.yaml").stages]
    speeds = [
        1e3 * float(found) for found in re.findall(r"([\d.]+)K tokens/s/device", (place / "run.yaml").read_text())
    ]
    assert len(speeds) == 2 and speeds[0] > 2 * speeds[1]
    hours = sum(number / speed / 8 / 3600 for number, speed in zip(tokens, speeds, strict=True))
    assert hours == pytest.approx(0.9 * 10, rel=0.015)


def test_commands_that_follow_can_be_pasted_into_a_shell(place: Path) -> None:
    text = place / "a tëxt; touch pwned # [x]: $(id)" / "it's.txt"
    text.parent.mkdir()
    text.write_text("Once upon a time.\n")
    out = "my run.yaml"
    done = flm("init", "--yes", "--data", str(text), "--out", out, "--gpus", "12", "--gpu", "h100", "--model", "125M")
    assert done.returncode == 0, done.stderr
    commands = [shlex.split(line) for line in done.stdout.splitlines() if line.startswith("  flm ")]
    assert [command[:3] for command in commands[:2]] == [["flm", "data", "tokenizer"], ["flm", "data", "build"]]
    assert commands[0][3] == commands[1][3] == str(text) and commands[2] == ["flm", "config", out]
    launch = commands[-1]
    nodes, each = (int(launch[launch.index(option) + 1]) for option in ("--nodes", "--processes-per-node"))
    assert (nodes, each) == (2, 6)
    assert load_run(place / out).data.train[0].path == "runs/run/data/train"


def test_a_hugging_face_folder_is_gone_on_with(place: Path) -> None:
    config = LlamaConfig(
        vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(place / "llama")
    done = flm("init", "--yes", "--data", "book.txt", "--model", "llama")
    assert done.returncode == 0, done.stderr
    run = open_run(place / "run.yaml")
    assert run.stages[0].model.hidden_size == 64 and run.checkpoint.initial == "llama"
    assert "grow" in flm("init", "--yes", "--data", "b.txt", "--model", "llama", "--grow", "--out", "b.yaml").stderr


def test_questions_are_asked_for_what_is_not_given(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter(["", "book.txt", "", "5000"])
    asked: list[str] = []

    def answer(question: str) -> str:
        """The next answer."""
        asked.append(question)
        return next(answers)

    monkeypatch.setattr(builtins, "input", answer)
    done = flm("init", "--model", "tiny", "--gpus", "2")
    assert done.returncode == 0, done.stderr
    assert [question.split()[0].rstrip(":,") for question in asked] == ["Accelerator", "Data", "Tokenizer", "Tokens"]
    stage = load_run(place / "run.yaml").stages[0]
    assert stage.parallel.data == 2 and stage.tokens == 5000


@pytest.mark.parametrize(("error", "status"), [(EOFError, 2), (KeyboardInterrupt, 130)])
def test_an_end_of_input_leaves_nothing(
    place: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException], status: int
) -> None:
    def end(question: str) -> str:
        """No answer."""
        raise error

    monkeypatch.setattr(builtins, "input", end)
    assert flm("init").returncode == status
    assert sorted(entry.name for entry in place.iterdir()) == ["book.txt"]


REFUSED: dict[str, tuple[str, str]] = {
    "unknown model": ("--model huge", "no preset"),
    "both budgets": ("--tokens 1e6 --hours 3", "not allowed with"),
    "hours of processors": ("--hours 3", "give tokens"),
    "too large": ("--model 70B --gpu h100 --gpus 1", "do not fit"),
    "a number without end": (f"--model {'9' * 400}T", "no preset"),
    "unknown accelerator": ("--gpu abacus", "abacus"),
    "no tokenizer of a dataset": ("--data gone/train", "tokenizer is not given"),
    "a tokenizer that is not there": ("--data gone/train --tokenizer gone.model --model 3M", "not there"),
    "a name with a slash": ("--name a/b", "--name"),
    "no number": ("--gpus many", "whole number"),
    "no folder": ("--out gone/run.yaml", "no folder"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_one_line_and_no_file(place: Path, case: str) -> None:
    options, words = REFUSED[case]
    done = flm("init", "--yes", "--data", "book.txt", *options.split())
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and words in done.stderr
    assert sorted(entry.name for entry in place.iterdir()) == ["book.txt"]


def test_a_file_is_never_overwritten(place: Path) -> None:
    (place / "run.yaml").write_text("mine")
    done = flm("init", "--yes", "--data", "book.txt")
    assert done.returncode == 2 and "exists already" in done.stderr and (place / "run.yaml").read_text() == "mine"


@pytest.mark.parametrize("text", ["1M", "3M", "30M", "125M", "1.3B", "7B", "70B", "1T"])
def test_shapes_are_near_their_size(text: str) -> None:
    size = parse_size(text)
    assert size is not None
    model = shape_of(size, 1000 if size < 10**7 else 32000)
    assert parameter_count(model) == pytest.approx(size, rel=0.15)
    assert model.hidden_size % model.num_attention_heads == 0


def test_rates_fall_with_the_size() -> None:
    rates: list[float] = [usual_rate(size) for size in (10**6, 10**8, 125 * 10**6, 10**9, 10**11, 10**13)]
    assert rates == sorted(rates, reverse=True) and usual_rate(125_000_000) == pytest.approx(6e-4)
