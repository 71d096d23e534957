"""Run files: what is read, how defaults, presets and overrides are merged, and what is refused in which words."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

from flm_megatron.config.loader import dump_run, load_run, resolve_vocabulary, run_from_dict, run_to_dict
from flm_megatron.config.schema import RunConfig
from flm_megatron.errors import Mistakes, RequestError

RUN = """
name: try
data: {sequence_length: 64, train: [{path: a}, {path: b, weight: 2}]}
defaults:
  precision: bf16
  model: {num_layers: 6, mup: {base_hidden_size: 64}}
  optimizer: {lr: 1e-3, betas: [0.9, 0.99]}
stages:
  - name: small
    tokens: 2.5e12
  - name: large
    model: {hidden_size: 256, mup: {enabled: true}}
    optimizer: {lr: 5E-4}
    growth: {}
"""


def _load(folder: Path, text: str, *overrides: str) -> RunConfig:
    path = folder / "run.yaml"
    path.write_text(text)
    return load_run(path, overrides)


def _refusal(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(RequestError) as refused:
        _load(folder, text, *overrides)
    message = str(refused.value)
    assert "\n" not in message
    return message.replace(str(folder / "run.yaml"), "FILE")


def test_defaults_lie_under_every_stage(tmp_path: Path) -> None:
    small, large = _load(tmp_path, RUN).stages
    assert (small.precision, large.precision) == ("bf16", "bf16")
    assert (small.model.num_layers, small.model.hidden_size, small.model.mup.enabled) == (6, 128, False)
    assert (large.model.num_layers, large.model.hidden_size) == (6, 256)
    assert (large.model.mup.enabled, large.model.mup.base_hidden_size) == (True, 64)
    assert (small.optimizer.lr, large.optimizer.lr, large.optimizer.betas) == (1e-3, 5e-4, (0.9, 0.99))
    assert small.growth is None and large.growth is not None


def test_numbers_may_be_written_with_an_exponent(tmp_path: Path) -> None:
    run = _load(tmp_path, RUN)
    assert run.stages[0].tokens == 2_500_000_000_000
    assert isinstance(run.stages[0].tokens, int)
    for text, value in {
        "1e-4": 1e-4,
        "1.5E+3": 1500.0,
        "+.5e1": 5.0,
        "2_000.5e0": 2000.5,
        "3": 3.0,
        ".25": 0.25,
    }.items():
        assert _load(tmp_path, f"stages: [{{optimizer: {{lr: {text}}}}}]").stages[0].optimizer.lr == value


def test_overrides_reach_every_kind_of_place(tmp_path: Path) -> None:
    run = _load(
        tmp_path,
        RUN,
        *["--stages.0.parallel.tensor", "2", "--stages.large.tokens=1e9", "--name", "x", "--tokenizer", "null"],
        *["--stages.1.growth.hidden", "mask", "--data.train.1.weight=null", "--defaults.micro_batch", "4"],
        *["--stages.small.parallel.pipeline_layers", "[3, 3]", "--stages.small.optimizer.min_lr", "-0.5"],
    )
    small, large = run.stages
    assert (run.name, run.tokenizer) == ("x", None)
    assert (small.parallel.tensor, small.parallel.pipeline_layers, small.optimizer.min_lr) == (2, [3, 3], -0.5)
    assert large.tokens == 10**9 and large.growth and large.growth.hidden == "mask"
    assert run.data.train[1].weight is None
    assert [stage.micro_batch for stage in run.stages] == [4, 4]


def test_overrides_of_a_mapping_are_values_as_they_are(tmp_path: Path) -> None:
    (file := tmp_path / "run.yaml").write_text(RUN)
    sections = {"tensor": 4}
    overrides = {"output": tmp_path, "name": "1e9", "stages.small.parallel": sections, "stages.0.parallel.pipeline": 2}
    run = load_run(file, overrides)
    assert (run.output, run.name) == (str(tmp_path), "1e9")
    assert (run.stages[0].parallel.tensor, run.stages[0].parallel.pipeline) == (4, 2)
    assert sections == {"tensor": 4}
    with pytest.raises(RequestError, match="7 is not the path of a field"):
        load_run(file, {7: 1})  # type: ignore[dict-item]
    with pytest.raises(RequestError, match="no element is named 'huge'"):
        load_run(file, {"stages.huge.tokens": 1})


def test_override_opens_a_section_that_was_null_or_absent(tmp_path: Path) -> None:
    text = "stages: [{name: a}, {name: b, growth: null}]"
    assert _load(tmp_path, text, "--stages.b.growth.ffn", "mask").stages[1].growth is not None
    assert _load(tmp_path, text, "--checkpoint.keep_last", "7").checkpoint.keep_last == 7


def test_preset_lies_between_defaults_and_the_stage(tmp_path: Path) -> None:
    text = """
defaults: {micro_batch: 3, model: {num_layers: 99}}
stages: [{preset: tele-flm-52b, parallel: {tensor: 8}}, {preset: tele-flm-52b, name: again}]
"""
    first, second = _load(tmp_path, text, "--stages.tele-flm-52b.global_batch", "448").stages
    assert (first.name, second.name) == ("tele-flm-52b", "again")
    assert (first.model.num_layers, first.model.hidden_size, first.parallel.tensor) == (64, 8192, 8)
    assert (first.global_batch, second.global_batch) == (448, 1344)


def test_a_run_reads_back_as_itself(tmp_path: Path) -> None:
    run = _load(tmp_path, RUN)
    path = tmp_path / "resolved.yaml"
    path.write_text(dump_run(run))
    assert load_run(path) == run
    plain = run_to_dict(run)
    assert run_from_dict(plain) == run
    assert yaml.safe_load(yaml.safe_dump(plain)) == plain
    assert plain["stages"][0]["optimizer"]["betas"] == [0.9, 0.99]


MISTAKES = {
    "stages: [{paralel: {tensor: 2}}]": "FILE: stages.0.paralel: unknown key, did you mean 'parallel'?",
    "stages: [{parallel: {tensr: 2}}]": "FILE: stages.0.parallel.tensr: unknown key, did you mean 'tensor'?",
    "nam: x": "FILE: nam: unknown key, did you mean 'name'?",
    "stages: [{betas: [0.9, 0.9]}]": "FILE: stages.0.betas: unknown key, but there is stages.optimizer.betas",
    "logging: {zzz: 1}": "FILE: logging.zzz: unknown key, known here: interval_steps, tensorboard, layer_norms, "
    "layer_statistics, growth_health, trackers, prometheus, opentelemetry",
    "data: {train: [{name: 1, path: a}]}": (
        "FILE: data.train.0.name: 1 does not fit, expected text or null (put it in quotes)"
    ),
    "data: {train: [{name: a}]}": "FILE: data.train.0.path: missing, expected text",
    "stages: [{tokens: many}]": "FILE: stages.0.tokens: 'many' does not fit, expected integer",
    "stages: [{tokens: 2.5}]": "FILE: stages.0.tokens: 2.5 does not fit, expected integer",
    "name: 5": "FILE: name: 5 does not fit, expected text (put it in quotes)",
    "stages: [{precision: fp16}]": "FILE: stages.0.precision: 'fp16' does not fit, expected one of fp32, bf16",
    "stages: [{parallel: {data: none}}]": (
        "FILE: stages.0.parallel.data: 'none' does not fit, expected integer or null (write null)"
    ),
    "stages: [{optimizer: {lr: .inf}}]": "FILE: stages.0.optimizer.lr: inf does not fit, expected finite number",
    "stages: [{optimizer: {betas: [0.9]}}]": (
        "FILE: stages.0.optimizer.betas: [0.9] does not fit, expected list of 2 numbers"
    ),
    "stages: [{parallel: {pipeline_layers: [1, x]}}]": (
        "FILE: stages.0.parallel.pipeline_layers.1: 'x' does not fit, expected list of integer or null"
    ),
    "stages: [{parallel: {sequence: maybe}}]": (
        "FILE: stages.0.parallel.sequence: 'maybe' does not fit, expected true or false"
    ),
    "stages: [{model: 4}]": "FILE: stages.0.model: 4 does not fit, expected section",
    "stages: {tokens: 4}": "FILE: stages: {'tokens': 4} does not fit, expected list of section",
    "logging: {1: 2}": "FILE: logging.1: unknown key, known here: interval_steps, tensorboard, layer_norms, "
    "layer_statistics, growth_health, trackers, prometheus, opentelemetry",
    "{[1, 2]: 3}": "FILE, line 1, column 2: a key has to be text",
    "stages: [5]": "FILE: stages.0: 5 does not fit, expected section",
    "defaults: {modl: 1}": "FILE: defaults.modl: unknown key, did you mean 'model'?",
    "defaults: {model: {num_layers: x}}": "FILE: defaults.model.num_layers: 'x' does not fit, expected integer",
    "defaults: [1]": "FILE: defaults: [1] does not fit, expected the fields of a stage",
    "stages: [{preset: tele-flm-52}]": "FILE: preset 'tele-flm-52' is not known, did you mean 'tele-flm-52b'?",
    "seed: 1\nname: a\nseed: 2": "FILE, line 3, column 1: key 'seed' is given twice",
    "name: [1": "FILE, line 1, column 9: expected ',' or ']', but got '<stream end>'",
    "just text": "FILE: a run file is a mapping of keys, this is 'just text'",
    "": "FILE: a run file is a mapping of keys, this is None",
    "!!python/object/apply:os.system [ls]": (
        "FILE, line 1, column 1: could not determine a constructor for the tag "
        "'tag:yaml.org,2002:python/object/apply:os.system'"
    ),
}


@pytest.mark.parametrize("text", MISTAKES)
def test_mistakes_are_named_in_one_line(tmp_path: Path, text: str) -> None:
    assert _refusal(tmp_path, text) == MISTAKES[text]


def test_all_mistakes_are_listed_a_line_for_each(tmp_path: Path) -> None:
    text = "seed: x\ndefaults: {modl: 1}\ndata: {train: [{pth: a}]}\nstages: [{tokens: many}, {preset: tele-flm-52}]"
    with pytest.raises(Mistakes) as refused:
        _load(tmp_path, text)
    assert str(refused.value).replace(str(tmp_path / "run.yaml"), "FILE").splitlines() == [
        "FILE: 6 mistakes",
        "  defaults.modl: unknown key, did you mean 'model'?",
        "  preset 'tele-flm-52' is not known, did you mean 'tele-flm-52b'?",
        "  data.train.0.pth: unknown key, did you mean 'path'?",
        "  seed: 'x' does not fit, expected integer",
        "  data.train.0.path: missing, expected text",
        "  stages.0.tokens: 'many' does not fit, expected integer",
    ]


PATHS = "tokenizer: ~/t\ndata: {cache: ~/c, train: [{path: ~/d}], chat: {template: ~/j}}\ncheckpoint: {initial: ~/i}"


def test_a_tilde_stands_for_the_home_in_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    run = _load(tmp_path, PATHS, "--output", "~/runs/x")
    found = [run.output, run.tokenizer, run.data.cache, run.data.train[0].path, run.checkpoint.initial]
    assert found == [f"/home/someone/{name}" for name in ("runs/x", "t", "c", "d", "i")]
    assert run.data.chat is not None and run.data.chat.template == "/home/someone/j"
    assert "~" not in dump_run(run)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("''", "output is empty"),
        ("~no-such-user/x", "~no-such-user is no user of this machine"),
        (r'"a\0b"', "holds a NUL"),
    ],
)
def test_paths_that_no_file_can_have_are_refused(tmp_path: Path, path: str, words: str) -> None:
    assert words in _refusal(tmp_path, f"output: {path}")


OVERRIDE_MISTAKES = {
    ("stages.0.tokens", "5"): "'stages.0.tokens' is not an override: give --field value, such as --stages.0.tokens 1e9",
    ("--name",): "--name has no value: give --name VALUE",
    ("--name", "--seed", "3"): "--name has no value: give --name VALUE",
    ("--stages.2.tokens", "5"): "--stages.2.tokens: there is no element 2, the list has 2 (0 to 1)",
    ("--stages.larg.tokens", "5"): "--stages.larg.tokens: no element is named 'larg', did you mean 'large'?",
    ("--data.train.b.weight", "5"): "--data.train.b.weight: no element is named 'b', give an index",
    ("--name.first", "5"): "--name.first: name is 'try', which has no 'first'",
    ("--stages.0.tokns", "5"): "FILE: stages.0.tokns: unknown key, did you mean 'tokens'?",
    ("--seed", "[1"): "--seed, line 1, column 3: expected ',' or ']', but got '<stream end>'",
}


@pytest.mark.parametrize("overrides", OVERRIDE_MISTAKES, ids=" ".join)
def test_mistakes_in_overrides_are_named(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    assert _refusal(tmp_path, RUN, *overrides) == OVERRIDE_MISTAKES[overrides]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"cannot be read \(No such file or directory"):
        load_run(tmp_path / "absent.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RequestError, match="not UTF-8"):
        load_run(tmp_path / "binary.yaml")


def test_vocabulary_comes_from_the_tokenizer(tmp_path: Path) -> None:
    run = _load(tmp_path, RUN)
    resolved = resolve_vocabulary(run, 500)
    assert [stage.model.vocab_size for stage in resolved.stages] == [500, 500]
    assert [stage.model.vocab_size for stage in run.stages] == [None, None]
    assert resolve_vocabulary(resolved, 500) == resolved
    assert dataclasses.replace(resolved.stages[1], model=run.stages[1].model) == run.stages[1]


def test_vocabulary_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    run = _load(tmp_path, RUN, "--stages.large.model.vocab_size", "400")
    with pytest.raises(RequestError, match=r"stages\.1\.model\.vocab_size is 400, the tokenizer's is 500: set"):
        resolve_vocabulary(run, 500)


def test_a_vocabulary_that_was_rounded_up_is_kept(tmp_path: Path) -> None:
    """As of published models, whose embedding has more rows than their tokenizer has ids."""
    run = _load(tmp_path, RUN, "--stages.large.model.vocab_size", "512")
    assert [stage.model.vocab_size for stage in resolve_vocabulary(run, 500).stages] == [500, 512]
