"""Growth through the engine: certificates, layer distances, and training on from the grown checkpoint."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from flm_megatron.checkpoint.logical import Region
from flm_megatron.config.schema import ModelConfig, MupConfig, ParallelConfig, StageConfig
from flm_megatron.config.schema.stage import Precision
from flm_megatron.distributed.local_processes import run_processes
from flm_megatron.errors import DamagedError, FlmError
from flm_megatron.growth.certificate.certificate import certify, check_certificate
from flm_megatron.growth.grown.checkpoint import GrownCheckpoint
from flm_megatron.growth.plan import GrowthPlan, make_plan
from flm_megatron.growth.record import Certificate, Comparison
from tests.support.growth_cases import MemoryCheckpoint, growth, trained, weights
from tests.support.growth_oracle import attention, feed_forward, norm, open_masks
from tests.support.pool import Pool
from tests.support.reference_model import reference_logits

OLD = ModelConfig(
    num_layers=2,
    hidden_size=48,
    ffn_hidden_size=80,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=12,
    vocab_size=300,
    qkv_bias=True,
    query_key_norm=True,
    output_mult=4.0,
    mup=MupConfig(enabled=True, base_hidden_size=32),
)
NEW = replace(OLD, num_layers=4, hidden_size=72, ffn_hidden_size=200, num_attention_heads=12, num_query_groups=4)
TOKENS = torch.randint(0, 300, (6, 81), generator=torch.Generator().manual_seed(3))
OPERATORS = ("zero", "mask", "clone")
LAYOUTS = {
    "one": ParallelConfig(),
    "tensor_sequence": ParallelConfig(tensor=2, sequence=True),
    "pipeline_uneven": ParallelConfig(pipeline=2, pipeline_layers=[3, 1]),
    "both": ParallelConfig(tensor=2, pipeline=2, sequence=True),
    "wider_than_the_old_model": ParallelConfig(tensor=4),
}


def plan_of(operator: str) -> GrowthPlan:
    """Everything grows at once, with `zero` rejuvenated by a factor that bf16 multiplies by exactly.

    Clones have noise; they need a hidden size that is a multiple of the old one.
    """
    if operator == "clone":
        return make_plan(OLD, replace(NEW, hidden_size=96), growth("clone", clone_noise=0.4), seed=11, stage="big")
    if operator == "shrink":
        return make_plan(OLD, NEW, growth("mask", shrink=0.4), seed=11, stage="big")
    rejuvenate = 0.5 if operator == "zero" else None
    return make_plan(OLD, NEW, growth(operator, rejuvenate=rejuvenate), seed=11, stage="big")


def certificates(parallel: ParallelConfig, precision: Precision = "fp32") -> list[Certificate]:
    """Certificates of growth of random weights by each of OPERATORS, as this rank has them."""
    from flm_megatron.distributed.world import layout
    from flm_megatron.engine.prepare import prepare

    prepare()
    source = trained(OLD, torch.bfloat16 if precision == "bf16" else torch.float32, optimizer=True)
    stage = StageConfig(name="big", model=NEW, parallel=parallel, precision=precision)
    found = []
    for operator in OPERATORS:
        plan = plan_of(operator)
        checkpoint = GrownCheckpoint(source, plan)
        found.append(certify(source, checkpoint, plan, stage, TOKENS, partial(layout, timeout_s=120)))
    return found


@pytest.mark.parametrize("name", LAYOUTS)
def test_growth_preserves_in_fp32(pool: Pool, name: str) -> None:
    ranks = pool.run(LAYOUTS[name].model_size, certificates, LAYOUTS[name])
    assert all(rank == ranks[0] for rank in ranks)
    for certificate in ranks[0]:
        assert (certificate.stage, certificate.samples, certificate.sequence_length) == ("big", 6, 80)
        (measured,) = certificate.comparisons
        assert 0 < measured.rms_difference <= 5e-6 * measured.logit_std
        assert measured.max_difference <= 1e-4 * measured.logit_std
        assert measured.loss_change <= 1e-6
        assert measured.loss_before == pytest.approx(reference_loss(), rel=1e-5)


def certificate_of(old: ModelConfig, new: ModelConfig, parallel: ParallelConfig) -> Certificate:
    """The certificate of a growth by `zero`."""
    from flm_megatron.distributed.world import layout
    from flm_megatron.engine.prepare import prepare

    prepare()
    plan, source = make_plan(old, new, growth("zero"), seed=11, stage="big"), trained(old, torch.float32)
    stage = StageConfig(name="big", model=new, parallel=parallel)
    return certify(source, GrownCheckpoint(source, plan), plan, stage, TOKENS, partial(layout, timeout_s=120))


NEOX: dict[str, Any] = {
    **{"normalization": "layernorm", "activation": "gelu", "bias": True, "qkv_bias": False, "query_key_norm": False},
    **{"parallel_residual": True, "rotary_percent": 0.5},
}
OTHERS = {
    "out of no layers": (replace(OLD, num_layers=0), NEW, "tensor_sequence"),
    "neox": (replace(OLD, **NEOX), replace(NEW, **NEOX), "both"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_models_grow_by_zero(pool: Pool, case: str) -> None:
    old, new, name = OTHERS[case]
    parallel = LAYOUTS[name]
    (measured,) = pool.run(parallel.model_size, certificate_of, old, new, parallel)[0].comparisons
    logits = reference_logits(old, trained(old).values, TOKENS[:, :-1])
    expected = F.cross_entropy(logits.flatten(0, 1), TOKENS[:, 1:].flatten()).item()
    assert measured.loss_before == pytest.approx(expected, rel=1e-5) and measured.loss_change <= 1e-6
    assert measured.max_difference <= 1e-4 * measured.logit_std


class Counted(MemoryCheckpoint):
    """A checkpoint that counts what is read of it; the first time takes 7 s."""

    reads = 0

    def read(self, name: str, region: Region | None = None) -> torch.Tensor:
        """As any checkpoint."""
        if not self.reads:
            time.sleep(7)
        self.reads += 1
        return super().read(name, region)


def certify_slowly(folder: str) -> int:
    """Certificate, distances and reads of this rank, where reading takes longer than a collective may."""
    from flm_megatron.distributed.world import Layouts
    from flm_megatron.growth.distance import layer_distances

    source = Counted(trained(OLD, torch.float32, optimizer=True).values)
    stage = StageConfig(name="big", model=NEW, parallel=ParallelConfig())
    plan = plan_of("zero")
    with Layouts(timeout_s=5) as under:
        certificate = certify(source, GrownCheckpoint(source, plan), plan, stage, TOKENS, under)
        found = layer_distances(source, OLD, stage, TOKENS[:, :-1], under)
    distances = [(layer.cosine, layer.l2) for layer in found]
    result = {"certificate": certificate.to_json(), "distances": distances, "reads": source.reads}
    (Path(folder) / str(torch.distributed.get_rank())).write_text(json.dumps(result))
    return 0


def test_one_replica_reads_and_the_others_wait_as_long_as_it_takes(pool: Pool, tmp_path: Path) -> None:
    run_processes(2, certify_slowly, (str(tmp_path),), timeout_s=5)
    first, second = (json.loads((tmp_path / str(rank)).read_text()) for rank in range(2))
    assert first.pop("reads") > 0 == second.pop("reads")
    assert first == second
    alone = pool.run(1, certificates, ParallelConfig())[0][0]
    assert Certificate.from_json(first["certificate"]) == alone


def unreadable() -> str:
    """The error of this rank where rank 1's share of the source is damaged."""
    from flm_megatron.distributed.world import Layouts
    from flm_megatron.engine.prepare import prepare

    prepare()
    source = trained(OLD, torch.float32, optimizer=True)
    if torch.distributed.get_rank() == 1:

        def damaged(name: str, region: Region | None = None) -> torch.Tensor:
            raise DamagedError("a flipped bit")

        source.read = damaged  # type: ignore[method-assign]
    stage = StageConfig(name="big", model=NEW, parallel=ParallelConfig(tensor=2))
    with pytest.raises(DamagedError) as caught:
        certify(source, GrownCheckpoint(source, plan_of("zero")), plan_of("zero"), stage, TOKENS, Layouts(60))
    return str(caught.value)


def test_damage_that_one_rank_reads_is_heard_on_all(pool: Pool) -> None:
    messages = pool.run(4, unreadable)
    assert messages == ["rank 1: a flipped bit", "a flipped bit", "rank 1: a flipped bit", "rank 1: a flipped bit"]


def reference_loss() -> float:
    """Loss of the old model in float64."""
    from tests.support.reference_model import reference_logits

    tensors = {n: t.double() for n, t in weights(trained(OLD, torch.float32, optimizer=True), OLD).items()}
    return F.cross_entropy(reference_logits(OLD, tensors, TOKENS[:, :-1]).transpose(1, 2), TOKENS[:, 1:]).item()


def bf16_between_layouts() -> torch.Tensor:
    """Logits of the ungrown model in bf16 on this world, gathered [samples, sequence, vocabulary]."""
    from flm_megatron.distributed.world import layout
    from flm_megatron.engine.prepare import prepare
    from flm_megatron.growth.certificate.certificate import _evaluate

    prepare()
    world = torch.distributed.get_world_size()
    stage = StageConfig(parallel=ParallelConfig(tensor=world, sequence=world > 1), precision="bf16")
    source = trained(OLD, torch.bfloat16, optimizer=True)
    found = _evaluate(source, OLD, stage, TOKENS, partial(layout, timeout_s=120))
    return found[1] if found else torch.zeros(0)


def test_growth_in_bf16_changes_no_more_than_a_layout(pool: Pool) -> None:
    one, two = pool.run(1, bf16_between_layouts)[0], pool.run(2, bf16_between_layouts)[0]
    between = (one - two).square().mean().sqrt().item()
    for certificate in pool.run(2, certificates, LAYOUTS["tensor_sequence"], "bf16")[0]:
        exact, measured = certificate.comparisons
        assert (exact.precision, measured.precision) == ("fp32", "bf16")
        assert exact.rms_difference <= 5e-6 * exact.logit_std
        assert 0 < measured.rms_difference <= 2 * between
        assert measured.loss_change <= 1e-3


def test_a_certificate_is_checked() -> None:
    measured = Comparison("bf16", 0.1, 0.01, 1.0, 3.0, 3.006)
    certificate = Certificate("big", True, 4, 16, (replace(measured, precision="fp32"), measured))
    assert Certificate.from_json(certificate.to_json()) == certificate
    with pytest.raises(FlmError, match=r"from 3.000000 to 3.006000, by 2.0e-03 .* bf16 is 1.0e-03.*--stages.1.growth"):
        check_certificate(certificate, growth("zero"), 1)
    check_certificate(certificate, growth("zero", loss_tolerance=2.1e-3), 1)
    check_certificate(replace(certificate, preserving=False), growth("zero"), 1)
    assert "2.00e-03" in certificate.table()
    with pytest.raises(FlmError, match="nan"):
        check_certificate(
            replace(certificate, comparisons=(replace(measured, loss_after=float("nan")),)), growth("zero"), 1
        )


def measured_distances(parallel: ParallelConfig) -> list[tuple[float, float]]:
    """(cosine, l2) of each layer on this rank."""
    from flm_megatron.distributed.world import layout
    from flm_megatron.engine.prepare import prepare
    from flm_megatron.growth.distance import layer_distances

    prepare()
    stage = StageConfig(parallel=parallel)
    model = replace(NEW, num_layers=4)
    found = layer_distances(trained(model, torch.float32), model, stage, TOKENS[:, :-1], partial(layout, timeout_s=120))
    return [(layer.cosine, layer.l2) for layer in found]


def reference_distances() -> list[tuple[float, float]]:
    """The same in float64, layer by layer."""
    model = replace(NEW, num_layers=4)
    tensors = {n: t.double() for n, t in weights(trained(model, torch.float32), model).items()}
    masks, out = open_masks(model), []
    x = tensors["embedding.word_embeddings.weight"][TOKENS[:, :-1]] * model.input_mult
    for i in range(model.num_layers):
        layer = {n.removeprefix("decoder.layers."): t[i] for n, t in tensors.items() if n.startswith("decoder.layers.")}
        y = x + attention(model, layer, norm(model, layer, "self_attention.linear_qkv.layer_norm_", x, masks), masks)
        y = y + feed_forward(model, layer, norm(model, layer, "mlp.linear_fc1.layer_norm_", y, masks), masks)
        cosine = 1 - (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))
        out.append((cosine.mean().item(), ((y - x).norm(dim=-1) / x.norm(dim=-1)).mean().item()))
        x = y
    return out


@pytest.mark.parametrize(
    "name",
    [*(pytest.param(name, marks=pytest.mark.slow) for name in ("tensor_sequence", "pipeline_uneven")), "both"],
)
def test_layer_distances_under_layouts(pool: Pool, name: str) -> None:
    for rank in pool.run(LAYOUTS[name].model_size, measured_distances, LAYOUTS[name]):
        for found, expected in zip(rank, reference_distances(), strict=True):
            assert found == pytest.approx(expected, rel=1e-4)
