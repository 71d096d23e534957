"""A new kind of parameter is a row of the table: sharding, growth, planning and the optimizer follow by themselves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from flm_megatron.checkpoint.hugging_face.families.llama import LLAMA
from flm_megatron.checkpoint.hugging_face.names import bands_of
from flm_megatron.checkpoint.lazy.initial import InitialCheckpoint
from flm_megatron.checkpoint.manifest import Manifest, StagePosition
from flm_megatron.checkpoint.megatron_legacy.reader import local_tensors
from flm_megatron.checkpoint.sharding.layout import rank_regions
from flm_megatron.config.schema import ModelConfig, ParallelConfig
from flm_megatron.errors import RequestError
from flm_megatron.growth.grown.checkpoint import GrownCheckpoint
from flm_megatron.growth.grown.folding import folded
from flm_megatron.growth.plan import make_plan
from flm_megatron.model import parameters
from flm_megatron.model.parameters import Axis, Band, Cut, ParameterSpec, Unit, parameter_count, parameter_specs
from flm_megatron.optim.groups import DECAYED, learning_rate_scales, parameter_group
from flm_megatron.planner.cost.memory import rank_memory
from flm_megatron.planner.layout import Workload
from tests.support.growth_cases import growth, old_model, trained

LAYER = "decoder.layers."
QUERY_NORM = f"{LAYER}self_attention.linear_q.layer_norm_weight"
UP = f"{LAYER}mlp.expert.linear_up.weight"
DOWN = f"{LAYER}mlp.expert.linear_down.weight"
NAMES = (QUERY_NORM, UP, DOWN)
KNOWN_ROWS = parameters._rows
MODEL = old_model(ffn_hidden_size=48)
GROWN = replace(
    MODEL, num_layers=5, hidden_size=36, ffn_hidden_size=64, num_attention_heads=9, num_query_groups=3, head_dim=6
)


def made_up(model: ModelConfig) -> Iterator[ParameterSpec]:
    """A norm [layers, head_dim] that may be a module of its own, and two matrices that tensor parallelism cuts."""
    layers = Axis(Unit.LAYER, (Band(model.num_layers),))
    head = Axis(Unit.HEAD_DIM, (Band(model.kv_channels),))
    hidden = Axis(Unit.HIDDEN, (Band(model.hidden_size),))
    ffn = Axis(Unit.FFN, (Band(model.ffn_hidden_size),), cut=Cut.BANDS)
    scale = 1 / model.width_factor
    own = f"{LAYER}self_attention.q_layernorm.weight"
    up = (layers, replace(ffn, side="out"), replace(hidden, side="in"))
    down = (layers, replace(hidden, side="out"), replace(ffn, side="in"))
    yield ParameterSpec(QUERY_NORM, (layers, head), "norm", 0.0, 1.0, module_name=own)
    yield ParameterSpec(UP, up, "matrix", 0.1, lr_scale=scale)
    yield ParameterSpec(DOWN, down, "matrix", 0.1, lr_scale=scale)


@pytest.fixture(autouse=True)
def rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table with the made-up rows."""

    def longer(model: ModelConfig, vocab: int) -> Iterator[ParameterSpec]:
        yield from KNOWN_ROWS(model, vocab)
        yield from made_up(model)

    monkeypatch.setattr(parameters, "_rows", longer)


def test_ranks_hold_their_parts() -> None:
    """3 layers over 2 pipeline ranks, 48 units over 2 tensor ranks; the norm is on both."""
    parallel = ParallelConfig(tensor=2, pipeline=2)
    held = [rank_regions(MODEL, parallel, 1, pipeline_rank) for pipeline_rank in (0, 1)]
    assert [(r.offsets, r.sizes) for rank in held for r in rank[QUERY_NORM]] == [((0, 0), (2, 6)), ((2, 0), (1, 6))]
    assert [(r.offsets, r.sizes) for r in held[0][UP]] == [((0, 24, 0), (2, 24, 24))]
    assert [(r.offsets, r.sizes) for r in held[1][DOWN]] == [((2, 0, 24), (1, 24, 24))]


def test_a_cut_that_does_not_fit_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    odd = Axis(Unit.HEAD_DIM, (Band(7),), cut=Cut.BANDS)
    row = ParameterSpec("decoder.odd.weight", (odd,), "norm", 0.0)
    monkeypatch.setattr(parameters, "_rows", lambda model, vocab: iter([*KNOWN_ROWS(model, vocab), row]))
    with pytest.raises(RequestError, match=r"decoder\.odd\.weight: its 7 channels of a head cannot be split over ten"):
        rank_regions(MODEL, ParallelConfig(tensor=2), 0, 0)


def test_files_of_megatron_hold_it_under_either_name() -> None:
    tensors = local_tensors(MODEL, ParallelConfig(tensor=2), 1, 0)
    norm = tensors[QUERY_NORM.replace(LAYER, f"{LAYER}2.")]
    assert norm.shape == (6,) and f"{LAYER}2.self_attention.q_layernorm.weight" in norm.names
    assert tensors[UP.replace(LAYER, f"{LAYER}2.")].shape == (24, 24)


def test_planner_counts_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three layers of a norm of 6 and, on each of two tensor ranks, half of 2 x 48 x 24; 2 + 4 + 12 bytes each."""
    work = Workload(MODEL, 32, 4, 1, ParallelConfig(tensor=2, pipeline=1), data=1)
    count, memory = parameter_count(MODEL), rank_memory(work, 0)
    monkeypatch.setattr(parameters, "_rows", KNOWN_ROWS)
    before = rank_memory(replace(work), 0)
    added = 3 * (6 + 48 * 24)
    assert memory.weights - before.weights == 2 * added
    assert memory.gradients - before.gradients == 4 * added
    assert memory.optimizer - before.optimizer == 12 * added
    assert count - parameter_count(MODEL) == 3 * (6 + 2 * 48 * 24)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_growth_keeps_what_it_was(dtype: torch.dtype) -> None:
    """New units write nothing, copied layers write nothing, and everything old is where it was."""
    source = trained(MODEL, dtype)
    plan = make_plan(MODEL, GROWN, growth("zero"), seed=5, stage="big")
    grown = GrownCheckpoint(source, plan)
    origins = [(new, layer.source) for new, layer in enumerate(plan.layer_sources) if not layer.copy]
    copies = [(new, layer.source) for new, layer in enumerate(plan.layer_sources) if layer.copy]
    norm, up, down = (grown.read(name) for name in NAMES)
    assert len(copies) == 2 and norm.shape == (5, 6) and up.shape == (5, 64, 36) and down.shape == (5, 36, 64)
    for new, old in [*origins, *copies]:
        assert torch.equal(norm[new], source.read(QUERY_NORM)[old])
        assert torch.equal(up[new, :48, :24], source.read(UP)[old])
    for new, old in origins:
        assert torch.equal(down[new, :24, :48], source.read(DOWN)[old])
    assert not down[:, 24:].any() and not down[:, :, 48:].any()
    assert not down[[new for new, _ in copies]].any()
    assert up[:, 48:].float().std() == pytest.approx(0.1, rel=0.1)


def test_half_open_masks_fold_into_it() -> None:
    plan = make_plan(MODEL, replace(MODEL, ffn_hidden_size=64), growth("mask"), seed=5, stage="big")
    grown = GrownCheckpoint(trained(MODEL, torch.float32), plan, Manifest(position=StagePosition(1, stage="big")))
    closed, opened = grown.read(DOWN), folded(grown, fold=True).read(DOWN)
    assert torch.equal(opened[..., :48], closed[..., :48]) and torch.equal(opened[..., 48:], closed[..., 48:] / 4)
    assert torch.equal(folded(grown, fold=True).read(UP), grown.read(UP))


def test_the_optimizer_groups_it_by_its_kind() -> None:
    specs = parameter_specs(MODEL)
    for name in (QUERY_NORM, f"{LAYER}self_attention.q_layernorm.weight"):
        assert parameter_group("module." + name.replace(LAYER, f"{LAYER}11."), specs) == "vector"
    group = parameter_group("module.module." + UP.replace(LAYER, f"{LAYER}0."), specs)
    assert group == "matrix" and group in DECAYED
    assert learning_rate_scales(specs)[group] == 16 / 24


def test_it_starts_as_its_row_says() -> None:
    fresh = InitialCheckpoint(MODEL, 3)
    assert fresh.read(QUERY_NORM).eq(1).all()
    assert fresh.read(UP).std() == pytest.approx(0.1, rel=0.05)


def test_a_program_that_lacks_it_is_not_given_it() -> None:
    with pytest.raises(RequestError, match=r"linear_q\.layer_norm_weight has no Hugging Face form"):
        bands_of(MODEL, LLAMA)
