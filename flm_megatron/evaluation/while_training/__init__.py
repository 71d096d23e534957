"""Evaluation on the ranks that train: `check_evaluation` before a run, `evaluation_hooks` between its steps."""

from flm_megatron.evaluation.while_training.check import check_evaluation
from flm_megatron.evaluation.while_training.hook import evaluation_hooks

__all__ = ["check_evaluation", "evaluation_hooks"]
