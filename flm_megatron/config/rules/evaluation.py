"""Rules on evaluation while training: what the run file alone can say of it."""

from __future__ import annotations

from collections import Counter

from flm_megatron.config.ranges import LARGEST_COUNT, out_of_range
from flm_megatron.config.schema import RunConfig


def evaluation_measures_are_counts(run: RunConfig) -> list[str]:
    """Steps, questions and tokens are counts, and windows move by no more than they hold."""
    asked, most = run.evaluation, run.data.sequence_length
    return out_of_range(
        {
            "evaluation.interval_steps": (asked.interval_steps, 0, LARGEST_COUNT),
            "evaluation.stride": (asked.stride, 1, most),
            "evaluation.limit": (asked.limit, 1, LARGEST_COUNT),
            "evaluation.fewshot": (asked.fewshot, 0, LARGEST_COUNT),
            "evaluation.max_new_tokens": (asked.max_new_tokens, 1, LARGEST_COUNT),
            "evaluation.batch": (asked.batch, 1, LARGEST_COUNT),
        }
    )


def evaluation_measures_something(run: RunConfig) -> list[str]:
    """An interval without anything to measure is a mistake, and so is a name or a prompt without text."""
    asked = run.evaluation
    lines = []
    if asked.interval_steps and not asked.asked:
        lines.append(
            f"evaluation.interval_steps is {asked.interval_steps}, but nothing is named to evaluate: give "
            "evaluation.texts, tasks or prompts"
        )
    names = Counter(text.display_name for text in asked.texts)
    lines += [
        f"evaluation.texts has a text named {name!r}{' twice' if count > 1 else ''}: give each a name of its own"
        for name, count in names.items()
        if count > 1 or not name.strip() or not name.isprintable()
    ]
    lines += [
        f"evaluation.prompts.{index} is empty: give a text" for index, text in enumerate(asked.prompts) if not text
    ]
    return lines


def completions_have_a_cache(run: RunConfig) -> list[str]:
    """Under a virtual pipeline each forward pass is one of several micro-batches, and no cache can follow it."""
    return [
        f"evaluation.prompts cannot be completed under stages.{index}.parallel.virtual_pipeline "
        f"{stage.parallel.virtual_pipeline}: leave them out, or give 1"
        for index, stage in enumerate(run.stages)
        if run.evaluation.prompts and stage.parallel.virtual_pipeline > 1
    ]


EVALUATION_RULES = (evaluation_measures_are_counts, evaluation_measures_something, completions_have_a_cache)
