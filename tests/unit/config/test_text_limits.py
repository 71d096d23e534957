"""YAML and JSON of any depth, size and number: one line, soon."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from flm_megatron.cli.main import main
from flm_megatron.config.loader import run_from_dict
from flm_megatron.config.schema import ModelConfig
from flm_megatron.config.yaml_text import parse_yaml
from flm_megatron.data.conversations.conversation import read_conversations
from flm_megatron.data.corpus.corpus import Corpus
from flm_megatron.data.corpus.description import read_description
from flm_megatron.errors import DamagedError, FlmError, RequestError
from flm_megatron.growth.distance import read_distances
from flm_megatron.json_text import parse_json
from flm_megatron.planner.loss_law import read_laws
from flm_megatron.training.metrics.events import OtherEvent, read_lines
from tests.support import data_cases


def aliases(line: str, count: int = 40) -> str:
    """Lines of which each repeats the one before it several times."""
    return "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {line.format(i - 1)}\n" for i in range(1, count))


YAML = {
    "brackets": "[" * 5_000,
    "closed brackets": "a: " + "[" * 5_000 + "]" * 5_000,
    "100,000 brackets": "{a: " * 100_000,
    "sections": "\n".join(" " * depth + "a:" for depth in range(300)),
    "aliases of aliases": aliases("[*a{0}, *a{0}, *a{0}, *a{0}]"),
    "merges of merges": aliases("{{<<: [*a{0}, *a{0}, *a{0}]}}"),
    "an alias in another, often": aliases("[*a{0}]", 300),
    "an alias of itself": "a: &a [*a]",
    "a key of aliases": aliases("[*a{0}, *a{0}]") + "? [*a39]\n: 1",
    "very much": "a: [" + "1, " * 500_000 + "1]",
    "a very long text": "a: '" + "x" * 2_000_000 + "'",
    "an integer of 10,000 digits": "a: " + "9" * 10_000,
    "a day that there is not": "a: 2024-13-45",
    "two documents": "a: 1\n---\nb: 2",
    "a control character": "a: \x00",
}


@pytest.mark.parametrize("case", YAML)
def test_yaml_that_goes_too_far_is_one_line(case: str) -> None:
    began = time.process_time()
    with pytest.raises(RequestError, match=r"^run\.yaml") as refused:
        parse_yaml(YAML[case], "run.yaml")
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 300
    assert time.process_time() - began < 3


def test_aliases_in_measure_are_read() -> None:
    assert parse_yaml("a: &a {x: 1}\nb: [*a, *a]\nc: {<<: *a, y: 2}", "x")["c"] == {"x": 1, "y": 2}


@pytest.mark.parametrize("case", ["brackets", "aliases of aliases", "an integer of 10,000 digits"])
def test_the_command_says_it_and_ends_with_status_two(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text(YAML[case])
    assert main(["config", str(tmp_path / "run.yaml")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_file_without_end_is_no_run_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "/dev/zero"]) == 2
    assert "/dev/zero" in capsys.readouterr().err


def test_files_of_laws_are_read_in_the_same_way(tmp_path: Path) -> None:
    (tmp_path / "laws.yaml").write_text(YAML["brackets"])
    with pytest.raises(RequestError, match=r"cannot read laws .*nested"):
        read_laws(tmp_path / "laws.yaml", ["a"])


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"num_layers": True}, "stages.0.model.num_layers: True does not fit, expected integer"),
        ({"num_query_groups": False}, "num_query_groups: False does not fit, expected integer or null"),
        ({"norm_epsilon": True}, "norm_epsilon: True does not fit, expected number"),
        ({"norm_epsilon": 10**400}, "norm_epsilon: 1000000.* does not fit, expected number"),
        ({"mup": {"base_hidden_size": True}}, "mup.base_hidden_size: True does not fit"),
    ],
)
def test_booleans_and_endless_numbers_are_no_numbers(model: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        run_from_dict({"stages": [{"name": "a", "model": model}]})


@pytest.mark.parametrize("stage", [{"parallel": {"pipeline_layers": [1, True]}}, {"optimizer": {"betas": [True, 0.9]}}])
def test_booleans_in_lists_are_no_numbers(stage: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="True does not fit"):
        run_from_dict({"stages": [{"name": "a", **stage}]})


def test_whole_floats_are_integers_and_integers_are_numbers() -> None:
    run = run_from_dict({"stages": [{"name": "a", "tokens": 2.5e12, "model": {"num_layers": 2.0, "rope_theta": 5}}]})
    stage = run.stages[0]
    assert (stage.tokens, stage.model.num_layers, stage.model.rope_theta) == (2_500_000_000_000, 2, 5.0)
    assert type(stage.tokens) is int and type(stage.model.rope_theta) is float
    with pytest.raises(ValueError, match="boolean"):
        ModelConfig(num_layers=True)


JSON = {
    "5,000 brackets": "[" * 5_000,
    "100,000 brackets": '{"text": ' * 100_000,
    "closed brackets": '{"text": ' + "[" * 500 + "]" * 500 + "}",
    "an integer of 10,000 digits": '{"text": ' + "9" * 10_000 + "}",
    "half a line": '{"text": "a',
    "another beginning": '\ufeff{"text": "a"}',
    "a list": '["text"]',
    "a number": "5",
}


@pytest.mark.parametrize("case", JSON)
def test_a_line_of_json_that_goes_too_far_is_named(case: str, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "fine", "messages": [{"role": "user", "content": "a"}]}\n' + JSON[case] + "\n")
    with pytest.raises(RequestError, match=r"x\.jsonl line 2") as refused:
        list(Corpus([path]).documents())
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 300
    path.write_text("\n" + JSON[case] + "\n")
    with pytest.raises(RequestError, match=r"x\.jsonl line 2"):
        read_conversations(path)


def test_large_numbers_beside_the_text_are_no_matter(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "fine", "id": 340282366920938463463374607431768211456}\n')
    assert list(Corpus([path]).documents()) == ["fine"]


@pytest.mark.parametrize("role", ["[" * 80 + "]" * 80, '"' + "x" * 100_000 + '"', "null"])
def test_a_strange_role_is_one_short_line(role: str, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(f'{{"messages": [{{"role": {role}, "content": "a"}}]}}\n')
    with pytest.raises(RequestError, match="has the role") as refused:
        read_conversations(path)
    assert len(str(refused.value)) < 300


@pytest.mark.parametrize("case", JSON)
def test_other_json_files_are_read_in_the_same_way(case: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(JSON[case] + '\n{"step": 1}\n')
    assert read_lines(tmp_path)[-1] == OtherEvent({"step": 1})
    (tmp_path / "distances.json").write_text(JSON[case])
    with pytest.raises(FlmError, match=r"distances\.json holds no layer distances"):
        read_distances(str(tmp_path / "distances.json"), "cosine")


@pytest.mark.parametrize(
    "change",
    [{"documents": "9"}, {"documents": -1}, {"documents": True}, {"tokens": 1.5}, {"tokenizer": 5}, {"eod": []}],
)
def test_a_description_of_other_types_is_damage(change: dict[str, Any], tmp_path: Path) -> None:
    data_cases.datasets(tmp_path, {"a": 6})
    file = tmp_path / "a.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(DamagedError, match=r"a\.json"):
        read_description(tmp_path / "a")


def test_what_the_program_relies_on_says_each_thing_once_and_in_64_bits() -> None:
    for text in ('{"a": 1, "a": 2}', '{"a": [{"b": 1, "b": 1}]}', "[9999999999999999999]"):
        parse_json(text, "x")
        with pytest.raises(DamagedError, match=r"^x is not JSON that can be read"):
            parse_json(text, "x", DamagedError, strict=True)
    assert parse_json(b'{"a": [-999999999999999999, 1e400]}', "x", strict=True)["a"][0] == -999999999999999999
