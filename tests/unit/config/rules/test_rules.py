"""Every rule of the run file refuses what breaks it, in one line with the values, and accepts what just fits."""

from __future__ import annotations

from pathlib import Path

import pytest

from flm_megatron.config.loader import load_run
from flm_megatron.config.rules import RUN_RULES, SHAPE_RULES, check, violations
from flm_megatron.config.rules.layout import LAYOUT_RULES
from flm_megatron.config.rules.model import MODEL_RULES
from flm_megatron.config.rules.schedule import SCHEDULE_RULES
from flm_megatron.config.schema import RunConfig
from flm_megatron.errors import Mistakes, RequestError

RUN = """
data: {sequence_length: 16, train: [{path: a}, {path: b}], validation: [{path: v}]}
defaults:
  model: {num_layers: 8, hidden_size: 64, ffn_hidden_size: 96, num_attention_heads: 4}
  micro_batch: 2
  global_batch: 16
  tokens: 10240
stages: [{name: one}, {name: two}]
"""
FP8 = "stages.0.precision=bf16 stages.0.fp8=tensorwise"
# Overrides, processes (none: not known), and words of the line that refuses them.
SIZES: list[tuple[str, int | None, str]] = [
    ("data.sequence_length=0", None, "data.sequence_length is 0, give at least 1"),
    ("stages.0.model.num_layers=-1", None, "stages.0.model.num_layers is -1, give at least 0"),
    ("stages.1.model.max_positions=0", None, "stages.1.model.max_positions is 0, give at least 1"),
    ("stages.1.model.sliding_window=0", None, "stages.1.model.sliding_window is 0, give at least 1"),
    ("stages.1.model.head_dim=-2", None, "stages.1.model.head_dim is -2, give at least 1"),
    ("stages.0.parallel.tensor=0", None, "stages.0.parallel.tensor is 0, give at least 1"),
    ("stages.0.micro_batch=0", None, "stages.0.micro_batch is 0, give at least 1"),
    ("stages.0.model.mup.base_hidden_size=0", None, "model.mup.base_hidden_size is 0, give at least 1"),
    ("stages.0.model.lora={rank: 0}", None, "stages.0.model.lora.rank is 0, give at least 1"),
    ("defaults.model.num_layers=1000000000000", None, "num_layers is 1000000000000, give at most 100000"),
    ("defaults.model.vocab_size=1000000000000000", None, "vocab_size is 1000000000000000, give at most 16777216"),
    ("data.sequence_length=1000000000000", None, "data.sequence_length is 1000000000000, give at most 134217728"),
    ("stages.0.parallel.pipeline=1048577", None, "parallel.pipeline is 1048577, give at most 1048576"),
    ("stages.0.micro_batch=10000000000", None, "micro_batch is 10000000000, give at most 1000000000"),
]
REFUSED: list[tuple[str, int | None, str]] = [
    ("stages=[]", None, "stages is empty: give at least one stage"),
    ("stages.0.name=a/b", None, "stages.0.name 'a/b' is not fit for a folder"),
    ("stages.0.name='7'", None, "stages.0.name '7' is not fit for a folder"),
    ("stages.0.name=a.b", None, "stages.0.name 'a.b' is not fit for a folder"),
    ("stages.0.name=Two", None, "stages 'Two', 'two' share a name"),
    ("stages.0.growth={}", None, "stages.0.growth is given, but stage 'one' is the first"),
    ("stages.0.model.num_layers=0 stages.0.model.lora={rank: 2}", None, "num_layers is 0, so model.lora has nothing"),
    ("stages.1.model.num_layers=9", None, "stage 'two' has model.num_layers 9 after 8, but no growth"),
    ("data.train.0.weight=2", None, "data.train: weight is given to 1 of 2 sources, but not to 'b'"),
    ("data.train.0.weight=2 data.train.1.weight=0", None, "data.train: weight is 0.0 for 'b', give above 0"),
    ("data.train.1.epochs=2", None, "data.train: epochs is given to 1 of 2 sources, but not to 'a'"),
    ("data.train=[{path: a, weight: 1, epochs: 1}]", None, "data.train: weight and epochs are both given"),
    ("stages.0.validation.samples=4 data.validation=[]", None, "validation.samples is 4, but data.validation is empty"),
    ("data.validation=[{path: x/v}, {path: y/v}]", None, "data.validation has two sources named 'v'"),
    (f"stages.0.name={'a' * 101}", None, "use at most 100 letters"),
    ("logging.trackers=[wandb,wandb]", None, "logging.trackers names 'wandb' twice: give it once"),
    ("logging.trackers=[{name: mlflow, uri: 'https://me:pw@host'}]", None, "trackers.0.uri holds a user, password or"),
    ("logging.trackers=[{name: mlflow, exit_wait_s: 0}]", None, "trackers.0.exit_wait_s is 0, give at least 1"),
    ("logging.opentelemetry={endpoint: 'http://h/?token=s'}", None, "give it by OTEL_EXPORTER_OTLP_HEADERS"),
    ("logging.opentelemetry={endpoint: 'h:4318'}", None, "endpoint 'h:4318' is no URL of a collector"),
    ("output_url_interval_s=0", None, "output_url_interval_s is 0: give seconds from 0.1"),
    ("logging.opentelemetry={step_interval: 0}", None, "opentelemetry.step_interval is 0, give at least 1"),
    ("logging.prometheus={port: 65536}", None, "logging.prometheus.port is 65536, give at most 65535"),
    ("seed=9223372036854775808", None, "seed is 9223372036854775808, give at most 9223372036854775807"),
    ("distributed.timeout_s=1000000000", None, "distributed.timeout_s is 1000000000, give at most 10000000"),
    ("stages.1.growth.clone_noise=-0.1", None, "stages.1.growth.clone_noise is -0.1, give 0 or more"),
    ("stages.1.growth.rejuvenate=1.5", None, "stages.1.growth.rejuvenate is 1.5, give a factor above 0 and at most 1"),
    ("stages.1.growth.shrink=0", None, "stages.1.growth.shrink is 0.0, give a factor above 0 and at most 1"),
    ("stages.1.growth.distance_samples=0", None, "stages.1.growth.distance_samples is 0, give at least 1"),
    ("stages.1.growth.lr_mult=0", None, "stages.1.growth.lr_mult is 0.0, give a number above 0"),
    ("stages.1.growth.new_lr_mult=-1", None, "stages.1.growth.new_lr_mult is -1.0, give a number above 0"),
    ("stages.1.growth.lr_mult_steps=0", None, "stages.1.growth.lr_mult_steps is 0, give at least 1"),
    ("stages.1.growth.certify_samples=-1", None, "stages.1.growth.certify_samples is -1, give at least 0"),
    ("stages.1.growth.loss_tolerance=-1", None, "stages.1.growth.loss_tolerance is -1.0, give 0 or more"),
    ("stages.0.shrink={}", None, "stages.0.shrink is given, but stage 'one' is the first"),
    ("stages.1.model.num_layers=7", None, "num_layers 7 after 8, but no shrink: add `shrink: {}`"),
    (
        "stages.1.model={num_layers: 7, ffn_hidden_size: 128}",
        None,
        "stage 'two' shrinks num_layers from 8 to 7 and grows ffn_hidden_size from 96 to 128: use two stages",
    ),
    ("stages.1.growth={} stages.1.shrink={}", None, "stages.1.growth and stages.1.shrink are both given"),
    ("stages.1.shrink.samples=0", None, "stages.1.shrink.samples is 0, give at least 1"),
    ("stages.1.shrink.loss_tolerance=-1", None, "stages.1.shrink.loss_tolerance is -1.0, give 0 or more"),
    (
        "stages.1.model={num_query_groups: 2, num_attention_heads: 2, head_dim: 16} stages.1.shrink={} "
        "stages.1.parallel.tensor=4",
        None,
        "num_query_groups 2 do not divide",
    ),
    ("data.chat.epochs=1000000", None, "data.chat.epochs is 1000000, give at most 1000"),
    ("data.chat.epochs=1 stages.1.growth.lr_mult=2", None, "stages.1.growth is given, but the stages of a fine-tuning"),
    ("data.chat.mix=[{stage: one, source: a, passes: -1}]", None, "data.chat.mix.0.passes is -1.0, give 0 to 1000"),
    ("data.train.0.epochs=1e9", None, "data.train.0.epochs is 1000000000.0, give at most 10000"),
    ("data.train.0.name=''", None, "data.train.0.name is '', give a name"),
    ("checkpoint.keep_last=0", None, "checkpoint.keep_last is 0, give at least 1"),
    ("checkpoint.memory.interval_steps=0", None, "checkpoint.memory.interval_steps is 0, give at least 1"),
    ("checkpoint.memory.budget_gib=0", None, "checkpoint.memory.budget_gib is 0, give a number above 0"),
    ("stages.1.validation.samples=-1", None, "stages.1.validation.samples is -1, give at least 0"),
    ("distributed.processes=0", None, "distributed.processes is 0, give at least 1"),
    ("stages.0.model.norm_epsilon=0", None, "stage 'one': model.norm_epsilon is 0.0, give a number above 0"),
    ("stages.0.model.head_init_std=0", None, "model.head_init_std is 0.0, give a number above 0"),
    ("stages.0.model.output_mult=-1", None, "model.output_mult is -1.0, give a number above 0"),
    ("defaults.model.num_attention_heads=3", None, "hidden_size 64 is not a multiple of num_attention_heads 3"),
    ("stages.0.model={bias: true, qkv_bias: true}", None, "model.bias and model.qkv_bias are both true: bias has"),
    (
        "stages.0.model.query_key_norm_epsilon=1e-6",
        None,
        "query_key_norm_epsilon is 1e-06, but query_key_norm is false",
    ),
    ("defaults.model={query_key_norm: true, query_key_norm_epsilon: 0}", None, "query_key_norm_epsilon is 0.0, give a"),
    ("stages.0.model.num_query_groups=3", None, "num_attention_heads 4 is not a multiple of num_query_groups 3"),
    (
        "defaults.model.tie_embeddings=true defaults.model.head_init_std=0.1",
        None,
        "model.head_init_std is 0.1, but with tie_embeddings the head is the embedding",
    ),
    ("stages.0.model.max_positions=64", None, "max_positions is 64, but model.position is rope: leave it out"),
    ("defaults.model.position=learned", None, "model.position is learned, but max_positions is not given"),
    (
        "defaults.model={position: learned, max_positions: 15}",
        None,
        "stages.0.model.max_positions is 15, below data.sequence_length 16: learned positions go no further",
    ),
    ("defaults.model.head_dim=7", None, "model.head_dim is 7 (hidden_size 64, num_attention_heads 4)"),
    ("stages.0.model.rotary_percent=1.5", None, "rotary_percent is 1.5, give a share up to 1 that is an even number"),
    ("stages.0.model.rotary_percent=0.2", None, "an even number of a head's 16 channels"),
    ("stages.0.model={position: xpos, rotary_percent: 0.5}", None, "rotary_percent is 0.5, but model.position is xpos"),
    ("stages.0.model={rotary_percent: 0.5, rope_scaling: {kind: yarn}}", None, "0.5, but model.rope_scaling is yarn"),
    ("stages.0.model.rope_scaling={factor: 0.5}", None, "rope_scaling.factor is 0.5, give a number from 1"),
    ("stages.0.model.rope_scaling={original_length: 0}", None, "rope_scaling.original_length is 0, give at least 1"),
    ("stages.0.model.rope_scaling={low_freq_factor: 4}", None, "low_freq_factor is 4.0 and high_freq_factor 4.0: give"),
    ("stages.0.model.rope_scaling={attention_factor: 0}", None, "attention_factor is 0.0, give a number above 0"),
    ("stages.0.model={position: xpos, rope_scaling: {}}", None, "rope_scaling is given, but model.position is xpos"),
    ("stages.0.model={rope_theta: 1, rope_scaling: {kind: yarn}}", None, "is yarn, and model.rope_theta 1.0: give"),
    ("stages.0.parallel.context=2", None, "parallel.context is 2: context parallelism is not offered"),
    ("stages.0.parallel.expert=2", None, "parallel.expert is 2: expert parallelism is not offered"),
    ("stages.0.parallel.tensor=8", None, "model.num_attention_heads 4 and num_query_groups 4 do not divide"),
    ("defaults.model.num_query_groups=2 stages.0.parallel.tensor=4", None, "num_query_groups 2 does not divide by"),
    ("stages.0.model.ffn_hidden_size=98 stages.0.parallel.tensor=4", None, "ffn_hidden_size 98 does not divide by"),
    ("stages.0.parallel.sequence=true", None, "parallel.sequence is true with parallel.tensor 1"),
    (
        "stages.0.parallel={tensor: 2, sequence: true} data.sequence_length=17",
        None,
        "data.sequence_length 17 does not divide by parallel.tensor 2, as parallel.sequence needs",
    ),
    ("stages.0.parallel.pipeline=9", None, "parallel: 8 layers cannot be split into 9 model chunks"),
    ("stages.0.parallel.virtual_pipeline=2", None, "parallel: virtual_pipeline 2 needs a pipeline of at least 2"),
    ("stages.0.parallel={pipeline: 2, pipeline_layers: [8]}", None, "pipeline_layers [8] has 1 numbers"),
    ("stages.0.parallel={pipeline: 2, pipeline_layers: [4, 5]}", None, "pipeline_layers [4, 5] adds up to 9"),
    ("stages.0.parallel={pipeline: 2, pipeline_layers: [0, 8]}", None, "leaves a model chunk without a layer"),
    (
        "stages.0.parallel={tensor: 2, pipeline: 2}",
        6,
        "6 processes do not divide by parallel.tensor 2 x pipeline 2 = 4",
    ),
    ("stages.0.parallel={tensor: 2, data: 3}", 8, "8 processes are not parallel.tensor 2 x pipeline 1 x data 3 = 6"),
    ("stages.0.global_batch=15", None, "global_batch 15 does not divide by micro_batch 2 x data-parallel size 1 = 2"),
    ("stages.0.tokens=5000", 3, "global_batch 16 does not divide by micro_batch 2 x data-parallel size 3 = 6"),
    ("stages.0.parallel.data=3", None, "global_batch 16 does not divide by micro_batch 2 x data-parallel size 3 = 6"),
    (
        "stages.0.parallel={pipeline: 4, virtual_pipeline: 2} stages.0.global_batch=12",
        4,
        "makes 6 micro-batches on each of 1 data-parallel ranks, not a multiple of pipeline 4",
    ),
    (
        "stages.0.parallel={overlap_param_gather: true, overlap_grad_reduce: true, distributed_optimizer: false}",
        None,
        "parallel.overlap_param_gather needs parallel.distributed_optimizer",
    ),
    ("stages.0.parallel.overlap_param_gather=true", None, "overlap_param_gather needs parallel.overlap_grad_reduce"),
    ("stages.0.fp8=rowwise", None, "fp8 is rowwise with precision fp32: set precision to bf16"),
    (f"{FP8} stages.0.transformer_engine=true", None, "fp8 is tensorwise with transformer_engine"),
    (f"{FP8} data.sequence_length=20", None, "micro_batch 2 x data.sequence_length 40 is not a multiple of 16"),
    (f"{FP8} stages.0.model.ffn_hidden_size=100", None, "but model.ffn_hidden_size 100 is not a multiple of 16"),
    (
        f"{FP8} stages.0.model.ffn_hidden_size=80 stages.0.parallel.tensor=2",
        None,
        "model.ffn_hidden_size 80 / parallel.tensor 2 is not a multiple of 16",
    ),
    (
        f"{FP8} stages.0.model.head_dim=2",
        None,
        "queries, keys and values 24 and the width of all heads 8 are not multiples of 16",
    ),
    (
        "kernels.head_and_loss=fused stages.1.stability.z_loss=1e-4",
        None,
        "kernels.head_and_loss is fused, but stages.1.stability.z_loss is 0.0001",
    ),
    (
        "kernels.head_and_loss=fused stages.1.distill.teacher=one",
        None,
        "kernels.head_and_loss is fused, but stages.1.distill needs all logits",
    ),
    ("evaluation.interval_steps=4", None, "evaluation.interval_steps is 4, but nothing is named to evaluate"),
    ("evaluation.batch=0", None, "evaluation.batch is 0"),
    ("evaluation.texts=[{path: a/x}, {path: b/x}]", None, "evaluation.texts has a text named 'x' twice"),
    (
        "evaluation.prompts=[x] stages.0.parallel={pipeline: 2, virtual_pipeline: 2}",
        None,
        "evaluation.prompts cannot be completed under stages.0.parallel.virtual_pipeline 2",
    ),
    ("stages.1.distill={teacher: x, temperature: 0}", None, "stages.1.distill.temperature is 0.0, give a number from"),
    ("stages.1.distill={teacher: x, weight: 1.5}", None, "stages.1.distill.weight is 1.5, give a share above 0"),
    ("stages.1.distill.teacher=''", None, "stages.1.distill.teacher is empty: name a checkpoint"),
    ("stages.0.distill.teacher=two", None, "stages.0.distill.teacher is stage 'two', which is not trained before"),
    (
        "stages.0.distill={teacher: x, parallel: {tensor: 3}}",
        4,
        "4 processes do not divide by distill.parallel.tensor 3",
    ),
    (
        "stages.0.distill={teacher: x, parallel: {data: 3}}",
        4,
        "4 processes are not distill.parallel.tensor 1 x pipeline",
    ),
    ("stages.0.distill={teacher: x, parallel: {sequence: true}}", None, "distill.parallel.sequence is true, but"),
    (
        "stages.0.distill={teacher: x, parallel: {virtual_pipeline: 2}}",
        None,
        "distill.parallel.virtual_pipeline is 2, which a teacher cannot have",
    ),
    ("stages.0.distill={teacher: x, parallel: {tensor: 0}}", None, "distill.parallel.tensor is 0, give at least 1"),
    ("stages.0.tokens=0", None, "tokens is 0, give the stage a budget"),
    ("stages.0.optimizer.lr=0", None, "optimizer.lr is 0.0, give a number above 0"),
    ("stages.0.optimizer.min_lr=1", None, "optimizer.min_lr 1.0 does not lie between 0 and lr 0.0003"),
    ("stages.0.optimizer.matrix_lr=0", None, "optimizer.matrix_lr is 0.0"),
    ("stages.0.optimizer.betas=[0.9, 1]", None, "optimizer.betas [0.9, 1.0] do not lie in [0, 1)"),
    ("stages.0.optimizer.eps=0", None, "optimizer.eps is 0.0"),
    ("stages.0.optimizer.eps_relative=0", None, "optimizer.eps_relative is 0.0, give a number above 0"),
    (f"stages.0.tokens={10**40}", None, "tokens is 100000000000... (41 digits), give at most"),
    ("stages.0.schedule.decay_tokens=0", None, "schedule.decay_tokens is 0, give at least 1"),
    ("stages.0.optimizer.weight_decay=-1", None, "optimizer.weight_decay is -1.0, give 0 or more"),
    ("stages.0.schedule.warmup_tokens=-1", None, "schedule.warmup_tokens is -1, give at least 0"),
    ("stages.0.schedule.decay_tokens=0", None, "schedule.decay_tokens is 0, give at least 1"),
    ("stages.0.schedule.wsd_decay_fraction=0", None, "schedule.wsd_decay_fraction is 0.0"),
    ("stages.0.schedule.power_exponent=0.5", None, "schedule.power_exponent is 0.5, give a number below 0"),
    ("stages.0.schedule={warmup_tokens: 5, warmup_samples: 1}", None, "warmup_tokens 5 and warmup_samples 1 are both"),
    ("stages.0.schedule.warmup_samples=641", None, "warm-up of 10256 tokens is longer than the stage's 10240"),
    (
        "stages.0.schedule={warmup_tokens: 300, decay_tokens: 299}",
        None,
        "the warm-up of 300 tokens is longer than decay_tokens 299",
    ),
    ("stages.1.schedule={boundary: rewarm, warmup_tokens: 10241}", None, "stage 'two': schedule: the warm-up of 10241"),
    ("stages.0.schedule.kind=power", None, "schedule.power_start_tokens is 0 with a warm-up of 0 tokens"),
    (
        "stages.0.schedule={kind: power, warmup_tokens: 9, power_start_tokens: 8}",
        None,
        "schedule.power_start_tokens is 8 with a warm-up of 9 tokens",
    ),
    (
        "stages.1.schedule={kind: wsd, boundary: continue}",
        None,
        "schedule.kind is wsd, but boundary 'continue' goes on with the schedule of stage 'one'",
    ),
]
ACCEPTED: list[tuple[str, int | None]] = [
    ("name=x", None),
    ("stages.0.name=tele-flm_52b", None),
    ("stages.1.model.num_layers=9 stages.1.growth={}", None),
    ("stages.1.model.num_layers=7 stages.1.shrink={}", None),
    ("data.train=[{path: a, weight: 1}, {path: b, weight: 0.5}]", None),
    ("data.train=[{path: a, epochs: 1}, {path: b, epochs: 0.5}]", None),
    ("data.validation=[{path: x/v}, {path: y/v, name: w}] stages.0.validation.samples=3", None),
    ("defaults.model.num_attention_heads=3 defaults.model.head_dim=22", None),
    ("defaults.model.num_query_groups=2 defaults.parallel={tensor: 2, sequence: true}", 2),
    ("stages.0.parallel={pipeline: 8}", 8),
    (f"{FP8} stages.0.parallel={{tensor: 2, sequence: true}} stages.0.micro_batch=1", 2),
    ("stages.0.parallel={pipeline: 3}", 3),
    ("stages.0.parallel={pipeline: 2, pipeline_layers: [3, 5]}", 2),
    ("stages.0.parallel={pipeline: 2, virtual_pipeline: 2, pipeline_layers: [1, 2, 2, 3]}", 4),
    ("stages.0.parallel={tensor: 2, pipeline: 2, data: 2}", 8),
    ("stages.0.parallel={overlap_param_gather: true, overlap_grad_reduce: true}", 8),
    ("stages.0.optimizer={lr: 0.1, min_lr: 0.1, betas: [0, 0], clip_grad: 0}", None),
    ("stages.0.schedule={warmup_tokens: 10240}", None),
    ("stages.1.distill={teacher: one, weight: 1, parallel: {tensor: 2, pipeline: 2}}", 4),
    ("stages.1.schedule={boundary: continue, warmup_tokens: 99999}", None),
    ("stages.0.schedule={kind: power, warmup_tokens: 9, power_start_tokens: 9}", None),
    ("defaults.schedule={kind: wsd, boundary: continue, wsd_decay_fraction: 1}", None),
    ("stages.0.schedule.kind=linear stages.1.schedule={kind: linear, boundary: rewarm}", None),
]


def _run(folder: Path, overrides: str) -> RunConfig:
    path = folder / "run.yaml"
    path.write_text(RUN)
    return load_run(path, [f"--{part}" for part in _split(overrides)])


def _split(overrides: str) -> list[str]:
    """Overrides are parted by spaces outside of brackets."""
    parts, depth = [""], 0
    for character in overrides:
        depth += (character in "[{") - (character in "]}")
        if character == " " and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return parts


@pytest.mark.parametrize(
    ("overrides", "world_size", "words"), SIZES + REFUSED, ids=[case[2] for case in SIZES + REFUSED]
)
def test_refused(tmp_path: Path, overrides: str, world_size: int | None, words: str) -> None:
    lines = [line for line in violations(_run(tmp_path, overrides), world_size) if words in line]
    assert lines and not any("\n" in line for line in lines)


@pytest.mark.parametrize(("overrides", "world_size"), ACCEPTED, ids=[case[0] for case in ACCEPTED])
def test_accepted(tmp_path: Path, overrides: str, world_size: int | None) -> None:
    stages = None if world_size is None else ["one"]
    assert violations(_run(tmp_path, overrides), world_size, stages) == []
    check(_run(tmp_path, overrides), world_size, stages)


def test_every_rule_has_a_case_that_it_refuses(tmp_path: Path) -> None:
    silent = {*RUN_RULES, *SHAPE_RULES, *MODEL_RULES, *LAYOUT_RULES, *SCHEDULE_RULES}
    for overrides, world_size, _ in REFUSED:
        run = _run(tmp_path, overrides)
        silent -= {rule for rule in (*RUN_RULES, *SHAPE_RULES) if rule(run)}
        for index, stage in enumerate(run.stages):
            silent -= {rule for rule in MODEL_RULES if rule(stage.model)}
            silent -= {rule for rule in LAYOUT_RULES if rule(stage, run.data.sequence_length, world_size)}
            silent -= {rule for rule in SCHEDULE_RULES if rule(run, index)}
    assert not silent


def test_all_mistakes_are_listed(tmp_path: Path) -> None:
    run = _run(
        tmp_path,
        "stages.0.parallel.context=2 stages.1.tokens=0 data.train.0.weight=2 stages.1.optimizer.eps=0 "
        "stages.1.optimizer.betas=[1,1]",
    )
    with pytest.raises(Mistakes) as refused:
        check(run)
    assert str(refused.value).splitlines() == [
        "the run file has 5 mistakes",
        "  data.train: weight is given to 1 of 2 sources, but not to 'b'",
        "  stage 'one': parallel.context is 2: context parallelism is not offered, set it to 1",
        "  stage 'two': tokens is 0, give the stage a budget",
        "  stage 'two': optimizer.betas [1.0, 1.0] do not lie in [0, 1)",
        "  stage 'two': optimizer.eps is 0.0, give a number above 0",
    ]


def test_a_size_that_is_no_count_hides_nothing_that_does_not_compute_with_it(tmp_path: Path) -> None:
    run = _run(tmp_path, "data.sequence_length=0 stages.0.model.num_layers=-1 checkpoint.keep_last=0 stages.1.tokens=0")
    assert violations(run) == [
        "data.sequence_length is 0, give at least 1",
        "stages.0.model.num_layers is -1, give at least 0",
        "checkpoint.keep_last is 0, give at least 1",
        "stage 'two': tokens is 0, give the stage a budget",
    ]


def test_only_the_named_stages_are_checked(tmp_path: Path) -> None:
    run = _run(tmp_path, "stages.1.parallel.tensor=4")
    check(run, 2, stages=["one"])
    with pytest.raises(RequestError, match="stage 'two': 2 processes do not divide by"):
        check(run, 2, stages=["two"])
