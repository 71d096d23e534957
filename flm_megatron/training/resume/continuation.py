"""How a run continues from a checkpoint: its history so far, and the segment that begins with this run file.

Batch, sequence length and mixture may change: training goes on with the next token of the stream, without repeating or
skipping any. Changes that cannot be made this way are refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from flm_megatron.checkpoint.manifest import Manifest
from flm_megatron.checkpoint.stage_manifest import chat_template_fingerprint
from flm_megatron.config.budget import stage_budgets
from flm_megatron.config.history import History, Segment, SegmentSource, history_from_json
from flm_megatron.config.loader import run_from_dict
from flm_megatron.config.schema import RunConfig
from flm_megatron.data.streams.mixture import mixture_at_end, segment_sources
from flm_megatron.data.streams.stage_streams import chat_passes
from flm_megatron.data.streams.stream import check_sources
from flm_megatron.data.tokenizer import tokenizer_fingerprint
from flm_megatron.errors import Mistakes, RequestError
from flm_megatron.storage.cache.whole import file_sha256

BACK = "put it back, or begin another run with another `output`"


def first_history(run: RunConfig) -> History:
    """The history of a new run."""
    return (_segment(run, 0, 0, 0, 0),)


def past_history(run: RunConfig, manifest: Manifest, where: str) -> History:
    """The history in a checkpoint; if it was saved before there were histories, one made from its run file.

    Raises:
        DamagedError: it cannot be read.
        RequestError: the checkpoint is not one of a run, or of a stage that neither its run file nor this one has.
    """
    at = manifest.position
    if unknown := [field for field in ("stage", "step") if getattr(at, field) is None]:
        raise RequestError(
            f"{where}: its manifest.json names no {' and no '.join(unknown)}, as those that no run has saved: move it "
            "out of the run's folder (another run can start from it with checkpoint.initial)"
        )
    if manifest.history is not None:
        return history_from_json(manifest.history, where)
    saved = run_from_dict(manifest.run.saved, where) if manifest.run.saved else run
    sources = tuple(SegmentSource(s.display_name, s.path, s.weight, s.epochs) for s in saved.data.train)
    names = [stage.name for stage in saved.stages]
    if at.stage not in names:
        raise RequestError(f"{where} is of stage {at.stage!r}, its run file has {', '.join(map(repr, names))}")
    last = names.index(at.stage)
    return tuple(replace(budget.segments[0], sources=sources) for budget in stage_budgets(saved)[: last + 1])


def known_history(run: RunConfig, manifest: Manifest, where: str) -> History:
    """The history in a checkpoint, completed with the datasets that the run file names. Raises as `past_history`."""
    return _with_datasets(past_history(run, manifest, where), _segment(run, 0, 0, 0, 0))


def is_finished(run: RunConfig, index: int, manifest: Manifest, past: History) -> bool:
    """Whether the checkpoint of stage `index` has trained all of the stage's tokens."""
    segments = [segment for segment in past if segment.stage == run.stages[index].name]
    if not segments:  # grown, and not trained yet
        return False
    return segments[-1].tokens_at(stage_and_step(manifest)[1]) - segments[0].first_token >= run.stages[index].tokens


def stage_of(run: RunConfig, manifest: Manifest, past: History, where: str) -> int:
    """Index in the run file of a checkpoint's stage.

    Raises:
        RequestError: the run file has no such stage, or others before it than those that were gone through.
    """
    names = [stage.name for stage in run.stages]
    gone = list(dict.fromkeys([*(segment.stage for segment in past), stage_and_step(manifest)[0]]))
    if names[: len(gone)] != gone:
        raise RequestError(
            f"{where}: the run went through stage {' and '.join(map(repr, gone))}, but the run file's stages are "
            f"{', '.join(map(repr, names))}: those before and the one under way cannot be renamed, left out or added to"
        )
    return len(gone) - 1


def continued(run: RunConfig, index: int, manifest: Manifest, past: History, where: str) -> History:
    """`past`, with a new segment where the checkpoint stands if stage `index` continues with other settings.

    Raises:
        Mistakes: what the run file asks for cannot be continued; one line for each reason.
        RequestError: as `mixture_at_end`.
    """
    stage, step = stage_and_step(manifest)
    sample, token = _stream_position(manifest, past[-1], where)
    now = _segment(run, index, step if run.stages[index].name == stage else 0, sample, token)
    past = _with_datasets(past, now)
    if reasons := list(_reasons(run, index, manifest, past, now)):
        raise Mistakes(reasons, f"cannot go on from {where}")
    history = _joined(past, now)
    if run.data.chat is None:
        mixture_at_end(history)
    return history


def stage_and_step(manifest: Manifest) -> tuple[str, int]:
    """Stage name and step of a checkpoint that `past_history` accepts."""
    at = manifest.position
    assert at.stage is not None and at.step is not None, "`past_history` comes first"
    return at.stage, at.step


def _stream_position(manifest: Manifest, last: Segment, where: str) -> tuple[int, int]:
    """Samples and tokens of the run at a checkpoint, from its last segment or else its manifest."""
    stage, step = stage_and_step(manifest)
    if last.stage == stage:
        return last.sample_at(step), last.tokens_at(step)
    at = manifest.position
    if at.samples is None or at.tokens is None:
        raise RequestError(f"{where}: its manifest.json does not say how many samples and tokens its run had seen")
    return at.samples, at.tokens


def _joined(past: History, now: Segment) -> History:
    last = past[-1]
    if (last.stage, last.global_batch, last.mixture) == (now.stage, now.global_batch, now.mixture):
        by_name = {source.name: source for source in now.sources}  # a dataset may have moved
        return (*past[:-1], replace(last, sources=tuple(by_name[source.name] for source in last.sources)))
    begun = (last.stage, last.first_step) == (now.stage, now.first_step)  # nothing was trained in it
    return (*(past[:-1] if begun else past), now)


def _segment(run: RunConfig, index: int, step: int, sample: int, token: int) -> Segment:
    stage = run.stages[index]
    return Segment(stage.name, step, sample, token, stage.global_batch, run.data.sequence_length, _present_sources(run))


def _present_sources(run: RunConfig) -> tuple[SegmentSource, ...]:
    if run.data.chat is None:
        if run.data.train:
            check_sources(run.data.train, "train")
        return segment_sources(run.data.train)
    return tuple(
        SegmentSource(source.display_name, source.path, sha256=file_sha256(source.path)) for source in run.data.train
    )


def _with_datasets(past: History, now: Segment) -> History:
    """Old segments completed with what they lack about their datasets, from the present ones of the same name."""
    known = {source.name: source for segment in (now, *past) for source in segment.sources if source.sha256}

    def filled(source: SegmentSource) -> SegmentSource:
        """The source with its hash and size."""
        found = known.get(source.name)
        if source.sha256 or found is None:
            return source
        return replace(source, sha256=found.sha256, tokens=found.tokens)

    return tuple(replace(segment, sources=tuple(map(filled, segment.sources))) for segment in past)


def _reasons(run: RunConfig, index: int, manifest: Manifest, past: History, now: Segment) -> Iterator[str]:
    """Why the run cannot continue with this run file."""
    saved = manifest.run
    if saved.seed not in (None, run.seed):
        yield f"seed was {saved.seed} and is {run.seed}: it orders the samples of the whole run; {BACK}"
    before, present = manifest.tokenizer_sha256, tokenizer_fingerprint(run.tokenizer) if run.tokenizer else None
    if before and present and before != present:
        yield f"tokenizer {run.tokenizer} is another one than the run was trained with: {BACK}"
    if saved.data is not None and (saved.data.chat is None) != (run.data.chat is None):
        was = "not given" if saved.data.chat is None else "given"
        yield f"data.chat was {was}, and now it is the other way round: {BACK}"
    elif run.data.chat is not None:
        yield from _chat_reasons(run, index, manifest, past, now)
    else:
        yield from _dataset_reasons(past, now)
        yield from _mixture_reasons(past[-1], now)


def _dataset_reasons(past: History, now: Segment) -> Iterator[str]:
    """A name must keep its dataset, and a dataset its name."""
    earlier = {source.name: source for segment in past for source in segment.sources}
    names = {source.name for source in now.sources}
    stopped = {source.sha256: name for name, source in earlier.items() if name not in names and source.sha256}
    for source in now.sources:
        before = earlier.get(source.name)
        if before is not None and before.sha256 not in (None, source.sha256):
            yield (
                f"source {source.name!r} ({source.path}) is another dataset than it was: give the new one a name of "
                "its own, or put the old one back"
            )
        elif before is None and source.sha256 in stopped:
            yield (
                f"source {source.name!r} is the dataset that was {stopped[source.sha256]!r} so far: keep that name, "
                "under which the run knows what it has taken from it"
            )
        if source.tokens is not None and source.tokens <= now.sequence_length:
            yield (
                f"source {source.name!r} has {source.tokens:,} tokens, too few for one sample of {now.sequence_length}"
            )


def _mixture_reasons(last: Segment, now: Segment) -> Iterator[str]:
    """Sources with epochs cannot be mixed with sources with weights."""
    were, are = (any(source.epochs is not None for source in segment.sources) for segment in (last, now))
    if were != are:
        yield (
            f"data.train gave {'epochs' if were else 'weights or nothing'} and now gives "
            f"{'epochs' if are else 'weights or nothing'}: neither can take over from the other; keep to what it was"
        )


def _chat_reasons(run: RunConfig, index: int, manifest: Manifest, past: History, now: Segment) -> Iterator[str]:
    """Conversations cannot change in the middle of a stage: they are packed into samples all at once."""
    if past[-1].stage != now.stage or now.first_step == 0 or not manifest.run.saved:
        return
    saved = run_from_dict(manifest.run.saved)
    for field, was, value in (
        ("data.sequence_length", past[-1].sequence_length, now.sequence_length),
        ("data.train", _identities(past[-1]), _identities(now)),
        ("data.chat.template", saved.data.chat and saved.data.chat.template, run.data.chat and run.data.chat.template),
        ("data.chat.packing", saved.data.chat and saved.data.chat.packing, run.data.chat and run.data.chat.packing),
        ("data.chat.mix", _passes(saved, index), _passes(run, index)),
    ):
        if was != value:
            yield f"{field} was {was} and is {value}: it can change between stages of a fine-tuning, not in one; {BACK}"
    assert run.data.chat is not None
    before, present = manifest.chat_template_sha256, chat_template_fingerprint(run)
    if None not in (before, present) and before != present:
        yield (
            f"data.chat.template {run.data.chat.template} has another text than it had when this stage began (SHA-256 "
            f"{str(before)[:12]}, now {str(present)[:12]}): it can change between stages of a fine-tuning, not in one; "
            f"{BACK}"
        )


def _identities(segment: Segment) -> list[str]:
    """Conversations of a segment: each source's name and the beginning of its file's hash."""
    return [f"{source.name} ({(source.sha256 or '')[:12]})" for source in segment.sources]


def _passes(run: RunConfig, index: int) -> list[float]:
    assert run.data.chat is not None
    return chat_passes(run, run.data.chat, index, [source.display_name for source in run.data.train])
