"""What a run may go on with otherwise than it was saved, what is refused, and what is said of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flm_megatron.checkpoint.manifest import Manifest, RecordedTeacher, StagePosition
from flm_megatron.checkpoint.stage_manifest import stage_manifest
from flm_megatron.config.budget import stage_budgets
from flm_megatron.config.history import History, Segment, history_to_json
from flm_megatron.config.loader import run_to_dict
from flm_megatron.config.schema import (
    ChatConfig,
    GrowthConfig,
    MixConfig,
    ModelConfig,
    RunConfig,
    SourceConfig,
    StageConfig,
)
from flm_megatron.errors import RequestError
from flm_megatron.growth.plan import make_plan
from flm_megatron.training.resume.changes import find_changes, teacher_changes, validation_hashes
from flm_megatron.training.resume.continuation import (
    continued,
    first_history,
    is_finished,
    past_history,
    stage_of,
)
from flm_megatron.training.resume.start import Start, check_masks_open_in_time
from tests.support import data_cases
from tests.support.chat_cases import conversation, write
from tests.support.checkpoint_cases import edited

LENGTH = 16
WHERE = "step_00000005"
Edit = Callable[[RunConfig, Path], None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three small datasets, and `code` a second time."""
    path = tmp_path_factory.mktemp("sets")
    data_cases.datasets(path, {"web": 9, "code": 5, "books": 7})
    for suffix in ("bin", "idx", "json"):
        (path / f"moved.{suffix}").write_bytes((path / f"code.{suffix}").read_bytes())
    return path


def run_of(folder: Path, field: str = "weight") -> RunConfig:
    """Two stages over `web` and `code`."""
    data = data_cases.config(folder, {"web": 2.0, "code": 1.0}, field == "epochs", LENGTH)
    model = ModelConfig(vocab_size=320)
    stages = [StageConfig(name=name, model=model, tokens=100 * LENGTH, global_batch=4) for name in ("a", "b")]
    return RunConfig(data=data, stages=stages)


def manifest_of(run: RunConfig, history: History, step: int, stage: str = "a") -> Manifest:
    """What the run saves at a step, as it is read back."""
    last = history[-1]
    saved = {
        "run": run_to_dict(run),
        "stage": stage,
        "step": step,
        "samples": last.sample_at(step),
        "tokens": last.tokens_at(step),
        "history": history_to_json(history),
        "layout": {"tensor": 2, "pipeline": 1, "world": 4},
    }
    return Manifest.from_json(json.loads(json.dumps(saved)))


def saved_by(run: RunConfig, step: int = 5) -> Manifest:
    """The manifest of the first stage at `step`, nothing ever changed."""
    return manifest_of(run, first_history(run), step)


def go_on(run: RunConfig, manifest: Manifest) -> History:
    """The history of the run that goes on from there, in whichever stage it does."""
    past = past_history(run, manifest, WHERE)
    index = stage_of(run, manifest, past, WHERE)
    index += is_finished(run, index, manifest, past)
    return continued(run, index, manifest, past, WHERE)


def test_the_same_run_file_adds_nothing(folder: Path) -> None:
    """Not even where a dataset has moved or sources stand in another order: only the path is taken over."""
    run = run_of(folder)
    manifest = saved_by(run)
    assert go_on(run, manifest) == first_history(run)
    other = run_of(folder)
    other.data.train = [SourceConfig(str(folder / "moved"), name="code", weight=1.0), run.data.train[0]]
    (segment,) = go_on(other, manifest)
    assert [(source.name, Path(source.path).name) for source in segment.sources] == [("web", "web"), ("code", "moved")]


def test_a_grown_checkpoint_has_to_say_what_its_run_had_seen(folder: Path) -> None:
    """Nothing of its stage is in the history yet: the stream goes on where the manifest says."""
    run = run_of(folder)
    grown = edited(saved_by(run), stage="b", step=0, samples=None)
    with pytest.raises(RequestError, match="does not say how many samples and tokens its run had seen"):
        go_on(run, grown)


def test_each_change_begins_a_segment_where_the_run_stands(folder: Path) -> None:
    """One after the other, each at the position of its checkpoint; two at one position leave the second alone."""
    run = run_of(folder)
    manifest = saved_by(run)
    run.stages[0].global_batch = 6
    history = go_on(run, manifest)
    run.data.sequence_length = 32
    manifest = manifest_of(run, history, 8)
    run.data.train[1].weight = 7.0
    history = go_on(run, manifest)
    places = [(s.first_step, s.first_sample, s.first_token, s.global_batch, s.sequence_length) for s in history]
    assert places == [(0, 0, 0, 4, 16), (5, 20, 320, 6, 16), (8, 38, 608, 6, 32)]
    assert [segment.sources[1].weight for segment in history] == [1.0, 1.0, 7.0]
    assert [source.tokens and source.sha256 is not None for source in history[2].sources] == [True, True]


Done = tuple[int, int, int, float]
"""Steps, batch, length, weight of `web`."""
CHANGES = st.lists(
    st.tuples(st.integers(1, 9), st.integers(1, 6), st.sampled_from([8, 16]), st.sampled_from([1.0, 2.0])),
    min_size=1,
    max_size=6,
)


@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(changes=CHANGES)
def test_any_resumes_make_the_history_of_what_was_done(folder: Path, changes: list[Done]) -> None:
    """Through a manifest each time: a segment for each thing done otherwise than before, at its own place, and budgets
    that count the same samples and tokens."""
    run = run_of(folder)
    run.stages[0].tokens = 10**6
    manifest, expected, before = None, [], None
    step = sample = token = 0
    for steps, batch, length, weight in changes:
        run.stages[0].global_batch, run.data.sequence_length, run.data.train[0].weight = batch, length, weight
        history = go_on(run, manifest) if manifest else first_history(run)
        if before != (batch, length, weight):
            expected.append((step, sample, token, batch, length, weight))
        before = batch, length, weight
        step, sample, token = step + steps, sample + steps * batch, token + steps * batch * length
        manifest = manifest_of(run, history, step)
    found = [
        (s.first_step, s.first_sample, s.first_token, s.global_batch, s.sequence_length, s.sources[0].weight)
        for s in history
    ]
    budget = stage_budgets(run, history)[0]
    assert found == expected
    assert (budget.sample_at(step), budget.tokens_at(step)) == (sample, token)


def test_the_next_stage_begins_with_its_own_batch_where_the_last_ended(folder: Path) -> None:
    """Also where the run file now says that the stage before was another."""
    run = run_of(folder)
    manifest = saved_by(run, 25)
    run.stages[0].tokens, run.stages[0].global_batch, run.stages[1].global_batch = 60 * LENGTH, 5, 8
    history = go_on(run, manifest)
    assert (history[-1].stage, history[-1].first_step) == ("b", 0)
    assert (history[-1].first_sample, history[-1].first_token, history[-1].global_batch) == (100, 1600, 8)


def test_a_grown_checkpoint_that_was_not_trained_yet_begins_its_stage(folder: Path) -> None:
    """`flm grow` carries the history of the stage before."""
    run = run_of(folder)
    manifest = manifest_of(run, first_history(run), 25)
    manifest = edited(manifest, stage="b", step=0)
    history = go_on(run, manifest)
    assert [(s.stage, s.first_step, s.first_sample, s.first_token) for s in history] == [
        ("a", 0, 0, 0),
        ("b", 0, 100, 1600),
    ]


def test_a_checkpoint_without_a_history_has_that_of_its_run_file(folder: Path) -> None:
    """Both stages, with the sources it names; their hashes are those of the present datasets."""
    run = run_of(folder)
    manifest = edited(saved_by(run), history=None)
    assert go_on(run, manifest) == first_history(run)
    manifest = edited(manifest, stage="b")
    run.stages[0].tokens //= 2
    past = past_history(run, manifest, WHERE)
    assert [(s.stage, s.first_sample) for s in past] == [("a", 0), ("b", 100)]
    nameless = edited(manifest, run=None)
    assert [s.first_sample for s in past_history(run, nameless, WHERE)] == [0, 52]
    with pytest.raises(RequestError, match="is of stage 'c', its run file has 'a', 'b'"):
        past_history(run, edited(nameless, stage="c"), WHERE)
    assert [source.sha256 for source in past[0].sources] == [None, None]
    run.data.train = run.data.train[:1]
    assert go_on(run, manifest)[-1].sources[0].sha256


def seed(run: RunConfig, folder: Path) -> None:
    """Another order of samples."""
    run.seed += 1


def other_dataset(run: RunConfig, folder: Path) -> None:
    """`books` under the name of `web`."""
    run.data.train[0] = SourceConfig(str(folder / "books"), name="web", weight=2.0)


def other_name(run: RunConfig, folder: Path) -> None:
    """`code` under a new name."""
    run.data.train[1] = SourceConfig(str(folder / "code"), name="programs", weight=1.0)


def epochs(run: RunConfig, folder: Path) -> None:
    """Passes in place of shares."""
    run.data.train = [SourceConfig(str(folder / "web"), epochs=1.0)]


def long_samples(run: RunConfig, folder: Path) -> None:
    """Longer than a dataset."""
    run.data.sequence_length = 100_000


def conversations(run: RunConfig, folder: Path) -> None:
    """Fine-tuning in the middle of a run on text."""
    run.data.chat = ChatConfig()


def renamed(run: RunConfig, folder: Path) -> None:
    """The stage under way has another name."""
    run.stages[0].name = "first"


def stage_before(run: RunConfig, folder: Path) -> None:
    """A stage before the one under way."""
    run.stages.insert(0, replace(run.stages[0], name="new"))


REFUSED: dict[str, tuple[Edit, str]] = {
    "seed": (seed, r"seed was 1234 and is 1235: it orders the samples"),
    "other dataset": (other_dataset, r"source 'web' \(.*books\) is another dataset than it was"),
    "other name": (other_name, r"source 'programs' is the dataset that was 'code' so far: keep that name"),
    "epochs": (epochs, r"data\.train gave weights or nothing and now gives epochs"),
    "long samples": (long_samples, r"source 'web' has [\d,]+ tokens, too few for one sample of 100000"),
    "conversations": (conversations, r"data\.chat was not given, and now it is the other way round"),
    "renamed": (renamed, r"went through stage 'a', but the run file's stages are 'first', 'b'"),
    "stage before": (stage_before, r"went through stage 'a', but the run file's stages are 'new', 'a', 'b'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_continued_is_named(folder: Path, case: str) -> None:
    """With what it was and what it is."""
    edit, words = REFUSED[case]
    run = run_of(folder)
    manifest = saved_by(run)
    edit(run, folder)
    with pytest.raises(RequestError, match=words):
        go_on(run, manifest)


def test_all_reasons_are_listed_at_once(folder: Path) -> None:
    """One line each."""
    run = run_of(folder)
    manifest = saved_by(run)
    for edit in (seed, other_dataset, long_samples):
        edit(run, folder)
    with pytest.raises(RequestError) as refused:
        go_on(run, manifest)
    lines = str(refused.value).splitlines()
    assert "cannot go on from step_00000005: 4 mistakes" in lines[0] and len(lines) == 5


def test_another_tokenizer_is_refused(folder: Path) -> None:
    """Known by its fingerprint, wherever its file lies."""
    run = run_of(folder)
    run.tokenizer = str(folder / "tokenizer_320.model")
    manifest = edited(saved_by(run), tokenizer_sha256="0" * 64)
    with pytest.raises(RequestError, match=r"tokenizer .*tokenizer_320\.model is another one"):
        go_on(run, manifest)


def test_a_source_that_comes_back_is_known_again(folder: Path) -> None:
    """It may not have become another dataset meanwhile."""
    run = run_of(folder)
    manifest, both = saved_by(run), run.data.train
    run.data.train = both[:1]
    manifest = manifest_of(run, go_on(run, manifest), 8)
    run.data.train = both
    assert [len(segment.sources) for segment in go_on(run, manifest)] == [2, 1, 2]
    run.data.train = [both[0], SourceConfig(str(folder / "books"), name="code", weight=1.0)]
    with pytest.raises(RequestError, match=r"source 'code'.* is another dataset than it was"):
        go_on(run, manifest)


def test_epochs_may_change_to_what_was_not_taken_yet(folder: Path) -> None:
    """Fewer than were taken are refused, and parts of a pass that was taken in samples of two lengths."""
    run = run_of(folder, "epochs")
    manifest = saved_by(run, 22)
    run.data.train[0].epochs = 5.0
    assert len(go_on(run, manifest)) == 2
    run.data.train[0].epochs = 0.1
    with pytest.raises(RequestError, match=r"source 'web': 0\.1 epochs are asked for, but more was taken already"):
        go_on(run, manifest)
    run = run_of(folder, "epochs")
    run.data.sequence_length = 32
    assert go_on(run, manifest)[-1].sequence_length == 32
    run.data.train[0].epochs = 2.5
    with pytest.raises(RequestError, match=r"source 'web': 2\.5 epochs end within a pass"):
        go_on(run, manifest)


def test_what_changed_is_said_once_each(folder: Path) -> None:
    """Batch, length and mixture with the token from which they hold; other fields with both values; what is over is
    said to be so; what comes later is not."""
    run = run_of(folder)
    manifest = saved_by(run)
    run.stages[0].global_batch, run.data.sequence_length, run.data.train[1].weight = 6, 32, 7.0
    run.stages[0].optimizer.lr, run.stages[0].schedule.kind, run.stages[1].tokens = 1e-3, "linear", 5
    run.logging.interval_steps, run.data.cache = 7, "elsewhere"
    start = Start(0, 5, None, True, history=go_on(run, manifest))
    said = [change.line() for change in find_changes(run, start, manifest, 4)]
    assert said == [
        "global_batch was 4, is 6 from token 320 of the run on",
        "data.sequence_length was 16, is 32 from token 320 of the run on",
        "data.train was (web weight 2, code weight 1), is (web weight 2, code weight 7) from token 320 of the run on",
        "data-parallel size was 2, is 4",
        "stages.a.optimizer.lr was 0.0003, is 0.001",
        "stages.a.schedule.kind was cosine, is linear",
    ]
    again = manifest_of(run, start.history, 9)
    start = Start(0, 9, None, True, history=go_on(run, again))
    assert find_changes(run, start, again, 2) == []
    finished = manifest_of(run, start.history, 60)
    run.stages[0].tokens = 7
    start = Start(1, 0, None, False, history=go_on(run, finished))
    said = [change.line() for change in find_changes(run, start, finished, 1)]
    assert said == ["stages.a.tokens was 1600, is 7; it is over and stays as it was"]


def test_another_validation_text_under_a_name_is_said(folder: Path) -> None:
    """Its loss is another measure from there on."""
    run = run_of(folder)
    run.data.validation = [SourceConfig(str(folder / "books"), name="held-out")]
    manifest = edited(saved_by(run), validation_sha256=validation_hashes(run))
    run.data.validation[0].path = str(folder / "web")
    said = [
        change.line()
        for change in find_changes(run, Start(0, 5, None, True, history=go_on(run, manifest)), manifest, 2)
    ]
    assert said[0].startswith("text of validation set 'held-out' was ") and "data.validation" in said[1]


def chat_run(folder: Path) -> RunConfig:
    """A fine-tuning of two stages."""
    write(folder / "chat.jsonl", [conversation(i) for i in range(8)])
    run = run_of(folder)
    run.data.train, run.data.chat = [SourceConfig(str(folder / "chat.jsonl"), name="chat")], ChatConfig()
    return run


def test_a_teacher_of_other_bits_is_said_be_it_at_the_same_path() -> None:
    before, now = (RecordedTeacher(path="runs/large", logical_hash=digit * 32) for digit in "ab")
    resumed = Start(1, 5, None, resumes=True)
    (change,) = teacher_changes(resumed, Manifest(teacher=before), now)
    assert change.line() == "teacher's logical hash was aaaaaaaaaaaa, is bbbbbbbbbbbb"
    assert not teacher_changes(resumed, Manifest(teacher=before), before)
    assert not teacher_changes(resumed, Manifest(), now)
    assert not teacher_changes(Start(1, 0, None, resumes=False), Manifest(teacher=before), now)


def test_conversations_stay_within_a_stage(folder: Path, tmp_path: Path) -> None:
    """The batch may change in one; what makes its samples only between two."""
    run = chat_run(folder)
    manifest, finished = saved_by(run), saved_by(run, 25)
    run.stages[0].global_batch = 8
    assert [segment.global_batch for segment in go_on(run, manifest)] == [4, 8]
    run.data.sequence_length, run.data.chat = 64, ChatConfig(packing=False, mix=[MixConfig("a", "chat", 0.5)])
    run.data.train = [SourceConfig(str(write(tmp_path / "o.jsonl", [conversation(9)])), name="chat")]
    with pytest.raises(RequestError) as refused:
        go_on(run, manifest)
    text = str(refused.value)
    for name in ("data.sequence_length was 16 and is 64", "data.chat.packing was True and is False"):
        assert name in text
    assert "data.chat.mix was [1.0] and is [0.5]" in text and "data.train was ['chat (" in text
    history = go_on(run, finished)
    assert [segment.stage for segment in history] == ["a", "b"]
    within = manifest_of(run, history, 3, "b")
    run.data.chat.packing = True
    with pytest.raises(RequestError, match=r"data\.chat\.packing was False and is True"):
        go_on(run, within)


def test_a_chat_template_keeps_its_text_within_a_stage(folder: Path, tmp_path: Path) -> None:
    """Its name stands in the run file; what counts is what it says."""
    run = chat_run(folder)
    assert run.data.chat is not None
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}")
    run.data.chat.template = str(template)
    known = stage_manifest(run, 0, run.stages[0].model, StagePosition()).chat_template_sha256
    assert known == sha256(template.read_bytes()).hexdigest()
    manifest, finished = (edited(saved_by(run, step), chat_template_sha256=known) for step in (5, 25))
    assert len(go_on(run, manifest)) == 1
    template.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}")
    with pytest.raises(RequestError, match=r"data\.chat\.template .*template\.jinja has another text than it had"):
        go_on(run, manifest)
    assert len(go_on(run, saved_by(run))) == 1  # a version that kept no hash
    assert [segment.stage for segment in go_on(run, finished)] == ["a", "b"]


def test_masks_have_to_open_within_the_steps_that_are_left(folder: Path) -> None:
    """A larger batch leaves fewer steps."""
    run = run_of(folder)
    old, new = ModelConfig(vocab_size=320), ModelConfig(vocab_size=320, ffn_hidden_size=400)
    plan = make_plan(old, new, GrowthConfig(mask_steps=20), 1, [], "b")
    history = (*first_history(run), Segment("b", 0, 100, 1600, 4, LENGTH))
    check_masks_open_in_time(run, 1, 5, plan, history)
    larger = (*history, Segment("b", 5, 120, 1920, 8, LENGTH))
    run.stages[1].global_batch = 8
    with pytest.raises(RequestError, match=r"open over 20 steps, of which 5 are done, but .* it ends after 15"):
        check_masks_open_in_time(run, 1, 5, plan, larger)
    check_masks_open_in_time(run, 1, 20, plan, larger)
