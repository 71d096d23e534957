"""Settings that changed between a checkpoint and the run that continues it, as text and as metrics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from flm_megatron.checkpoint.manifest import Manifest, RecordedTeacher
from flm_megatron.config.history import History, Segment
from flm_megatron.config.loader import run_to_dict
from flm_megatron.config.schema import RunConfig
from flm_megatron.data.corpus.description import read_description
from flm_megatron.json_text import JsonObject
from flm_megatron.training.metrics.events import ChangeEvent
from flm_megatron.training.metrics.log import MetricsLog
from flm_megatron.training.resume.start import Start

SILENT = ("name", "output", "checkpoint", "logging", "distributed")
"""Sections of the run file that do not affect training, or are compared elsewhere."""
LONGEST, SHOWN = 200, 12


@dataclass(frozen=True)
class Change:
    """A setting that was `before` and is `now`."""

    what: str
    before: object
    now: object
    note: str = ""

    def line(self) -> str:
        """Old and new value as text."""
        return f"{self.what} was {_text(self.before)}, is {_text(self.now)}{self.note}"


def _text(value: object) -> str:
    text = str(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def announce(log: MetricsLog, changes: list[Change], stage: str, step: int, tokens: int) -> None:
    """Log each change and record it in the metrics."""
    for change in changes:
        log.write(ChangeEvent(stage, step, tokens, what=change.what, before=change.before, now=change.now))
        log.say(f"{stage} step {step}: {change.line()}")


def find_changes(run: RunConfig, start: Start, manifest: Manifest, data_size: int) -> list[Change]:
    """The settings that differ from the checkpoint of `manifest`.

    Batch, sequence length and mixture if a new segment of the history begins here; the data-parallel size; and every
    other field of the run file that affects training: of the stage itself if it resumes, and of earlier stages, to say
    that those keep their values.
    """
    resumes = start.resumes
    found = list(_segment_changes(start.history[-2:], resumes)) if segment_begins(start) else []
    before = manifest.layout.data_size if manifest.layout else None
    if resumes and before not in (None, data_size):
        found.append(Change("data-parallel size", before, data_size))
    found += _validation_changes(manifest.validation_sha256, validation_hashes(run))
    return [*found, *_field_changes(manifest.run.saved, run_to_dict(run), start.stage, resumes)]


def teacher_changes(start: Start, manifest: Manifest, now: RecordedTeacher | None) -> list[Change]:
    """Another checkpoint that teaches a stage that resumes, be it at the same path."""
    before = manifest.teacher if start.resumes else None
    if before is None or now is None or before.logical_hash == now.logical_hash:
        return []
    return [Change("teacher's logical hash", before.logical_hash[:SHOWN], now.logical_hash[:SHOWN])]


def validation_hashes(run: RunConfig) -> dict[str, str]:
    """The hash of each validation set by name; empty for conversations."""
    if run.data.chat is not None:
        return {}
    return {source.display_name: read_description(source.path).sha256 for source in run.data.validation}


def _validation_changes(before: Mapping[str, str], now: Mapping[str, str]) -> Iterator[Change]:
    """Validation sets with another text under the same name: their losses can no longer be compared."""
    for name, hashed in now.items():
        if before.get(name, hashed) != hashed:
            yield Change(f"text of validation set {name!r}", before[name][:SHOWN], hashed[:SHOWN])


def segment_begins(start: Start) -> bool:
    """Whether a segment begins that is not the run's first."""
    return len(start.history) > 1 and start.history[-1].first_step == start.step


def _segment_changes(history: History, resumes: bool) -> Iterator[Change]:
    last, now = history
    note = f" from token {now.first_token:,} of the run on"
    if resumes and last.global_batch != now.global_batch:
        yield Change("global_batch", last.global_batch, now.global_batch, note)
    if last.sequence_length != now.sequence_length:
        yield Change("data.sequence_length", last.sequence_length, now.sequence_length, note)
    before, after = _mixture(last), _mixture(now)
    if before != after:
        yield Change("data.train", _listed(before), _listed(after), note)


def _mixture(segment: Segment) -> dict[str, str]:
    """Each source's share of the mixture, as text."""
    return {
        source.name: f"weight {source.weight:g}" if source.weight is not None
        else f"{source.epochs:g} epochs" if source.epochs is not None else "by size"
        for source in segment.sources
    }  # fmt: skip


def _listed(mixture: Mapping[str, str]) -> str:
    return f"({', '.join(f'{name} {share}' for name, share in mixture.items())})"


def _field_changes(before: JsonObject, now: JsonObject, index: int, resumes: bool) -> Iterator[Change]:
    """Fields in which two run files differ, apart from stages still to come."""
    for key, value in now.items():
        if key == "data":
            yield from _leaves("data", _without(before.get(key, {}), "train"), _without(value, "train"), "")
        elif key in before and key not in (*SILENT, "seed", "stages"):
            yield from _leaves(key, before[key], value, "")
    earlier = {stage["name"]: stage for stage in before.get("stages", [])}
    for number, stage in enumerate(now["stages"][: index + resumes]):
        if stage["name"] in earlier:
            over = "; it is over and stays as it was" if number < index else ""
            left_out = ("model", "global_batch") if number == index else ("model",)
            was, is_now = (_without(each, *left_out) for each in (earlier[stage["name"]], stage))
            yield from _leaves(f"stages.{stage['name']}", was, is_now, over)


def _without(section: JsonObject, *names: str) -> JsonObject:
    """A section without the fields that are compared elsewhere."""
    return {key: value for key, value in section.items() if key not in (*names, "sequence_length", "cache")}


def _leaves(name: str, before: object, now: object, note: str) -> Iterator[Change]:
    """Values that differ, section by section; fields that are new in this version are skipped."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key, value in now.items():
            if key in before:
                yield from _leaves(f"{name}.{key}", before[key], value, note)
    elif before != now:
        yield Change(name, before, now, note)
