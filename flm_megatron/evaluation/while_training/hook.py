"""The hook that evaluates the model in training, in its own layout, without a second job."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

import torch.distributed as dist

from flm_megatron.config.schema import RunConfig
from flm_megatron.data.conversations.template import TELE_FLM, ChatTemplate
from flm_megatron.data.tokenizer import open_tokenizer
from flm_megatron.engine.data_parallel import unwrap
from flm_megatron.errors import one_line
from flm_megatron.evaluation.generation.generate import GenerationRequest
from flm_megatron.evaluation.harness.run import Questions, ask, scores_of
from flm_megatron.evaluation.harness.tasks import load_tasks, task_files
from flm_megatron.evaluation.perplexity.bits_per_byte import WindowSettings, score_documents
from flm_megatron.evaluation.perplexity.run import read_documents
from flm_megatron.evaluation.session import Session, lead_session
from flm_megatron.evaluation.while_training.check import tasks_folder
from flm_megatron.model.forward import whole_sequences
from flm_megatron.training.hooks import Hook
from flm_megatron.training.metrics.events import EvaluationEvent
from flm_megatron.training.random_state import kept_random_state

if TYPE_CHECKING:
    from lm_eval.api.task import Task

    from flm_megatron.model.teleflm import TeleFLM
    from flm_megatron.training.stage import StageTrainer


MOST_SAID = 1000
"""Letters of what a task raises."""


def evaluation_hooks(run: RunConfig) -> list[Hook]:
    """The hook of a run that asks for evaluation while it trains; none otherwise."""
    return [Evaluation(run)] if run.evaluation.asked else []


@dataclass
class Found:
    """What one evaluation measured: numbers by name, and the completion of each prompt."""

    values: dict[str, float] = field(default_factory=dict)
    completions: list[str] = field(default_factory=list)


class Evaluation(Hook):
    """Evaluates at an interval and at the end of the stage: bits per byte, tasks, completions.

    Nothing of training changes by it: neither weights nor optimizer nor generators of random numbers. Tasks are
    another's code, run on rank 0: what they raise is said, and training goes on.
    """

    def __init__(self, run: RunConfig) -> None:
        self.asked, self.interval_steps = run.evaluation, run.evaluation.interval_steps
        self.measured_step = -1
        self._tokenizer = open_tokenizer(str(run.tokenizer))
        self._documents = {text.display_name: read_documents(text.path) for text in run.evaluation.texts}
        self._tasks: list[Task] = []

    def on_start(self, trainer: StageTrainer) -> None:
        """Build the tasks, while nothing else runs that would mind the working folder of `task_files`."""
        if self.asked.tasks and dist.get_rank() == 0:
            folder = tasks_folder(self.asked)
            with kept_random_state(), task_files(folder, self.asked.network):
                self._tasks = list(load_tasks(self.asked.tasks, folder).load(self.asked.tasks)["tasks"].values())

    def at_interval(self, trainer: StageTrainer) -> None:
        """Measure and report."""
        with trainer.meter.stall("evaluation"), kept_random_state():
            found = self._measure(trainer)
        self.measured_step = trainer.step
        if trainer.log is None:
            return
        completions = tuple(zip(self.asked.prompts, found.completions, strict=True))
        trainer.log.write(EvaluationEvent(*trainer.position(), found.values, completions))
        place = f"{trainer.stage.name} step {trainer.step}"
        if found.values:
            trainer.log.say(f"{place} | {', '.join(f'{name} {value:.4f}' for name, value in found.values.items())}")
        for prompt, text in completions:
            trainer.log.say(f"{place} | {_quoted(prompt)} goes on {_quoted(text)}")

    def on_end(self, trainer: StageTrainer, finished: bool) -> None:
        """Evaluate after the last step whatever the interval."""
        if finished and self.measured_step != trainer.step:
            self.at_interval(trainer)

    def _measure(self, trainer: StageTrainer) -> Found:
        """On every rank; whole on rank 0."""
        chunks = [cast("TeleFLM", unwrap(chunk)) for chunk in trainer.state.chunks]
        found, length = Found(), _window(trainer)
        with trainer.state.evaluating(), whole_sequences(chunks):
            windows = WindowSettings(length, self.asked.stride or max(1, length // 2), self.asked.batch)
            for name, texts in self._documents.items():
                score = score_documents(chunks, self._tokenizer, texts, windows)
                found.values[f"bits_per_byte/{name}"] = score.bits_per_byte
            if self.asked.tasks or self.asked.prompts:
                session = Session(chunks, self._tokenizer, self.asked.batch)
                lead_session(session, lambda session: self._lead(session, trainer, length, found))
        return found

    def _lead(self, session: Session, trainer: StageTrainer, length: int, found: Found) -> None:
        """On rank 0: tasks and prompts."""
        tokenizer = self._tokenizer
        if self._tasks:
            questions = Questions(self._tasks, None, self.asked.fewshot, self.asked.limit)
            try:
                result = ask(questions, session, length, ChatTemplate(TELE_FLM, tokenizer))
                found.values |= scores_of(result["results"])
            except (Exception, SystemExit) as error:
                if trainer.log:
                    said = one_line(f"{type(error).__name__}: {error}")[:MOST_SAID]
                    trainer.log.say(f"WARNING: tasks are not evaluated: {said}")
        room = max(1, length - self.asked.max_new_tokens)
        prompts = [(tokenizer.encode(text) or [tokenizer.eod])[-room:] for text in self.asked.prompts]
        requests = [GenerationRequest(at, ids, self.asked.max_new_tokens) for at, ids in enumerate(prompts)]
        found.completions = [completion.text for completion in session.generate(requests)]


def _window(trainer: StageTrainer) -> int:
    """Tokens of a window: the sequence length, as far as learned positions reach."""
    length = trainer.run.data.sequence_length
    return min(length, trainer.stage.model.max_positions or length)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
