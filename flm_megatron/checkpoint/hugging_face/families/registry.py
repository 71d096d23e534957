"""The families that are known, and which of them is meant."""

from __future__ import annotations

from flm_megatron.checkpoint.hugging_face.families.family import Family
from flm_megatron.checkpoint.hugging_face.families.gemma import GEMMA
from flm_megatron.checkpoint.hugging_face.families.gpt2 import GPT2
from flm_megatron.checkpoint.hugging_face.families.gpt_neox import GPT_NEOX
from flm_megatron.checkpoint.hugging_face.families.llama import LLAMA
from flm_megatron.checkpoint.hugging_face.families.mistral import MISTRAL
from flm_megatron.checkpoint.hugging_face.families.qwen2 import QWEN2
from flm_megatron.checkpoint.hugging_face.families.qwen3 import QWEN3
from flm_megatron.checkpoint.hugging_face.families.teleflm import TELEFLM, is_teleflm
from flm_megatron.config.messages import nearest
from flm_megatron.config.schema import ModelConfig
from flm_megatron.errors import RequestError
from flm_megatron.json_text import JsonObject

FAMILIES = {family.name: family for family in (TELEFLM, LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA, GPT_NEOX, GPT2)}
"""By `model_type`; the first that can express a model is proposed where another was asked for."""

REFUSED = {
    "gemma2": "it caps scores and logits softly, has norms after attention and feed-forward layers, and windows in "
    "every other layer",
    "gemma3": "it has norms after attention and feed-forward layers, and two kinds of layers with their own windows "
    "and rotary positions",
}
"""Relatives of known families, by the beginning of their `model_type`, and what in them is not supported here."""


def family_named(name: str) -> Family:
    """The family of this name. Raises RequestError, naming the nearest one, if there is none."""
    if name not in FAMILIES:
        raise RequestError(f"flavour is {name!r:.80}, no family known here: {nearest(name, FAMILIES)}")
    return FAMILIES[name]


def family_of(config: JsonObject, where: str) -> Family:
    """The family that a `config.json` belongs to; `where` names it in errors.

    Raises RequestError, naming the nearest known one, for another `model_type`.
    """
    given = config.get("model_type", "")
    plain = given.lower().replace("-", "").replace("_", "") if isinstance(given, str) else ""
    if is_teleflm(config, plain):
        return TELEFLM
    known = {name.replace("_", ""): family for name, family in FAMILIES.items()}
    if reason := next((REFUSED[name] for name in REFUSED if plain.startswith(name)), None):
        raise RequestError(f"{where}: model_type {given!r:.80} is not supported: {reason}")
    if plain not in known:
        raise RequestError(f"{where}: model_type {given!r:.80} is not supported: {nearest(plain, FAMILIES)}")
    return known[plain]


def require_expressible(model: ModelConfig, family: Family) -> None:
    """Raise RequestError, naming what stands against it and a family that can, if `family` cannot express `model`."""
    obstacles = family.obstacles(model)
    if not obstacles:
        return
    other = next((other.name for other in FAMILIES.values() if not other.obstacles(model)), None)
    advice = f"--flavour {other} can" if other else "no family known here can, use `flm checkpoint reshard` instead"
    raise RequestError(f"{family.name} cannot express the model's {', '.join(obstacles)}: {advice}")
