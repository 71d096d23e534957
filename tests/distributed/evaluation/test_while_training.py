"""Evaluation on the ranks that train: the values of the same evaluation of a checkpoint, and no other training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flm_megatron.training.metrics.events import EvaluationEvent, read_events
from tests.support import REPOSITORY
from tests.support.prose import prose
from tests.support.runs import final_hash, flm, losses, make_data, make_run

TASKS = str(REPOSITORY / "examples" / "evaluation")
SEQUENCE_PARALLEL = ("--stages.0.parallel.sequence", "true")
INTERLEAVED = ("--stages.0.parallel", "{pipeline: 2, virtual_pipeline: 2}", "--stages.0.model.num_layers", "4")

BROKEN = """
task: broken
dataset_path: json
dataset_kwargs: {data_files: {test: broken.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{1 / (start | length)}}"
doc_to_choice: [a, b]
doc_to_target: 0
metric_list: [{metric: acc}]
"""
"""A task whose first question can be asked, and whose second raises."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenizer, datasets and a text."""
    folder = make_data(tmp_path_factory.mktemp("data"))
    (folder / "text.txt").write_text("".join(prose(2)))
    return folder


def evaluations(output: Path) -> list[EvaluationEvent]:
    return read_events(output, EvaluationEvent)


def last_checkpoint(output: Path) -> Path:
    return output / "checkpoints" / "small" / "step_00000008"


def bits_per_byte(output: Path, data: Path) -> float:
    """What `flm eval bpb` says of the last checkpoint on one process."""
    ended = flm(
        "eval", "bpb", last_checkpoint(output), "--text", f"prose={data / 'text.txt'}", "--json", output / "bpb"
    )
    assert ended.returncode == 0, ended.stderr
    found = json.loads((output / "bpb").read_text())
    return float(found["checkpoints"][0]["domains"]["prose"]["bits_per_byte"])


def test_values_are_those_of_the_checkpoint_and_training_is_the_same(data: Path, tmp_path: Path) -> None:
    asked = ["--evaluation.texts", f"[{{path: {data / 'text.txt'}, name: prose}}]", "--evaluation.interval_steps", "4"]
    asked += ["--evaluation.prompts", "['import', 'class B']", "--evaluation.max_new_tokens", "5"]
    evaluated, _ = make_run(data, tmp_path / "evaluated", *SEQUENCE_PARALLEL, *asked)
    plain, _ = make_run(data, tmp_path / "plain", *SEQUENCE_PARALLEL)
    for source in (evaluated, plain):
        ended = flm("train", source)
        assert ended.returncode == 0, ended.stderr
    assert losses(tmp_path / "evaluated") == losses(tmp_path / "plain")
    assert final_hash(tmp_path / "evaluated") == final_hash(tmp_path / "plain")
    found = evaluations(tmp_path / "evaluated")
    assert [event.step for event in found] == [4, 8] and not evaluations(tmp_path / "plain")
    again = bits_per_byte(tmp_path / "evaluated", data)
    assert found[1].values == {"bits_per_byte/prose": pytest.approx(again, rel=1e-5)}
    assert found[0].values["bits_per_byte/prose"] > again
    written = tmp_path / "written.jsonl"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("import\nclass B\n")
    command = ("generate", last_checkpoint(tmp_path / "evaluated"), "--prompts", prompts, "--max-new-tokens", "5")
    ended = flm(*command, "--json", "--out", written)
    assert ended.returncode == 0, ended.stderr
    texts = [json.loads(line)["completion"] for line in written.read_text().splitlines()]
    assert found[1].completions == tuple(zip(("import", "class B"), texts, strict=True)) and all(texts)


@pytest.mark.slow
def test_a_virtual_pipeline_gives_the_same_values(data: Path, tmp_path: Path) -> None:
    asked = [
        "--evaluation.texts",
        f"[{{path: {data / 'text.txt'}, name: prose}}]",
        "--evaluation.tasks",
        "[completion]",
    ]
    asked += ["--evaluation.tasks_folder", TASKS, "--evaluation.batch", "3"]
    source, _ = make_run(data, tmp_path, *INTERLEAVED, *asked)
    ended = flm("train", source)
    assert ended.returncode == 0, ended.stderr
    (found,) = evaluations(tmp_path)
    assert found.values["bits_per_byte/prose"] == pytest.approx(bits_per_byte(tmp_path, data), rel=1e-5)
    out = tmp_path / "tasks.json"
    command = ("eval", "harness", last_checkpoint(tmp_path), "--tasks", "completion", "--include-path", TASKS)
    ended = flm(*command, "--json", out)
    assert ended.returncode == 0, ended.stderr
    assert (
        found.values["completion/acc"]
        == json.loads(out.read_text())["checkpoints"]["small 8"]["completion"]["acc,none"]
    )


@pytest.mark.slow
def test_a_task_that_raises_is_said_and_training_goes_on(data: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.jsonl").write_text("".join(json.dumps({"start": text}) + "\n" for text in ("a", "")))
    (tmp_path / "broken.yaml").write_text(BROKEN)
    asked = ("--evaluation.tasks", "[broken]", "--evaluation.tasks_folder", str(tmp_path))
    source, _ = make_run(data, tmp_path / "run", *asked, "--evaluation.prompts", "[def]")
    ended = flm("train", source)
    assert ended.returncode == 0, ended.stderr
    (found,) = evaluations(tmp_path / "run")
    assert found.values == {} and len(found.completions) == 1
    assert "WARNING: tasks are not evaluated: ZeroDivision" in (tmp_path / "run" / "log.txt").read_text()
