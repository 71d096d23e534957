"""Families: which one a `config.json` is of, and what each can express."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest

from flm_megatron.checkpoint.hugging_face.config import config_of, model_from_config
from flm_megatron.checkpoint.hugging_face.families.family import EVERYWHERE
from flm_megatron.checkpoint.hugging_face.families.llama import LLAMA
from flm_megatron.checkpoint.hugging_face.families.registry import (
    FAMILIES,
    family_named,
    family_of,
    require_expressible,
)
from flm_megatron.config.schema import ModelConfig
from flm_megatron.errors import RequestError

MODEL = ModelConfig(num_attention_heads=6, num_query_groups=2, head_dim=8, vocab_size=331, rope_theta=5e5)
PLAIN_HEADS = replace(MODEL, num_attention_heads=8, num_query_groups=None, head_dim=None)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_reads_what_it_writes(name: str) -> None:
    family = FAMILIES[name]
    richest: dict[str, Any] = {field: values[-1] for field, values in family.expresses.items() if values}
    if richest.get("position") == "learned":
        richest |= {"max_positions": 4096, "rope_theta": 10000.0}
    base = PLAIN_HEADS if family.plain_heads else MODEL
    model = replace(base, **richest, input_mult=family.embedding_multiplier(base))
    assert not family.obstacles(model)
    written = config_of(model, family, 384, 4096, "float32")
    assert family_of(written, "folder") is family
    assert model_from_config(written, "folder") == model


def test_the_family_is_the_one_of_the_model_type_or_of_the_multipliers() -> None:
    for kind in ("llama", "LLaMA"):
        assert family_of({"model_type": kind}, "folder").name == "llama"
    for given in ({"model_type": "Tele-FLM"}, {"model_type": "teleflm_1t"}, {"mup_scale_factor": 2.0}):
        assert family_of(dict(given), "folder").name == "teleflm"
    with pytest.raises(RequestError, match=r"folder: model_type 'lama' is not supported: did you mean 'llama'\?"):
        family_of({"model_type": "lama"}, "folder")
    for kind, reason in (("gemma2", "caps scores and logits"), ("gemma3_text", "two kinds of layers")):
        with pytest.raises(RequestError, match=rf"folder: model_type '{kind}' is not supported: it .*{reason}"):
            family_of({"model_type": kind}, "folder")
    with pytest.raises(RequestError, match=r"flavour is 'tele', no family known here: "):
        family_named("tele")


def test_a_model_is_refused_with_a_family_that_can_hold_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = replace(MODEL, activation="gelu", bias=True)
    with pytest.raises(RequestError, match=r"model's activation = gelu \(here: swiglu\): no family known"):
        require_expressible(model, LLAMA)
    wide = replace(LLAMA, name="wide", expresses={"activation": ("gelu",), "bias": (True,)})
    monkeypatch.setitem(FAMILIES, "wide", wide)
    with pytest.raises(RequestError, match=r"activation = gelu \(here: swiglu\): --flavour wide can"):
        require_expressible(model, LLAMA)
    with pytest.raises(RequestError, match=r"activation = swiglu \(here: gelu\), bias = False \(here: True\): "):
        require_expressible(MODEL, wide)


def test_every_field_of_a_model_is_expressed_or_has_to_be_at_its_default() -> None:
    known = {field.name for field in fields(ModelConfig)}
    assert known > EVERYWHERE
    assert all(family.expresses.keys() <= known - EVERYWHERE for family in FAMILIES.values())
