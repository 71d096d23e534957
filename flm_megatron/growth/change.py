"""What growth and shrinking have in common: two models, and factors that undo a change of multipliers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from flm_megatron.config.schema import ModelConfig
from flm_megatron.errors import RequestError
from flm_megatron.json_text import JsonObject
from flm_megatron.model.parameters import ParameterSpec, Unit

Change = Literal["growth", "shrinking"]
VERB: Mapping[Change, str] = {"growth": "grow", "shrinking": "shrink"}
DONE: Mapping[Change, str] = {"growth": "grown", "shrinking": "shrunk"}


@dataclass(frozen=True)
class ShapeChange:
    """A model of another shape out of `old`: the base of the plans of either change.

    `new` is the model that `stage` trains: as configured, but for what the change derives.
    """

    CHANGE: ClassVar[Change]

    stage: str
    old: ModelConfig
    new: ModelConfig

    @property
    def head_scale(self) -> float:
        """Factor on old LM-head weights that undoes the change of the logit multiplier output_mult / m."""
        return self.old.logit_multiplier / self.new.logit_multiplier

    @property
    def embedding_scale(self) -> float:
        """Factor on old embedding weights that undoes a change of input_mult."""
        return self.old.input_mult / self.new.input_mult

    @property
    def final_norm_scale(self) -> float:
        """Factor on the final norm's old values. A tied head is scaled as the embedding is: the norm that it reads
        makes up for it."""
        return self.head_scale / self.embedding_scale if self.new.tie_embeddings else 1.0

    def multiplier_scale(self, spec: ParameterSpec) -> float:
        """Factor on the old values of a parameter that undoes a change of multipliers."""
        if spec.place == "last" and spec.find(Unit.HIDDEN, None) is not None:
            return self.final_norm_scale
        return {"embedding": self.embedding_scale, "head": self.head_scale}.get(spec.kind, 1.0)

    @property
    def preserving(self) -> bool:
        """Whether the new model computes the old function at its first step."""
        return False

    def to_json(self) -> dict[str, object]:
        """Plain data, for a checkpoint's manifest."""
        raise NotImplementedError


def changed_model(old: ModelConfig, new: ModelConfig, mean_square: float) -> ModelConfig:
    """`new` with the old vocabulary, and the epsilon that fits a mean square in the norms of `mean_square` times the
    old one.

    Queries and keys stay as they are, and with them the epsilon of their norms. output_mult stays as configured;
    LM-head weights make up for its change.
    """
    epsilon = old.norm_epsilon * mean_square
    kept = old.query_key_epsilon if old.query_key_norm and old.query_key_epsilon != epsilon else None
    return replace(new, vocab_size=old.vocab_size, norm_epsilon=epsilon, query_key_norm_epsilon=kept)


def check_same_plan(saved: ShapeChange, now: ShapeChange) -> None:
    """Check that a resumed stage continues under the plan that it began with.

    Raises:
        RequestError: the plans differ; the message names the first difference.
    """
    before, after = _flat(saved.to_json()), _flat(now.to_json())
    for name in before:
        if before[name] != after[name]:
            raise RequestError(
                f"stage {saved.stage!r} was {DONE[saved.CHANGE]} with {name} = {_brief(before[name])}, and the run "
                f"file now gives {_brief(after[name])}: set it back, or start the stage anew in another output folder"
            )


def _flat(data: Mapping[str, object] | JsonObject, prefix: str = "") -> dict[str, object]:
    """Nested dictionaries as one, its keys joined by dots."""
    out: dict[str, object] = {}
    for key, value in data.items():
        out.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return out


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 160 else text[:157] + "..."
