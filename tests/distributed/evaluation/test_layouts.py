"""Scores and generated text under parallel layouts are those of one process."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from flm_megatron.cli.main import main
from flm_megatron.config.schema import ParallelConfig
from tests.support.evaluation_cases import TEXT, evaluated_in, make_folder
from tests.support.pool import Pool

LAYOUTS = [
    ParallelConfig(data=2),
    ParallelConfig(tensor=2, pipeline=2, data=1),
]
PROMPTS = ["import torch", "def", "class Batch:", "文", "raise"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenizer and Llama folder."""
    return make_folder(tmp_path_factory.mktemp("layouts"))


@pytest.fixture(scope="module")
def alone(pool: Pool, folder: Path) -> dict[str, Any]:
    """Everything on one process."""
    return pool.run(1, evaluate, ParallelConfig(data=1), folder)[0]


@pytest.mark.parametrize("parallel", LAYOUTS, ids=lambda p: f"t{p.tensor}p{p.pipeline}d{p.data}")
def test_a_layout_changes_nothing(pool: Pool, folder: Path, alone: dict[str, Any], parallel: ParallelConfig) -> None:
    results = pool.run(parallel.processes, evaluate, parallel, folder)
    for result in results:
        assert result["bits_per_byte"] == pytest.approx(alone["bits_per_byte"], rel=1e-6)
    found = results[0]
    assert found["texts"] == alone["texts"]
    assert [like["greedy"] for like in found["scores"]] == [like["greedy"] for like in alone["scores"]] != []
    for ours, theirs in zip(found["scores"], alone["scores"], strict=True):
        assert ours["log_likelihood"] == pytest.approx(theirs["log_likelihood"], rel=1e-5)
    assert "".join(found["streamed"].values()) and all(
        found["texts"][index] == text for index, text in found["streamed"].items()
    )


def evaluate(parallel: ParallelConfig, folder: Path) -> dict[str, Any]:
    """On each rank: bits per byte; on rank 0 also completions and likelihoods, three requests at a time."""
    from flm_megatron.engine.prepare import prepare

    prepare()
    from flm_megatron.distributed.world import layout
    from flm_megatron.evaluation.model import load_model
    from flm_megatron.evaluation.perplexity.bits_per_byte import WindowSettings, score_documents
    from flm_megatron.evaluation.session import hold_session

    evaluated = evaluated_in(folder)
    results: dict[str, Any] = {}

    def lead(session: Any) -> int:
        results.update(ask(session))
        return 0

    with layout(parallel, 120):
        chunk = load_model(evaluated, parallel)
        score = score_documents(chunk, evaluated.tokenizer, [TEXT[:900], "x"], WindowSettings(32, 16, 3))
        results["bits_per_byte"] = score.bits_per_byte
        hold_session(evaluated, parallel, None, 3, lead)
    return results


def ask(session: Any) -> dict[str, Any]:
    """Sampled completions, what was streamed of them, and likelihoods of continuations, one of them greedy."""
    from flm_megatron.evaluation.generation.generate import GenerationRequest
    from flm_megatron.evaluation.generation.sampling import SamplingSettings
    from flm_megatron.evaluation.perplexity.scoring import ScoringRequest

    encode = session.tokenizer.encode
    greedy = GenerationRequest(0, encode("import torch"), 6)
    sampled = [
        replace(greedy, index=i, prompt=encode(text), sampling=SamplingSettings(temperature=0.7, top_p=0.9))
        for i, text in enumerate(PROMPTS)
    ]
    streamed: dict[int, str] = {}

    def on_text(index: int, text: str) -> None:
        streamed[index] = streamed.get(index, "") + text

    texts = [completion.text for completion in session.generate(sampled, on_text)]
    best = session.generate([greedy])[0]
    scored = [ScoringRequest(0, [*greedy.prompt, *best.ids], len(greedy.prompt))]
    scored += [ScoringRequest(i + 1, encode("import " + text), 1) for i, text in enumerate(PROMPTS)]
    likelihoods = session.score(scored)
    assert likelihoods[0].greedy and not all(like.greedy for like in likelihoods)
    return {"texts": texts, "streamed": streamed, "scores": [asdict(like) for like in likelihoods]}


def test_the_command_starts_processes_of_its_own(folder: Path, tmp_path: Path) -> None:
    (prompts := tmp_path / "prompts.txt").write_text("import torch\ndef\n")
    outputs = []
    for layout in ([], ["--tensor", "2"]):
        out = tmp_path / f"out{len(layout)}.txt"
        command = ["generate", str(folder / "llama"), "--prompts", str(prompts), "--out", str(out)]
        assert main([*command, "--max-new-tokens", "5", "--batch", "2", *layout]) == 0
        outputs.append(out.read_text())
    assert outputs[0] == outputs[1] != ""


@pytest.mark.slow  # two cold starts
def test_a_chat_reaches_processes_that_have_no_terminal(folder: Path) -> None:
    command = [sys.executable, "-m", "flm_megatron.cli.main", "generate", str(folder / "llama"), "--chat"]
    said = "import torch\n\nand again\n"
    answers = []
    for layout in ([], ["--tensor", "2"]):
        done = subprocess.run(
            [*command, "--max-new-tokens", "4", "--system", "be brief", *layout],
            input=said,
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        answers.append(done.stdout)
    assert answers[0] == answers[1]
    assert answers[0].count("\n") >= 2
