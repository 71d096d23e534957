"""Which layers are copied, what may grow into what, and plans as plain data."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from flm_megatron.checkpoint.manifest import Manifest, StagePosition
from flm_megatron.checkpoint.stage_manifest import manifest_model
from flm_megatron.config.schema import (
    ChatConfig,
    DataConfig,
    GrowthConfig,
    MupConfig,
    RopeScaling,
    RunConfig,
    StageConfig,
)
from flm_megatron.data.tokenizer import train_tokenizer
from flm_megatron.errors import Mistakes, RequestError
from flm_megatron.growth.boundary import (
    check_boundary,
    check_masks_open,
    check_same_tokenizer,
    grown_checkpoint,
    needs_distances,
    resumed_plan,
    saved_mask_value,
    saved_plan,
    source_model,
)
from flm_megatron.growth.change import check_same_plan
from flm_megatron.growth.foreseen import check_run_file
from flm_megatron.growth.layers import select_layers
from flm_megatron.growth.plan import GrowthPlan, make_plan
from flm_megatron.growth.rules import check_epsilons, check_mask_length, check_source_stage
from flm_megatron.growth.schedule import lr_multipliers, mask_plan, mask_value
from flm_megatron.model.mask_plan import MaskPlan
from tests.support.checkpoint_cases import edited
from tests.support.growth_cases import GROWN, MemoryCheckpoint, growth, old_model, plan_for, trained
from tests.support.prose import prose


def sources(old: int, new: int, selection: str, **changes: Any) -> list[str]:
    """Sources of the new layers, copies marked with a prime."""
    distances = changes.pop("distances", None)
    found = select_layers(old, new, growth("zero", **{"layer_selection": selection, **changes}), distances)
    return [f"{s.source}{'c' * s.copy}" for s in found]


def test_layer_selection() -> None:
    assert sources(4, 6, "interleave") == ["0", "1", "1c", "2", "3", "3c"]
    assert sources(3, 8, "interleave") == ["0", "0c", "1", "1c", "1c", "2", "2c", "2c"]
    assert sources(4, 6, "top") == ["0", "1", "2", "2c", "3", "3c"]
    assert sources(3, 7, "stack") == ["0", "1", "2", "0c", "1c", "2c", "0c"]
    assert sources(4, 6, "list", copied_layers=[2, 2]) == ["0", "1", "2", "2c", "2c", "3"]
    assert sources(4, 6, "distance", distances=[0.3, 0.1, 0.2, 0.1]) == ["0", "1", "1c", "2", "3", "3c"]
    assert sources(2, 5, "distance", distances=[0.3, 0.1]) == ["0", "0c", "1", "1c", "1c"]
    assert sources(3, 3, "distance") == ["0", "1", "2"]
    assert sources(1, 4, "distance") == sources(1, 4, "middle") == ["0", "0c", "0c", "0c"]
    assert sources(4, 6, "middle") == ["0", "1", "2", "1c", "2c", "3"]
    assert sources(4, 7, "middle") == ["0", "1", "2", "0c", "1c", "2c", "3"]
    assert sources(3, 8, "middle") == sources(3, 8, "stack") == ["0", "1", "2", "0c", "1c", "2c", "0c", "1c"]
    assert sources(3, 3, "middle") == ["0", "1", "2"]
    assert sources(0, 2, "list") == ["Nonec", "Nonec"]
    assert sources(4, 6, "middle", layers="random") == ["0", "1", "2", "Nonec", "Nonec", "3"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_selection": "distance"}, "no layer distances were measured"),
        ({"layer_selection": "list", "copied_layers": [0]}, "names 1 layers, but .* needs 2"),
        ({"layer_selection": "list"}, "names 0 layers"),
        ({"layer_selection": "list", "copied_layers": [0, 3]}, "names layer 3, but .* 0 to 2"),
    ],
)
def test_wrong_layer_selection(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        plan_for("layers", "zero", old_model(), changes)


def test_distances_of_another_model() -> None:
    with pytest.raises(RequestError, match="2 layer distances were given for 3 layers"):
        select_layers(3, 4, growth("zero", layer_selection="distance"), [0.1, 0.2])


def test_zero_channels_of_a_tied_head_need_layers_that_read_them() -> None:
    bare = old_model(num_layers=0, tie_embeddings=True)
    with pytest.raises(RequestError, match=r"growth\.hidden is `zero` with model\.tie_embeddings and num_layers 0"):
        make_plan(bare, replace(bare, hidden_size=36), growth("zero"), seed=1)
    make_plan(bare, replace(bare, hidden_size=36, num_layers=1), growth("zero"), seed=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 20}, "hidden_size shrinks from 24 to 20"),
        ({"num_layers": 2}, "num_layers shrinks from 3 to 2"),
        ({"ffn_hidden_size": 49}, "ffn_hidden_size shrinks from 50 to 49"),
        ({"num_query_groups": 1}, "query_groups shrinks from 2 to 1"),
        ({"head_dim": 8}, "head dim changes from 6 to 8"),
        ({"num_attention_heads": 7, "num_query_groups": 3}, "7 query heads do not divide into 3 query groups"),
        ({"num_attention_heads": 4, "num_query_groups": 4}, "heads per group fall from 2 to 1 .* at least 8 heads"),
        ({"vocab_size": 38}, "vocab_size is 37 .* 38"),
        ({"activation": "gelu"}, "model.activation is 'swiglu'"),
        ({"normalization": "layernorm"}, "model.normalization is 'rmsnorm'"),
        ({"bias": True}, "model.bias is False"),
        ({"qkv_bias": True}, "model.qkv_bias is False"),
        ({"query_key_norm": True}, "model.query_key_norm is False"),
        ({"parallel_residual": True}, "model.parallel_residual is False"),
        ({"rotary_percent": 0.7}, "model.rotary_percent is 1.0"),
        ({"rope_theta": 5e5}, "model.rope_theta is 10000.0"),
        ({"sliding_window": 8}, "model.sliding_window is None"),
        ({"tie_embeddings": True}, "model.tie_embeddings is False"),
        ({"max_positions": 8}, "model.max_positions is None"),
        ({"rope_scaling": RopeScaling()}, "model.rope_scaling is None"),
        ({"mup": MupConfig()}, "model.mup.enabled is True"),
    ],
)
def test_what_cannot_grow(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        make_plan(old_model(), old_model(**changes), growth("zero"), seed=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": "clone"}, "hidden_size 33 is not a multiple of 24: give 24 or 48"),
        ({"clone_noise": 0.1}, r"clone_noise is 0\.1, but nothing is cloned"),
    ],
)
def test_clones_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        plan_for("all", "zero", old_model(), changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ffn": "zero"}, "takes the place of growth.ffn `zero`"),
        ({"heads": "clone"}, "takes the place of growth.heads `clone`"),
        ({"loss_tolerance": 0.1}, "growth.loss_tolerance 0.1 cannot be certified"),
        ({"new_scale": "trained"}, "growth.new_scale cannot be `trained`"),
        ({"optimizer_state": "grow", "optimizer_step": "birth"}, "growth.optimizer_step cannot be `birth`"),
        ({"optimizer_state": "reset_all", "optimizer_step": "birth"}, "`birth` has nothing to tell apart"),
    ],
)
def test_what_shrink_and_grown_moments_contradict(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        plan_for("all", "mask", old_model(), {"shrink": None if "optimizer_state" in changes else 0.4, **changes})


CLONES_AND_COPIES = {"hidden": "clone", "ffn": "clone", "heads": "clone", "layers": "copy"}


@pytest.mark.parametrize(
    ("old", "new", "changes", "message"),
    [
        ({}, {"ffn_hidden_size": 87}, {"hidden": "clone", "clone_noise": 0.1}, "but nothing is cloned"),
        ({}, {"hidden_size": 48, "num_layers": 5}, {**CLONES_AND_COPIES, "new_scale": "trained"}, "no random entries"),
        ({"num_layers": 0}, {"num_layers": 3}, {"layers": "random", "new_scale": "trained"}, "no random entries"),
        ({}, {}, {"rejuvenate": 0.5, "new_lr_mult": 2}, "new_lr_mult is 2.0, but nothing is added to the model"),
        ({}, {"num_layers": 5}, {"lr_mult": 2, "mask_steps": 0}, "mask_steps, which is 0: give growth.lr_mult_steps"),
        (
            {"num_layers": 0},
            {"num_layers": 2},
            {"layer_selection": "list", "copied_layers": [1, 0]},
            "names layer 1, but the old model has no layers",
        ),
    ],
)
def test_what_would_do_nothing(old: dict[str, Any], new: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    before = old_model(**old)
    with pytest.raises(RequestError, match=message):
        make_plan(before, replace(before, **new), growth("zero", **changes), seed=5)


def test_equal_constants_that_were_read_twice_are_the_same() -> None:
    old, new = (replace(model, **json.loads('{"rope_theta": 54321.5}')) for model in (old_model(), old_model()))
    assert old.rope_theta is not new.rope_theta
    assert make_plan(old, new, growth("zero"), seed=1).new.rope_theta == 54321.5


def test_plan_round_trip_and_resume() -> None:
    plan = plan_for("all", "mask", old_model(), {"hidden": "zero", "optimizer_step": "birth"})
    again = GrowthPlan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan
    assert again.masked == ("ffn", "heads", "layers")
    check_same_plan(plan, again)
    with pytest.raises(RequestError, match="seed = 5, and the run file now gives 6"):
        check_same_plan(plan, replace(plan, seed=6))
    saved = plan.to_json()
    added = ("rejuvenate", "shrink", "optimizer_state", "new_scale", "trained")
    written_before = GrowthPlan.from_json({name: saved[name] for name in saved if name not in added})
    with pytest.raises(RequestError, match=r"grown with rejuvenate = 1\.0, and the run file now gives 0\.5"):
        check_same_plan(written_before, replace(plan, rejuvenate=0.5))
    with pytest.raises(RequestError, match=r"new\.ffn_hidden_size = 110, and the run file now gives 111"):
        check_same_plan(plan, replace(plan, new=replace(plan.new, ffn_hidden_size=111)))


def test_the_grown_model_keeps_vocabulary_and_derives_epsilon() -> None:
    old = old_model()
    new = old_model(hidden_size=36, vocab_size=None, norm_epsilon=0.5)
    assert make_plan(old, new, growth("zero"), 1).new.norm_epsilon == pytest.approx(1e-2 * 24 / 36, rel=1e-15)
    assert make_plan(old, new, growth("mask"), 1).new.norm_epsilon == 1e-2
    assert make_plan(old, new, growth("mask"), 1).new.vocab_size == 37
    assert make_plan(old, new, growth("zero", rejuvenate=0.5), 1).new.norm_epsilon == 1e-2 * 24 / 36 / 4


def test_the_epsilon_of_query_and_key_norms_stays() -> None:
    old = old_model(query_key_norm=True)
    new = replace(old, hidden_size=36)
    grown = make_plan(old, new, growth("zero", rejuvenate=0.5), 1).new
    assert (grown.norm_epsilon, grown.query_key_epsilon) == (1e-2 * 24 / 36 / 4, 1e-2)
    assert make_plan(grown, replace(new, hidden_size=40), growth("zero"), 1).new.query_key_epsilon == 1e-2
    with pytest.raises(
        RequestError, match=r"is 0\.01 in the stage before and 0\.002 in .*query_key_norm_epsilon to 0\.01"
    ):
        make_plan(grown, replace(new, query_key_norm_epsilon=2e-3), growth("zero"), 1)


def run_of(*stages: StageConfig) -> RunConfig:
    """A run of these stages."""
    return RunConfig(data=DataConfig(sequence_length=16), stages=list(stages))


def test_rules_about_stages() -> None:
    first = StageConfig(name="a")
    second = StageConfig(name="b", tokens=16 * 8 * 10)
    run = run_of(first, second)
    with pytest.raises(RequestError, match=r"mask_steps is 11, but the stage has 10 steps \(1280 tokens\)"):
        check_mask_length([second], 11, 16)
    with pytest.raises(RequestError, match="mask_steps is 0: give at least 1"):
        check_mask_length([second], 0, 16)
    check_mask_length([second], 10, 16)
    check_source_stage(run, 1, "a")
    with pytest.raises(RequestError, match="grows from stage 'a', but the checkpoint is of stage 'c'"):
        check_source_stage(run, 1, "c")
    with pytest.raises(RequestError, match="is the first"):
        check_source_stage(run, 0, "a")
    check_epsilons(run)
    second.model.norm_epsilon = 1e-6
    with pytest.raises(RequestError, match="norm_epsilon is 1e-06, stage 'a' has 1e-05"):
        check_epsilons(run)


def small_run(**growth_changes: Any) -> RunConfig:
    """Two stages that grow in every dimension."""
    big = replace(old_model(), **GROWN["all"], vocab_size=None)
    stages = [
        StageConfig(name="small", model=old_model()),
        StageConfig(name="big", model=big, tokens=16 * 8 * 10, growth=growth("mask", **growth_changes)),
    ]
    return run_of(*stages)


def test_boundary_carries_the_position_on() -> None:
    source = trained(old_model(), optimizer=True)
    source.manifest = edited(source.manifest, tokens=640, samples=40, optimizer_step=12)
    checkpoint, plan = grown_checkpoint(source, small_run(), 1)
    assert plan.stage == "big" and plan.new.vocab_size == 37
    manifest = checkpoint.manifest
    assert manifest.position == StagePosition(0, 40, 640, 12, "big")
    anew = grown_checkpoint(source, small_run(optimizer_state="reset_all"), 1)[0]
    assert anew.manifest.position == StagePosition(0, 40, 640, 0, "big")
    assert saved_plan(manifest) == plan
    model = manifest_model(manifest)
    assert model is not None and model.num_layers == 5
    assert not needs_distances(small_run(), 1)
    assert needs_distances(small_run(layer_selection="distance"), 1)
    with pytest.raises(RequestError, match="no layer distances were measured"):
        grown_checkpoint(source, small_run(layer_selection="distance"), 1)


def test_boundary_takes_the_trained_epsilon() -> None:
    source = trained(old_model())
    run = {"stages": [{"name": "small", "model": asdict(old_model(norm_epsilon=3e-3))}]}
    source.manifest = edited(source.manifest, run=run)
    assert grown_checkpoint(source, small_run(hidden="zero"), 1)[1].new.norm_epsilon == pytest.approx(3e-3 * 24 / 33)


@pytest.mark.parametrize(("asked", "tokens", "steps"), [(None, 1280, 2), (None, 16 * 8 * 3, 1), (7, 1280, 7)])
def test_masks_open_over_a_fifth_of_the_stage_unless_told(asked: int | None, tokens: int, steps: int) -> None:
    run = small_run(mask_steps=asked)
    run.stages[1].tokens = tokens
    assert grown_checkpoint(trained(old_model()), run, 1)[1].mask_steps == steps


def test_a_stage_made_longer_keeps_the_masks_that_it_began_with() -> None:
    run = small_run(mask_steps=None)
    checkpoint, plan = grown_checkpoint(trained(old_model()), run, 1)
    run.stages[1].tokens *= 3
    assert resumed_plan(run, 1, checkpoint.manifest) == plan
    stored = {"plan": {name: value for name, value in plan.to_json().items() if name != "masked_paths"}}
    resumed = resumed_plan(run, 1, edited(checkpoint.manifest, growth=stored))
    assert plan.masked_paths == "once" and resumed is not None and resumed.masked_paths == "each"
    asked = small_run(mask_steps=3)
    with pytest.raises(RequestError, match="was grown with mask_steps = 2, and the run file now gives 3"):
        resumed_plan(asked, 1, checkpoint.manifest)


def test_a_resumed_stage_copies_the_layers_that_it_began_with() -> None:
    """Chosen by distance they are those of the boundary; another way to choose them is another growth."""
    run = small_run(layer_selection="distance")
    checkpoint, plan = grown_checkpoint(trained(old_model()), run, 1, distances=[0.1, 0.3, 0.2])
    assert [layer.source for layer in plan.layer_sources] == [0, 0, 1, 2, 2]
    assert resumed_plan(run, 1, checkpoint.manifest) == plan
    checkpoint, _ = grown_checkpoint(trained(old_model()), small_run(), 1)
    with pytest.raises(RequestError, match="'big' was grown with layer_sources = "):
        resumed_plan(small_run(layer_selection="stack"), 1, checkpoint.manifest)


def deeper_and_deeper(*layers: int) -> RunConfig:
    """Stages a, b, c, ... of so many layers, each grown out of the one before by measured distances."""
    grows = growth("mask", layer_selection="distance")
    stages = [
        StageConfig(name, tokens=16 * 8 * 10, model=old_model(num_layers=count), growth=grows if index else None)
        for index, (name, count) in enumerate(zip("abcd", layers, strict=False))
    ]
    return run_of(*stages)


def test_a_stage_grows_out_of_the_one_before_it() -> None:
    run = deeper_and_deeper(2, 3, 4, 4)
    assert [needs_distances(run, stage) for stage in (1, 2, 3)] == [True, True, False]
    nothing_said = MemoryCheckpoint({})
    assert [source_model(nothing_said, run, stage).num_layers for stage in (1, 2, 3)] == [2, 3, 4]
    for stage, before in ((1, "a"), (2, "b"), (3, "c")):
        check_source_stage(run, stage, before)
    run.stages[2].model.vocab_size = None
    with pytest.raises(RequestError, match=r"stage 'c': model\.vocab_size is not known"):
        source_model(nothing_said, run, 3)


def test_every_growth_of_a_run_file_is_looked_at_before_anything_starts() -> None:
    check_run_file(deeper_and_deeper(2, 3, 4, 4))
    with pytest.raises(Mistakes) as caught:
        check_run_file(deeper_and_deeper(4, 3, 5, 2))
    assert [line.split(":")[0] for line in caught.value.lines] == [
        "num_layers shrinks from 4 to 3",
        "num_layers shrinks from 5 to 2",
    ]
    check_boundary(deeper_and_deeper(2, 3), 0)  # the first stage grows out of nothing


def test_a_fine_tuning_has_no_tokens_and_at_first_no_model() -> None:
    run = run_of(StageConfig("a", model=old_model()))
    with pytest.raises(Mistakes, match="tokens is 0"):
        check_run_file(run)
    run.data.chat = ChatConfig()
    check_run_file(run)
    run.stages[0].model.num_attention_heads = 3
    with pytest.raises(Mistakes, match="3 is not a multiple of num_query_groups 2"):
        check_run_file(run)
    run.stages[0].model.vocab_size = None  # what is there is a placeholder
    check_run_file(run)


def test_all_dimensions_grow_by_masks_unless_told() -> None:
    run = small_run()
    run.stages[1].growth = None
    distances = [0.0] * run.stages[0].model.num_layers
    assert grown_checkpoint(trained(old_model()), run, 1, distances)[1].masked == ("hidden", "ffn", "heads", "layers")


def test_masks_are_a_function_of_the_step() -> None:
    linear, cosine = (
        plan_for("all", "mask", old_model(), {"mask_steps": 4, "mask_shape": shape}) for shape in ("linear", "cosine")
    )
    assert [mask_value(linear, s) for s in range(6)] == [0, 0.25, 0.5, 0.75, 1, 1]
    assert [mask_value(cosine, s) for s in range(6)] == pytest.approx([0, 0.1464466, 0.5, 0.8535534, 1, 1])
    saved = GrowthPlan.from_json(json.loads(json.dumps(linear.to_json())))
    assert mask_value(saved, 1) == 0.25 and mask_value(linear, -1) == 0


def test_factors_on_learning_rates_are_a_function_of_the_step() -> None:
    plan = plan_for("all", "mask", old_model(), {"mask_steps": 4})
    growth = GrowthConfig(lr_mult=3.0, new_lr_mult=0.5)
    found = [lr_multipliers(growth, plan, step) for step in range(6)]
    assert found == [(3.0, 0.5), (2.5, 0.625), (2.0, 0.75), (1.5, 0.875), (1.0, 1.0), (1.0, 1.0)]
    longer = replace(growth, lr_mult_steps=8)
    assert [lr_multipliers(longer, plan, step)[0] for step in (0, 4, 8)] == [3.0, 2.0, 1.0]
    assert lr_multipliers(growth, replace(plan, mask_steps=0), 0) == lr_multipliers(GrowthConfig(), plan, 0) == (1, 1)


def test_the_model_is_told_what_is_old_in_it() -> None:
    """Old channels and units, old query groups with the old queries of each, and the layers that are copies."""
    plan = plan_for("all", "mask", old_model())
    assert [source.copy for source in plan.layer_sources] == [False, False, True, False, True]
    assert mask_plan(plan) == MaskPlan(hidden=24, ffn=50, heads=(2, 2), layers=(2, 4))
    assert mask_plan(plan_for("all", "zero", old_model())) == MaskPlan(None, None, None, ())
    multi_head = plan_for("heads_per_group", "mask", old_model(num_query_groups=1))
    assert mask_plan(multi_head) == MaskPlan(None, None, (1, 4), ())


def test_masks_on_the_hidden_size_are_refused_with_transformer_engine() -> None:
    run = small_run()
    run.stages[1].transformer_engine = True
    with pytest.raises(RequestError, match=r"'big': transformer_engine fuses norms .* set growth.hidden to zero"):
        check_boundary(run, 1)
    run = small_run(hidden="zero")
    run.stages[1].transformer_engine = True
    check_boundary(run, 1)


@pytest.mark.parametrize(
    ("case", "masked"),
    [
        ("hidden", ("hidden",)),
        ("ffn", ("ffn",)),
        ("groups", ("heads",)),
        ("heads_per_group", ("heads",)),
        ("layers", ("layers",)),
        ("all", ("hidden", "ffn", "heads", "layers")),
    ],
)
def test_only_what_grows_is_masked(case: str, masked: tuple[str, ...]) -> None:
    assert plan_for(case, "mask", old_model()).masked == masked
    assert plan_for(case, "zero", old_model()).masked == ()


def test_growing_in_the_middle_of_a_mask() -> None:
    checkpoint, _ = grown_checkpoint(trained(old_model()), small_run(), 1)
    assert saved_mask_value(edited(checkpoint.manifest, step=3)) == 0.75
    check_masks_open(edited(checkpoint.manifest, step=4))
    with pytest.raises(RequestError, match=r"'big' is at step 3, .* \(v = 0.750, open at step 4\)"):
        check_masks_open(edited(checkpoint.manifest, step=3))


def test_boundary_refuses_before_reading() -> None:
    run = small_run()
    assert run.stages[1].growth is not None
    run.stages[1].growth.mask_steps = 11
    with pytest.raises(RequestError, match="mask_steps is 11"):
        check_boundary(run, 1)


def test_growth_keeps_the_tokenizer(tmp_path: Path) -> None:
    text = "".join(prose(4))
    own = train_tokenizer([text], tmp_path / "own", 400)
    same_size = train_tokenizer([text[::-1]], tmp_path / "same_size", 400)
    larger = train_tokenizer([text], tmp_path / "larger", 420)
    model = old_model(vocab_size=own.vocab_size)
    run = small_run()
    for recorded in ({"tokenizer_sha256": own.fingerprint}, {"run": {"tokenizer": own.path}}, {}):
        run.tokenizer = own.path
        check_same_tokenizer(Manifest.from_json(recorded), run, model)
        run.tokenizer = larger.path
        with pytest.raises(RequestError, match=r"larger has 420 ids, .* has 400: .*; growth keeps the tokenizer"):
            check_same_tokenizer(Manifest.from_json(recorded), run, model)
        run.tokenizer = same_size.path
        if recorded:
            with pytest.raises(RequestError, match=r"is not the one that .*; growth keeps the tokenizer"):
                check_same_tokenizer(Manifest.from_json(recorded), run, model)
    run.tokenizer = str(tmp_path / "nowhere")
    check_same_tokenizer(Manifest(tokenizer_sha256=own.fingerprint), run, model)
