"""What a family of models is: names of its modules, its `config.json` both ways, and what it can express."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields

from flm_megatron.config.schema import ModelConfig
from flm_megatron.json_text import JsonObject
from flm_megatron.model.parameters.axis import BandName

Modules = Mapping[str, Mapping[BandName, str]]
"""The target module of every band of rows of every logical module, with `{layer}` for the number of the layer."""
Values = tuple[object, ...] | None
"""The values of a field of the model that a family can express; none for any."""

EVERYWHERE = frozenset(
    (
        *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "head_dim"),
        *("vocab_size", "norm_epsilon", "rope_theta"),
        *("input_mult", "output_mult", "mup"),  # folded into the weights where a family has no fields for them
        *("matrix_init_std", "vector_init_std", "head_init_std", "from_checkpoint"),  # trained weights forget them
        *("lora", "xpos_scale_base"),  # adapters are refused by their parameters, xPos by `position`
    )
)
"""Fields of a model whose value stands against no family."""


def _one(model: ModelConfig) -> float:
    return 1.0


@dataclass(frozen=True)
class Family:
    """One family of models of `transformers`.

    `name` is its `model_type`. `model` makes the model of a `config.json` (the second argument names it in errors) and
    raises RequestError for a field that is wrong or not supported, naming it; `settings` makes the part of a
    `config.json` that says what the model is, the second argument being the sequence length it was trained with.
    `expresses` gives the values of the model's fields that it can hold; fields that it does not name have to be at
    their defaults. `multipliers` says whether `config.json` holds the multipliers of muP; if not, an export folds them
    into the weights. `embedding_multiplier` is what a family multiplies the embedding's output by, which is folded in
    too; its norms multiply by their stored weights plus `norm_offset`. With `plain_heads` every head has a key and a
    value of its own and hidden size / heads channels. `transposed` matrices of layers are stored with their inputs
    first; with `bands_by_kind` a module of several bands has each of them whole, queries of all heads before keys, else
    head after head. `body` begins the names of all but the head, and is left out in files of the bare model. `buffers`
    are ends of names of tensors that older exports hold and that follow from the configuration; `code` are files of
    `released_form` that a folder carries.
    """

    name: str
    modules: Modules
    model: Callable[[JsonObject, str], ModelConfig]
    settings: Callable[[ModelConfig, int], dict[str, object]]
    expresses: Mapping[str, Values]
    multipliers: bool = False
    embedding_multiplier: Callable[[ModelConfig], float] = _one
    norm_offset: float = 0.0
    plain_heads: bool = False
    transposed: bool = False
    bands_by_kind: bool = False
    body: str = ""
    buffers: tuple[str, ...] = ()
    code: tuple[str, ...] = ()

    def obstacles(self, model: ModelConfig) -> list[str]:
        """What of `model` the family cannot express, such as `normalization = layernorm (here: rmsnorm)`."""
        default, found = ModelConfig(), []
        for name in (field.name for field in fields(ModelConfig) if field.name not in EVERYWHERE):
            allowed = self.expresses.get(name, (getattr(default, name),))
            if allowed is not None and getattr(model, name) not in allowed:
                found.append(f"{name} = {getattr(model, name)} (here: {' or '.join(map(str, allowed))})")
        if self.plain_heads:
            heads, channels = model.num_attention_heads, model.hidden_size / model.num_attention_heads
            found += [f"num_query_groups = {model.query_groups} (here: {heads})"] * (model.query_groups != heads)
            found += [f"head_dim = {model.kv_channels} (here: {channels:g})"] * (model.kv_channels != channels)
        return found
