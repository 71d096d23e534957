"""Other programs' training steps of the same model on one process: the same tokens, AdamW and gradient clipping.

Each holds fp32 weights, or what it trains bf16 with: `transformers` and torchtitan compute in bf16 under autocast
from fp32 weights, megatron-core keeps bf16 weights and fp32 masters as this program does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F

from flm_megatron.benchmarking.steps import Step, draw_weights
from flm_megatron.checkpoint.hugging_face.families.llama import llama_shape
from flm_megatron.config.schema import ModelConfig, StageConfig
from flm_megatron.device import current
from flm_megatron.errors import RequestError
from flm_megatron.training.step import Batch

Logits = Callable[[torch.Tensor], torch.Tensor]

BARE = "bare-megatron"
PEERS = {
    "transformers": "transformers",
    "transformers-compiled": "transformers",
    BARE: "megatron",
    "torchtitan": "torchtitan",
}
"""The packages that programs need, by the programs' names."""


def check_peers(names: Sequence[str], stage: StageConfig) -> None:
    """Whether these programs can run the stage.

    Raises:
        RequestError: an unknown or repeated name, a layout of several processes, a block or a recomputation that
            peers do not have.
    """
    for name in names:
        if name not in PEERS:
            raise RequestError(f"--compare {name}: not a known program; known are {', '.join(PEERS)}")
        if names.count(name) > 1:
            raise RequestError(f"--compare names {name} twice: name each program once")
    model, parallel = stage.model, stage.parallel
    if parallel.processes > 1:
        raise RequestError(
            f"--compare runs on one process, the stage's layout is tensor {parallel.tensor} x pipeline "
            f"{parallel.pipeline} x data {parallel.data or 1}: override its parallel sizes with 1"
        )
    biased, scaled = model.bias or model.qkv_bias, model.rope_scaling is not None
    more = biased or scaled or model.query_key_norm
    if model.normalization != "rmsnorm" or model.activation != "swiglu" or model.position != "rope" or more:
        raise RequestError(
            "--compare needs the Llama block (rmsnorm, swiglu, no bias, no query_key_norm, rope without rope_scaling), "
            "as peers have it"
        )
    for name in ("sliding_window", "tie_embeddings", "parallel_residual", "rotary_percent"):
        if getattr(model, name) != getattr(ModelConfig(), name):
            raise RequestError(f"--compare: peers have no {name}; leave model.{name} out")
    if stage.recompute == "selective":
        raise RequestError("--compare: peers have no selective recomputation; set recompute to none or full")


def missing_peers(names: Sequence[str]) -> list[str]:
    """The programs whose package is not installed."""
    return [name for name in names if find_spec(PEERS[name]) is None]


def transformers_step(stage: StageConfig, sequence_length: int, compiled: bool = False) -> Step:
    """`transformers` Llama with scaled dot-product attention, as it is or through `torch.compile`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device(current().torch_device):
        model = LlamaForCausalLM(LlamaConfig(**llama_fields(stage.model, sequence_length)))
    if stage.recompute == "full":
        model.gradient_checkpointing_enable()
    call = torch.compile(model) if compiled else model
    return plain_step(model.train(), lambda tokens: call(tokens).logits, stage)


def llama_fields(model: ModelConfig, sequence_length: int) -> dict[str, Any]:
    """Fields of `transformers`' LlamaConfig for a model's shape."""
    return {
        **llama_shape(model),
        "vocab_size": model.vocab_size,
        "rms_norm_eps": model.norm_epsilon,
        "rope_theta": model.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "max_position_embeddings": sequence_length,
        "attn_implementation": "sdpa",
        "tie_word_embeddings": False,
        "use_cache": False,
    }


def plain_step(model: torch.nn.Module, logits: Logits, stage: StageConfig) -> Step:
    """A training step in plain PyTorch over fp32 weights of `model`; `logits` maps tokens [batch, sequence] to
    logits [batch, sequence, vocabulary]. In bf16 both compute under autocast."""
    draw_weights(model)
    device = current().torch_device
    options = stage.optimizer
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=options.lr,
        betas=options.betas,
        eps=options.eps,
        weight_decay=options.weight_decay,
        fused=True,
    )

    def mean_loss(batch: Batch) -> torch.Tensor:
        """Mean cross entropy of a micro-batch, in fp32."""
        tokens, labels = (batch[name].to(device, non_blocking=True) for name in ("tokens", "labels"))
        with torch.autocast(device.type, torch.bfloat16, enabled=stage.precision == "bf16"):
            values = logits(tokens)
        return F.cross_entropy(values.flatten(0, 1).float(), labels.flatten())

    def step(batches: list[Batch]) -> float:
        """Forward and backward over all micro-batches, clipping, update."""
        optimizer.zero_grad()
        total = torch.zeros((), device=device)
        for batch in batches:
            loss = mean_loss(batch) / len(batches)
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip_grad or float("inf"))
        optimizer.step()
        return total.item()

    return step
