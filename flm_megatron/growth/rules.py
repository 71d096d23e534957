"""Which models can grow into which: a small rule per function, each raising RequestError with values and fix."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from flm_megatron.config.budget import stage_steps
from flm_megatron.config.schema import GrowthConfig, ModelConfig, RunConfig, StageConfig
from flm_megatron.errors import RequestError
from flm_megatron.growth.change import DONE, VERB, Change
from flm_megatron.growth.opening import OpeningMasks

KEPT_FIELDS = (
    *("normalization", "activation", "bias", "qkv_bias", "query_key_norm", "parallel_residual"),
    *("position", "rope_theta", "rope_scaling", "rotary_percent", "xpos_scale_base", "sliding_window"),
    *("max_positions", "tie_embeddings"),
)
WIDTHS = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "query_groups")


def check_growth(old: ModelConfig, new: ModelConfig, growth: GrowthConfig) -> None:
    """Check all rules on two models and the growth between them."""
    check_kept_kind(old, new, "growth")
    check_no_shrinking(old, new)
    check_heads(old, new)
    check_tied_head(old, new, growth)
    check_clones(old, new, growth)
    check_shrink(growth)
    check_optimizer_state(growth)
    check_new_scale(old, new, growth)
    check_learning_rates(old, new, growth)


def grown_dimensions(old: ModelConfig, new: ModelConfig) -> tuple[str, ...]:
    """Dimensions that grow, of hidden, ffn, heads, layers; out of a model without layers ffn and heads do not."""
    heads_differ = (old.num_attention_heads, old.query_groups) != (new.num_attention_heads, new.query_groups)
    has_layers = old.num_layers > 0
    grows = {
        "hidden": old.hidden_size != new.hidden_size,
        "ffn": has_layers and old.ffn_hidden_size != new.ffn_hidden_size,
        "heads": has_layers and heads_differ,
        "layers": old.num_layers != new.num_layers,
    }
    return tuple(name for name, does in grows.items() if does)


def check_kept_kind(old: ModelConfig, new: ModelConfig, change: Change) -> None:
    """All that is no size must stay, whichever way the shape changes."""
    check_no_adapters(old, new, change)
    check_kept(old, new, change)
    check_query_key_epsilon(old, new, change)
    check_vocabulary(old, new, change)


def check_no_adapters(old: ModelConfig, new: ModelConfig, change: Change) -> None:
    """Adapters must be merged before a model changes its shape."""
    if old.lora is not None or new.lora is not None:
        raise RequestError(
            f"model.lora: a model with adapters does not {VERB[change]}: merge them with `flm checkpoint export-hf` "
            "first"
        )


def check_kept(old: ModelConfig, new: ModelConfig, change: Change) -> None:
    """The kind of block and its constants must stay."""
    for name in KEPT_FIELDS:
        before, after = getattr(old, name), getattr(new, name)
        if before != after:
            raise RequestError(
                f"model.{name} is {before!r} in the stage before and {after!r} in the {DONE[change]} one: {change} "
                f"keeps it, so set model.{name} to {before!r}"
            )
    if old.mup.enabled != new.mup.enabled:
        raise RequestError(
            f"model.mup.enabled is {old.mup.enabled} in the stage before and {new.mup.enabled} in the {DONE[change]} "
            f"one: {change} keeps the parametrization, so set both alike"
        )


def check_query_key_epsilon(old: ModelConfig, new: ModelConfig, change: Change) -> None:
    """Heads keep their size, so that the epsilon of their norms stays."""
    before, after = old.query_key_epsilon, new.query_key_epsilon
    if new.query_key_norm and before != after:
        raise RequestError(
            f"the epsilon of query and key norms is {before!r} in the stage before and {after!r} in the "
            f"{DONE[change]} one: {change} keeps it, so set model.query_key_norm_epsilon to {before!r}"
        )


def check_vocabulary(old: ModelConfig, new: ModelConfig, change: Change) -> None:
    """The vocabulary must stay; none in `new` means the old one, none in `old` that it is not known yet."""
    if None not in (old.vocab_size, new.vocab_size) and new.vocab_size != old.vocab_size:
        raise RequestError(
            f"model.vocab_size is {old.vocab_size} in the stage before and {new.vocab_size} in the {DONE[change]} one: "
            f"{change} keeps the tokenizer and its vocabulary, so use the same in every stage"
        )


def check_no_shrinking(old: ModelConfig, new: ModelConfig) -> None:
    """No dimension may shrink."""
    for name in WIDTHS:
        before, after = getattr(old, name), getattr(new, name)
        if after < before:
            raise RequestError(
                f"{name} shrinks from {before} to {after}: growth only adds; give at least {before}, or `shrink` in "
                "place of growth"
            )


def check_heads(old: ModelConfig, new: ModelConfig) -> None:
    """Head dim must stay; every old query group must keep its queries together."""
    if new.kv_channels != old.kv_channels:
        raise RequestError(
            f"head dim changes from {old.kv_channels} to {new.kv_channels}: growth adds heads of the same size; "
            f"set model.head_dim to {old.kv_channels}, or num_attention_heads so that hidden_size / "
            f"num_attention_heads is {old.kv_channels}"
        )
    before, after = queries_per_group(old, new)
    if after < before:
        raise RequestError(
            f"query heads per group fall from {before} to {after} ({new.num_attention_heads} heads, "
            f"{new.query_groups} groups): an old group's queries would lose their keys and values; "
            f"give at least {before * new.query_groups} heads or fewer groups"
        )


def queries_per_group(old: ModelConfig, new: ModelConfig) -> tuple[int, int]:
    """Query heads of a group before and after. Raises RequestError if the new ones do not divide into their groups."""
    if new.num_attention_heads % new.query_groups:
        raise RequestError(
            f"{new.num_attention_heads} query heads do not divide into {new.query_groups} query groups: "
            "make num_attention_heads a multiple of num_query_groups"
        )
    return old.num_attention_heads // old.query_groups, new.num_attention_heads // new.query_groups


def check_tied_head(old: ModelConfig, new: ModelConfig, growth: GrowthConfig) -> None:
    """New channels that are zero in a head that is the embedding learn by what layers read of them."""
    zero = growth.hidden == "zero" and new.hidden_size != old.hidden_size
    if new.tie_embeddings and zero and not new.num_layers:
        raise RequestError(
            f"growth.hidden is `zero` with model.tie_embeddings and num_layers {new.num_layers}: new channels of the "
            "embedding would stay 0, as nothing but the head reads them; use mask or clone, or add layers"
        )


def check_clones(old: ModelConfig, new: ModelConfig, growth: GrowthConfig) -> None:
    """All hidden channels need equally many copies, for the norms' sums; noise needs clones to be put on."""
    before, after = old.hidden_size, new.hidden_size
    if growth.hidden == "clone" and after % before:
        below = after - after % before
        raise RequestError(
            f"growth.hidden is `clone`, but hidden_size {after} is not a multiple of {before}: give {below} or "
            f"{below + before}, so that every channel has equally many copies, or use mask or zero"
        )
    if growth.clone_noise and "clone" not in [getattr(growth, name) for name in grown_dimensions(old, new)]:
        raise RequestError(
            f"growth.clone_noise is {growth.clone_noise}, but nothing is cloned: set growth.hidden, ffn or heads to "
            "clone, or leave clone_noise out"
        )


def check_shrink(growth: GrowthConfig) -> None:
    """Shrink and perturb fills every matrix in its own way, and changes the loss."""
    if growth.shrink is None:
        return
    for name in ("hidden", "ffn", "heads", "layers"):
        if (operator := getattr(growth, name)) in ("zero", "clone"):
            raise RequestError(
                f"growth.shrink takes the place of growth.{name} `{operator}`, whose function it would not preserve: "
                "leave one of the two out"
            )
    if growth.new_scale == "trained":
        raise RequestError(
            "growth.shrink adds a fresh model, so that growth.new_scale cannot be `trained`: leave one of the two out"
        )
    if growth.loss_tolerance is not None:
        raise RequestError(
            f"growth.shrink changes the loss, so that growth.loss_tolerance {growth.loss_tolerance:g} cannot be "
            "certified: leave one of the two out"
        )


def check_optimizer_state(growth: GrowthConfig) -> None:
    """Entries with a grown second moment are not at the start of its average, whose bias would be corrected; where
    Adam begins anew, all are."""
    if growth.optimizer_step != "birth":
        return
    if growth.optimizer_state == "grow":
        raise RequestError(
            "growth.optimizer_state `grow` gives new entries second moments that are not biased, so that "
            "growth.optimizer_step cannot be `birth`: use `keep` for one of the two"
        )
    if growth.optimizer_state == "reset_all":
        raise RequestError(
            "growth.optimizer_state `reset_all` begins Adam's step anew for all entries, so that "
            "growth.optimizer_step `birth` has nothing to tell apart: leave one of the two out"
        )


def check_new_scale(old: ModelConfig, new: ModelConfig, growth: GrowthConfig) -> None:
    """There are new random entries, and trained ones beside them."""
    if growth.new_scale == "init":
        return
    operators = {name: getattr(growth, name) for name in grown_dimensions(old, new)}
    layers = operators.pop("layers", None)
    drawn_layers = layers == "random" and old.num_layers > 0
    if not drawn_layers and not {"mask", "zero"} & set(operators.values()):
        raise RequestError(
            "growth.new_scale is `trained`, but no random entries are added beside trained ones: leave it out"
        )


def check_learning_rates(old: ModelConfig, new: ModelConfig, growth: GrowthConfig) -> None:
    """Raised learning rates are those of something, and last."""
    if growth.new_lr_mult != 1 and not grown_dimensions(old, new):
        raise RequestError(
            f"growth.new_lr_mult is {growth.new_lr_mult}, but nothing is added to the model: use growth.lr_mult, or "
            "leave it out"
        )
    if (growth.lr_mult, growth.new_lr_mult) != (1, 1) and growth.lr_mult_steps is None and growth.mask_steps == 0:
        raise RequestError(
            "growth.lr_mult and new_lr_mult last for growth.mask_steps, which is 0: give growth.lr_mult_steps"
        )


def check_mask_length(stages: Sequence[StageConfig], mask_steps: int, sequence_length: int) -> None:
    """The mask of the first of `stages` must open within them."""
    stage, later = stages[0], stages[1:]
    steps = sum(stage_steps(each, sequence_length) for each in stages)
    if mask_steps > steps:
        has = f"it and those after it have {steps} steps" if later else f"the stage has {steps} steps"
        raise RequestError(
            f"stage {stage.name!r}: growth.mask_steps is {mask_steps}, but {has} "
            f"({sum(each.tokens for each in stages)} tokens): give at most {steps}"
        )
    if mask_steps < 1:
        raise RequestError(f"stage {stage.name!r}: growth.mask_steps is {mask_steps}: give at least 1")


def check_earlier_masks(
    stages: Sequence[StageConfig], earlier: Collection[OpeningMasks], grows: Collection[str], sequence_length: int
) -> None:
    """Masks that are still opening are of dimensions that do not grow in the first of `stages`, and open within them
    all."""
    stage, steps = stages[0], sum(stage_steps(each, sequence_length) for each in stages)
    for masks in earlier:
        here = f"of the growth mask of stage {masks.stage!r} (v = {masks.value(0):.3f}, open after {masks.left} steps"
        if again := masks.grown_by(grows):
            raise RequestError(
                f"stage {stage.name!r} grows {' and '.join(again)} in the middle {here} more): train stage "
                f"{masks.stage!r} until it is open first, or give it fewer growth.mask_steps"
            )
        if masks.left > steps:
            raise RequestError(
                f"stage {stage.name!r} begins in the middle {here} more), but has no more than {steps} steps with "
                f"those after it: train stage {masks.stage!r} on first"
            )


def check_masks_reach_norms(stage: StageConfig, masked: Collection[str]) -> None:
    """Masks on the hidden size reach into norms, which Transformer Engine's linear layers hide."""
    if stage.transformer_engine and "hidden" in masked:
        raise RequestError(
            f"stage {stage.name!r}: transformer_engine fuses norms into linear layers, where growth masks on the "
            "hidden size cannot reach: set growth.hidden to zero, or transformer_engine to false"
        )


def check_source_stage(run: RunConfig, stage_index: int, source_stage: str | None) -> None:
    """A stage must grow from the stage before it; a source that records no stage is accepted."""
    if stage_index < 1:
        raise RequestError(f"stage {run.stages[0].name!r} is the first: only later stages grow or shrink")
    before = run.stages[stage_index - 1].name
    if source_stage is not None and source_stage != before:
        verb = "shrinks" if run.stages[stage_index].shrink is not None else "grows"
        raise RequestError(
            f"stage {run.stages[stage_index].name!r} {verb} from stage {before!r}, but the checkpoint is of stage "
            f"{source_stage!r}: give a checkpoint of {before!r}, or another --stage"
        )


def check_epsilons(run: RunConfig) -> None:
    """norm_epsilon is configured once: growing the hidden size with `zero` derives the later ones from it."""
    first = run.stages[0]
    for stage in run.stages[1:]:
        if stage.model.norm_epsilon != first.model.norm_epsilon:
            raise RequestError(
                f"stage {stage.name!r}: model.norm_epsilon is {stage.model.norm_epsilon!r}, stage {first.name!r} has "
                f"{first.model.norm_epsilon!r}: growth derives the value of later stages, so give the first one's"
            )
