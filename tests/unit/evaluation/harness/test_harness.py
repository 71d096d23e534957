"""lm-evaluation-harness on a checkpoint: what it is told against transformers, and tasks that are refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import REPOSITORY

pytest.importorskip("lm_eval", reason="lm_eval is not installed (extra `eval`)")

from lm_eval.api.instance import Instance

from flm_megatron.cli.main import main
from flm_megatron.config.schema import ParallelConfig
from flm_megatron.data.conversations.template import TELE_FLM, ChatTemplate
from flm_megatron.distributed.world import one_process
from flm_megatron.errors import RequestError
from flm_megatron.evaluation.harness.model import HarnessModel
from flm_megatron.evaluation.model import load_model
from flm_megatron.evaluation.session import Session
from tests.support.evaluation_cases import TEXT, evaluated_in, make_folder, reference_model

TASKS = REPOSITORY / "examples" / "evaluation"
CONTEXT = 32
LONG = " ".join(TEXT.split()[:60])
PAIRS = [("import ", "torch"), ("", "def"), ("class Batch:\n", "    tokens: Tensor\n"), (LONG, " ru le")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenizer and Llama folder."""
    return make_folder(tmp_path_factory.mktemp("harness"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data of tasks is not kept in the home folder."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def with_model(folder: Path, ask: Callable[[HarnessModel], Any], batch: int = 3) -> Any:
    """What `ask` makes of the harness's model over the folder's weights."""
    evaluated = evaluated_in(folder)
    with one_process():
        session = Session([load_model(evaluated, ParallelConfig())], evaluated.tokenizer, batch)
        return ask(HarnessModel(session, CONTEXT, ChatTemplate(TELE_FLM, evaluated.tokenizer)))


def instances(kind: Any, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    """Requests as the harness makes them."""
    return [Instance(request_type=kind, doc={}, arguments=args, idx=i) for i, args in enumerate(arguments)]


def reference(folder: Path, ids: list[int], start: int) -> tuple[float, bool]:
    """Log-likelihood of ids from `start` on, and whether all are the likeliest, by transformers in float64."""
    with torch.no_grad():
        logits = reference_model(folder)(torch.tensor([ids])).logits[0].double()
    predicted, targets = logits[start - 1 : -1].log_softmax(-1), torch.tensor(ids[start:])
    return float(predicted.gather(1, targets[:, None]).sum()), bool((predicted.argmax(-1) == targets).all())


def test_log_likelihoods_are_those_of_transformers(folder: Path) -> None:
    tokenizer = evaluated_in(folder).tokenizer
    found = with_model(folder, lambda model: model.loglikelihood(instances("loglikelihood", PAIRS), disable_tqdm=True))
    for (context, continuation), (value, greedy) in zip(PAIRS, found, strict=True):
        whole = tokenizer.encode(context + continuation)
        start = len(tokenizer.encode(context.rstrip()))
        ids = (whole[:start] or [tokenizer.eod])[-(CONTEXT + 1 - len(whole[start:])) :]
        expected = reference(folder, [*ids, *whole[start:]], len(ids))
        assert value == pytest.approx(expected[0], rel=1e-5)
        assert greedy == expected[1]


def test_a_greedy_continuation_is_known_as_one(folder: Path) -> None:
    def ask(model: HarnessModel) -> Any:
        context = model.tok_encode("import torch")
        options = {"until": [], "max_gen_toks": 1}
        text = model.generate_until(instances("generate_until", [("import torch", options)]))[0]
        token = model.tok_encode("import torch" + text)[len(context) :]
        return model._loglikelihood_tokens([(("", ""), context, token), (("", ""), context, [5])])

    (_, greedy), (_, other) = with_model(folder, ask)
    assert greedy and not other


def test_rolling_log_likelihood_counts_every_token_once(folder: Path) -> None:
    texts = [TEXT[:60], TEXT[:500]]
    found = with_model(
        folder, lambda m: m.loglikelihood_rolling(instances("loglikelihood_rolling", [(text,) for text in texts]))
    )
    tokenizer = evaluated_in(folder).tokenizer
    for text, value in zip(texts, found, strict=True):
        ids = [tokenizer.eod, *tokenizer.encode(text)]
        total, end = 0.0, 1
        while end < len(ids):
            counted, end = end, min(CONTEXT + 1 if end == 1 else end + CONTEXT // 2, len(ids))
            first = max(0, end - CONTEXT - 1)
            total += reference(folder, ids[first:end], counted - first)[0]
        assert value == pytest.approx(total, rel=1e-5)


def test_completions_end_where_the_task_says(folder: Path) -> None:
    def ask(model: HarnessModel) -> list[str]:
        whole = model.generate_until(instances("generate_until", [("def", {"until": [], "max_gen_toks": 12})]))[0]
        options = {"until": whole[4:6], "max_gen_toks": 12, "do_sample": False, "temperature": 0.7}
        return [whole, *model.generate_until(instances("generate_until", [("def", options)]))]

    whole, stopped = with_model(folder, ask)
    assert stopped == whole[: whole.index(whole[4:6])]


def test_unknown_generation_options_are_refused(folder: Path) -> None:
    requests = instances("generate_until", [("def", {"num_beams": 4})])
    with pytest.raises(RequestError, match="options num_beams"):
        with_model(folder, lambda model: model.generate_until(requests))


def test_chats_are_written_in_the_template(folder: Path) -> None:
    tokenizer = evaluated_in(folder).tokenizer
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    ids = with_model(folder, lambda model: model.tok_encode(model.apply_chat_template(messages)))
    assert ids == [*tokenizer.encode("<_user>a<_bot>b"), tokenizer.eod, *tokenizer.encode("<_user>c<_bot>")]


def test_tasks_run_over_local_files(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result, samples = tmp_path / "result.json", tmp_path / "samples.jsonl"
    tasks = ["--tasks", "teleeval", "alignbench", "completion", "prose", "--include-path", str(TASKS)]
    files = ["--json", str(result), "--samples", str(samples)]
    assert main(["eval", "harness", str(folder / "llama"), *tasks, *files, "--template", "tele-flm"]) == 0
    scores = json.loads(result.read_text())["checkpoints"]["llama"]
    assert 0 <= scores["completion"]["acc,none"] <= 1 and "exact_match,none" in scores["teleeval"]
    assert "completion acc" in capsys.readouterr().out
    records = [json.loads(line) for line in samples.read_text().splitlines()]
    judged = [record for record in records if record["task"] == "alignbench"]
    assert [record["target"] for record in judged] == ["Thank you for the careful review.", "Yes."]
    assert all(isinstance(record["answers"][0], str) for record in judged)
    texts = [json.loads(line)["text"] for line in (TASKS / "prose.jsonl").read_text().splitlines()]
    tokenizer = evaluated_in(folder).tokenizer
    nats = -sum(reference(folder, [tokenizer.eod, *tokenizer.encode(text)], 1)[0] for text in texts)
    expected = nats / math.log(2) / sum(len(text.encode()) for text in texts)
    assert scores["prose"]["bits_per_byte,none"] == pytest.approx(expected, rel=2e-2)  # windows of 64 tokens


def test_tasks_that_cannot_be_had_are_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = "test_split: test\noutput_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
    (tmp_path / "far.yaml").write_text(f"task: far\ndataset_path: some-hub/some-data\n{common}")
    local = "dataset_path: json\ndataset_kwargs: {data_files: {test: nowhere.jsonl}}\n"
    (tmp_path / "gone.yaml").write_text(f"task: gone\n{local}{common}")
    for task, message in (
        ("far", "needs the network"),
        ("gone", "nowhere.jsonl"),
    ):
        assert message in refusal(folder, tmp_path, task, capsys)


@pytest.mark.slow  # lm_eval looks through all of its own tasks first
def test_an_unknown_task_is_one_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "there is no task 'missing_task'" in refusal(folder, tmp_path, "missing_task", capsys)


def refusal(folder: Path, tasks: Path, name: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a refused task leaves."""
    arguments = ["eval", "harness", str(folder / "llama"), "--tasks", name, "--include-path", str(tasks)]
    assert main(arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("flm eval")]
    assert len(lines) == 1
    return lines[0]
