"""A new run file: chosen, written out with the reasons, checked as `flm config` does, and put in its place."""

from __future__ import annotations

import os
import shlex
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from flm_megatron.api.budget.advise import GrowthAdvice, advise
from flm_megatron.api.new_run import parts
from flm_megatron.api.new_run.request import NewRun, check_request
from flm_megatron.api.new_run.shapes import parse_size, shape_of
from flm_megatron.checkpoint.hugging_face.run_file import run_file_of_folder
from flm_megatron.checkpoint.run_file import open_run
from flm_megatron.config.loader import run_from_dict
from flm_megatron.config.presets import load_preset
from flm_megatron.config.schema import DataConfig, RunConfig, StageConfig
from flm_megatron.config.yaml_text import format_yaml
from flm_megatron.data.tokenizer import open_tokenizer, tokenizer_exists
from flm_megatron.errors import FlmError, RequestError
from flm_megatron.growth.foreseen import check_run_file
from flm_megatron.model.parameters import parameter_count
from flm_megatron.planner.machine import Machine, find_machine

TRAINED_TOKENS = 10**9
"""What a model that is trained already is given where no budget is."""
VOCABULARIES = ((5 * 10**7, 4096), (5 * 10**9, 32000))
"""Ids of a tokenizer that has still to be trained, for models of up to so many parameters."""
LARGE_VOCABULARY = 64000
MOST_FITS, FIT = 12, 0.005
"""How often a budget is made longer or shorter, and the share of the hours that it may be off then."""


@dataclass(frozen=True)
class Written:
    """A run file that was written: where, what growth would do for it, and the commands that follow."""

    path: Path
    advice: GrowthAdvice | None
    commands: tuple[str, ...]


def write_new_run(asked: NewRun, out: Path) -> Written:
    """Choose model, layout, batch, budget and schedule for what is asked, and write a run file with the reasons.

    Raises:
        RequestError: `out` exists already, what is asked cannot be understood, or does not fit on the hardware.
    """
    require_new(out)
    check_request(asked)
    draft = Draft(asked)
    text = draft.text()
    _put(text, out, asked.gpus)
    return Written(out, draft.advice, tuple(draft.commands(out)))


def require_new(out: Path) -> None:
    """Check that a file can be made and none is overwritten. Raises RequestError."""
    if os.path.lexists(out):
        raise RequestError(f"{out} exists already, and is not overwritten: give another --out, or move it away")
    if not out.absolute().parent.is_dir():
        raise RequestError(f"{out.absolute().parent} is no folder: make it, or give another --out")


def _put(text: str, out: Path, gpus: int) -> None:
    """Check the text by the rules of the run file and of the machine, and make the file, whole or not at all."""
    descriptor, name = tempfile.mkstemp(dir=out.absolute().parent, prefix=".init-", suffix=".yaml")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        check_run_file(open_run(name), gpus)
        os.chmod(name, 0o644)
        os.link(name, out)  # fails where somebody has made the file by now
    except FileExistsError:
        raise RequestError(f"{out} exists already, and is not overwritten") from None
    finally:
        os.unlink(name)


class Draft:
    """Everything that is chosen for one request."""

    def __init__(self, asked: NewRun) -> None:
        self.asked = asked
        self.machine: Machine | None = None if asked.gpu is None else find_machine(asked.gpu)
        self.tokenizer = self._tokenizer()
        self.base = self._base()
        self.vocab_size = self.base.model.vocab_size or self._vocabulary()
        self.base = parts.with_model(self.base, self.vocab_size)
        self.parameters = parameter_count(self.base.model)
        self.length = parts.sequence_length_for(self.parameters, asked.gpu is not None)
        wanted = self.base.global_batch if asked.is_preset else None
        batch = parts.batch_for(self.parameters, self.length, asked.gpus, wanted)
        precision = "fp32" if asked.gpu is None else "bf16"
        self.base = replace(self.base, global_batch=batch, precision=precision)  # type: ignore[arg-type]
        self.layout = parts.layout_on(self.base, self.length, self.machine, asked.gpus)
        self.tokens, self.why = self._budget()
        self.base = replace(self.base, tokens=self.tokens)
        self.advice = self._advice()
        if asked.grow and asked.hours is not None:
            self._fill_hours(asked.hours)

    def text(self) -> str:
        """The run file."""
        return "\n".join([*self._head(), "stages:", *self._stages(), *self._tail()]) + "\n"

    def commands(self, out: Path) -> Iterator[str]:
        """What to do next, in order."""
        asked = self.asked
        data, tokenizer, file = shlex.quote(asked.data), shlex.quote(self.tokenizer or ""), shlex.quote(str(out))
        if asked.is_text:
            if not tokenizer_exists(self.tokenizer or ""):
                yield f"flm data tokenizer {data} --out {tokenizer} --vocab-size {self.vocab_size}"
            yield (
                f"flm data build {data} --tokenizer {tokenizer} --out {asked.output}/data/train --validation-share 0.01"
            )
        yield f"flm config {file}"
        if asked.gpu is None:
            yield f"flm train {file}"
        else:
            yield f"flm plan {file} --gpu {shlex.quote(asked.gpu)} --gpus {asked.gpus}"
            each = max(count for count in range(1, 9) if asked.gpus % count == 0)
            yield f"flm launch {file} --on slurm --nodes {asked.gpus // each} --processes-per-node {each} --dry-run"

    def _tokenizer(self) -> str | None:
        asked = self.asked
        if asked.tokenizer is not None:
            return asked.tokenizer
        if asked.is_folder and (own := run_file_of_folder(Path(asked.model)).get("tokenizer")):
            return str(own)
        return f"{asked.output}/data/tokenizer.model"

    def _vocabulary(self) -> int:
        """Ids of the tokenizer, or of the one that is still to be trained."""
        if self.tokenizer is not None and tokenizer_exists(self.tokenizer):
            return open_tokenizer(self.tokenizer).vocab_size
        if self.asked.tokenizer is not None and not self.asked.is_text:
            raise RequestError(f"tokenizer {self.asked.tokenizer} is not there: its vocabulary is part of the model")
        size = parse_size(self.asked.model) or 0
        return next((ids for limit, ids in VOCABULARIES if size <= limit), LARGE_VOCABULARY)

    def _base(self) -> StageConfig:
        """The stage whose model is asked for."""
        asked = self.asked
        if asked.is_preset:
            return run_from_dict({"stages": [{"name": "base", **load_preset(asked.model)}]}).stages[0]
        if asked.is_folder:
            return run_from_dict(run_file_of_folder(Path(asked.model))).stages[0]
        return StageConfig(name="base", model=shape_of(parse_size(asked.model) or 0, self._vocabulary()))

    def _budget(self) -> tuple[int, str]:
        asked, speed = self.asked, self.layout.tokens_per_s_per_device
        if asked.tokens is not None:
            return int(asked.tokens), "as asked for"
        if asked.hours is not None and speed is not None:
            tokens = int(speed * asked.gpus * asked.hours * 3600 * parts.GOODPUT)
            return tokens, f"{asked.hours:g} hours at that speed and a goodput of {100 * parts.GOODPUT:.0f} %"
        if asked.is_folder:
            return TRAINED_TOKENS, "a beginning for a model that is trained already"
        if asked.is_preset and self.base.tokens > 0:
            return int(self.base.tokens), "the preset's"
        usual = parts.TOKENS_PER_PARAMETER
        return usual * self.parameters, f"{usual} per parameter is compute-optimal (arXiv 2203.15556)"

    def _advice(self) -> GrowthAdvice | None:
        """What `flm advise` says of a run of this model; none for a model that is trained already."""
        if self.asked.is_folder:
            return None
        run = RunConfig(name="init", data=DataConfig(sequence_length=self.length), stages=[self.base])
        try:
            return advise(run)
        except FlmError:
            if self.asked.grow:
                raise
            return None

    def _fill_hours(self, hours: float) -> None:
        """Budget of all stages together: a smaller model is faster, and growth saves, so that more tokens fit."""
        for _ in range(MOST_FITS):
            small, last = self._split()
            layouts = ((small.tokens, parts.layout_on(small, self.length, self.machine, self.asked.gpus)),
                       (last, self.layout))  # fmt: skip
            speeds = [(tokens, layout.tokens_per_s_per_device) for tokens, layout in layouts]
            needed_s = sum(tokens / (speed * self.asked.gpus) for tokens, speed in speeds if speed)
            share = hours * 3600 * parts.GOODPUT / needed_s
            if abs(share - 1) < FIT:
                return
            self.tokens = max(1, int(self.tokens * share))
            self.base = replace(self.base, tokens=self.tokens)
            self.advice = self._advice()

    def _split(self) -> tuple[StageConfig, int]:
        """The first stage of a grown run, and the tokens of the last. Raises RequestError if nothing can grow."""
        if self.advice is None or self.advice.best is None:
            raise RequestError(f"grow: no smaller model can grow into {self.asked.model}")
        point = self.advice.point
        first = int(point.small_tokens) if point else self.tokens // 2
        last = int(point.large_tokens) if point else self.tokens - first
        model = self.advice.best.candidate.model
        return replace(self.base, name="small", model=model, tokens=first, growth=None), last

    def _head(self) -> Iterator[str]:
        asked = self.asked
        yield "# Made by `flm init`. Every field with its default: `flm config`; this file resolved: `flm config FILE`."
        yield f"name: {_text(asked.name)}"
        yield parts.commented(f"output: {_text(asked.output)}", parts.about("output"))
        if self.tokenizer is not None:
            yield parts.commented(f"tokenizer: {_text(self.tokenizer)}", parts.about("tokenizer"))
        yield "data:"
        yield parts.commented(f"  sequence_length: {self.length}", parts.about("data.sequence_length"))
        prefix = f"{asked.output}/data/train" if asked.is_text else asked.data
        yield f"  train: [{{path: {_text(prefix)}}}]"
        if self._validates(prefix):
            yield f"  validation: [{{path: {_text(f'{prefix}_validation')}}}]"

    def _validates(self, prefix: str) -> bool:
        return self.asked.is_text or Path(f"{prefix}_validation.idx").exists()

    def _stages(self) -> Iterator[str]:
        asked, advice = self.asked, self.advice
        if advice is not None:
            yield f"  # `flm advise`: {str(advice).splitlines()[4].removeprefix('advice: ')}"
        if not asked.grow:
            yield from _item(self._stage_lines(self.base, self.layout, self.tokens, self.why, None))
            return
        small, last = self._split()
        assert advice is not None and advice.best is not None, "else it raises"
        layout = parts.layout_on(small, self.length, self.machine, asked.gpus)
        when = "when growth pays most, by equality of losses" if advice.point else "half of the budget"
        yield from _item(self._stage_lines(small, layout, int(small.tokens), when, None))
        growth = dict(advice.growth or dict.fromkeys(advice.best.candidate.factors, "zero"))
        large = replace(self.base, name="large")
        goodput = f"a goodput of {100 * parts.GOODPUT:.0f} %"
        left = "what is left" if asked.hours is None else f"what is left of {asked.hours:g} hours at {goodput}"
        yield from _item(self._stage_lines(large, self.layout, last, left, growth))

    def _stage_lines(
        self, stage: StageConfig, layout: parts.Layout, tokens: int, why: str, growth: dict[str, object] | None
    ) -> Iterator[str]:
        asked, parameters = self.asked, parameter_count(stage.model)
        yield f"name: {stage.name}"
        if asked.is_preset:
            yield parts.commented(f"preset: {asked.model}", "fields below replace its own")
        if asked.is_folder:
            yield parts.commented("model: from_checkpoint", f"{parameters:,} parameters")
        elif not asked.is_preset or stage.name == "small":
            yield parts.model_line(stage)
        if growth:
            yield parts.commented(f"growth: {parts.flow(growth)}", parts.about("stages.growth"))
        yield from parts.layout_lines(layout, stage.global_batch, self.length)
        yield parts.budget_line(tokens, parameters, why)
        yield parts.commented(f"precision: {stage.precision}", parts.about("stages.precision"))
        if not asked.is_preset:
            yield from parts.optimizer_lines(parameters, asked.is_folder)
        yield parts.schedule_line(tokens, self.length, asked.grow)
        steps = max(1, tokens // (stage.global_batch * self.length))
        if asked.is_text:
            values = {"interval_steps": max(10, steps // 50)}
            yield parts.commented(f"validation: {parts.flow(values)}", "about fifty times")

    def _tail(self) -> Iterator[str]:
        steps = max(1, self.tokens // (self.base.global_batch * self.length))
        values: dict[str, object] = {"interval_steps": min(1000, max(10, steps // 20))}
        if self.asked.is_folder:
            values["initial"] = _text(self.asked.model)
        yield parts.commented(f"checkpoint: {parts.flow(values)}", parts.about("checkpoint.interval_steps"))
        yield "logging: {interval_steps: 10}"


def _item(lines: Iterator[str]) -> Iterator[str]:
    """Lines as one item of the list of stages."""
    for number, line in enumerate(lines):
        yield f"  {'- ' if number == 0 else '  '}{line}"


def _text(value: str) -> str:
    """Text as YAML."""
    return format_yaml([value], flow=True).strip()[1:-1]
