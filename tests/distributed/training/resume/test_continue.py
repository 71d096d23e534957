"""Real runs that go on with another batch, data-parallel size, sequence length and mixture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from flm_megatron.checkpoint.manifest import Manifest
from flm_megatron.checkpoint.opening import open_checkpoint
from flm_megatron.config.history import history_from_json
from flm_megatron.config.loader import load_run
from flm_megatron.config.schema import RunConfig, SourceConfig
from flm_megatron.data.conversations.show import sample_text
from flm_megatron.data.streams.stage_streams import training_stream
from flm_megatron.data.streams.stream import SampleStream
from flm_megatron.errors import RequestError
from flm_megatron.launch.preflight import resolve
from flm_megatron.launch.run import train
from flm_megatron.optim.learning_rate import learning_rate
from flm_megatron.training.metrics.events import ChangeEvent, StepEvent, read_events
from flm_megatron.training.resume.start import checkpoint_store, find_start, run_history
from tests.fixtures import CHECKPOINT_V1, copy_of
from tests.support.runs import losses

TOKENS = 1536
PLANNED = ["--stages.0.schedule.decay_tokens", str(TOKENS), "--stages.0.parallel.tensor", "1"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of the first format at step 4, token 512, in the current folder."""
    monkeypatch.chdir(copy_of(CHECKPOINT_V1, tmp_path / "run"))
    return tmp_path / "run"


def run_of(*overrides: str) -> RunConfig:
    """The run file, resolved."""
    return resolve(load_run("run.yaml", [*PLANNED, *overrides]))


def manifest_of(run: RunConfig) -> Manifest:
    """The manifest of the newest checkpoint."""
    path = checkpoint_store(run).latest(["small"])
    assert path is not None
    return open_checkpoint(path).manifest


def test_batch_data_parallel_size_mixture_and_length_change_one_after_the_other(folder: Path) -> None:
    """Each from the next token on: positions, learning rates, log lines, records and history."""
    changes = ["--stages.0.global_batch", "8", "--stages.0.parallel.data", "2", "--stages.0.tokens", "1024"]
    assert train(run_of(*changes)) == 0
    run = run_of("--stages.0.global_batch", "3", "--data.sequence_length", "64", "--stages.0.tokens", str(TOKENS))
    run.data.train = [SourceConfig("web", weight=0.5), SourceConfig("held-out", weight=0.5)]
    assert train(run) == 0

    steps = read_events(folder / "output", StepEvent)
    assert [step.tokens for step in steps] == [128, 256, 384, 512, 768, 1024, 1216, 1408, 1600]
    assert [step.step for step in steps] == list(range(1, 10))
    planned = run_of("--stages.0.tokens", str(TOKENS))
    assert [step.lr for step in steps[4:]] == [learning_rate(step.tokens, planned, 0) for step in steps[4:]]
    assert all(step.loss < 5.8 for step in steps)

    changed = [(event.tokens, event.what) for event in read_events(folder / "output", ChangeEvent)]
    assert changed[:2] == [(512, "global_batch"), (512, "data-parallel size")]
    assert {what for tokens, what in changed if tokens == 1024} >= {
        "global_batch", "data.sequence_length", "data.train", "data-parallel size", "stages.small.tokens",
    }  # fmt: skip
    log = (folder / "output" / "log.txt").read_text()
    assert log.count("small step 4: global_batch was 4, is 8 from token 512 of the run on") == 1
    assert (
        log.count(
            "small step 6: data.train was (web weight 0.75, code weight 0.25), is (web weight 0.5, held-out weight "
            "0.5) from token 1,024 of the run on"
        )
        == 1
    )

    for sample, name in ((17, "/0/"), (31, "/0/"), (32, "/0.1/")):
        text = sample_text(run, str(sample), run_history(run))
        assert name in text
        assert sample_text(run, text.split(":")[0], run_history(run)) == text

    saved = manifest_of(run)
    at = saved.position
    assert (at.step, at.samples, at.tokens) == (9, 16 + 16 + 9, 1600)
    history = history_from_json(saved.history, "")
    places = [(s.first_step, s.first_sample, s.first_token, s.global_batch, s.sequence_length) for s in history]
    assert places == [(0, 0, 0, 4, 32), (4, 16, 512, 8, 32), (6, 32, 1024, 3, 64)]
    assert [[source.name for source in s.sources] for s in history] == [["web", "code"]] * 2 + [["web", "held-out"]]
    assert all(source.sha256 and source.tokens for segment in history for source in segment.sources)


def test_a_larger_batch_takes_the_next_samples(folder: Path) -> None:
    """Sample 16 is the next after four steps of four, whatever the batch is now."""
    one = run_of("--stages.0.tokens", "640")
    start = find_start(one)
    assert start is not None and (start.step, start.history[-1].first_sample) == (4, 0)
    stream = SampleStream(one.data, one.seed)
    larger = run_of("--stages.0.tokens", "768", "--stages.0.global_batch", "8")
    begun = find_start(larger)
    assert begun is not None and begun.history[-1].first_sample == 16
    going_on = training_stream(larger, 0, begun.history)
    assert [going_on.names(index) for index in range(16, 24)] == [stream.names(index) for index in range(16, 24)]


def other_data(run: RunConfig) -> None:
    """Another dataset under the name of one."""
    run.data.train[0] = SourceConfig("held-out", name="web", weight=0.75)


def another_name(run: RunConfig) -> None:
    """A dataset under a new name."""
    run.data.train[1] = SourceConfig("code", name="programs", weight=0.25)


def seeded(run: RunConfig) -> None:
    """Another seed."""
    run.seed = 4


def epochs(run: RunConfig) -> None:
    """Epochs in place of weights."""
    run.data.train = [SourceConfig("web", epochs=1.0)]


def renamed(run: RunConfig) -> None:
    """A stage put before the one under way."""
    run.stages.insert(0, load_run("run.yaml", []).stages[0])
    run.stages[0].name = "tiny"


REFUSED: dict[str, tuple[Callable[[RunConfig], None], str]] = {
    "another seed": (seeded, "seed was 1234 and is 4"),
    "another dataset under a name": (other_data, r"source 'web' \(held-out\) is another dataset than it was"),
    "another name for a dataset": (another_name, "source 'programs' is the dataset that was 'code' so far"),
    "epochs for weights": (epochs, "data.train gave weights or nothing and now gives epochs"),
    "another stage before": (
        renamed,
        "the run went through stage 'small', but the run file's stages are 'tiny', 'small'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_continued_is_refused_by_name(folder: Path, case: str) -> None:
    """Before any process starts, with what it was and what it is; the checkpoint stays as it is."""
    change, words = REFUSED[case]
    assert train(run_of("--stages.0.tokens", "640")) == 0  # so that the hashes of the datasets are known
    run = run_of("--stages.0.tokens", "768")
    before = manifest_of(run)
    change(run)
    with pytest.raises(RequestError, match=words):
        find_start(run)
    assert manifest_of(run) == before and len(losses(folder / "output")) == 5
