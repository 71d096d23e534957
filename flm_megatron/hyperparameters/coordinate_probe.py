"""Sizes of module outputs before training, and of what weight updates add to them afterwards."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from flm_megatron.device import current
from flm_megatron.engine.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from flm_megatron.model.norms import LayerNorm, RMSNorm
from flm_megatron.model.parameters.names import layer_number
from flm_megatron.model.teleflm import TeleFLM

EMBEDDING = "embedding"


class Probe:
    """Measures the embedding (times its multiplier) and every linear module of `model` on the same tokens.

    `activations` holds the mean absolute output of each module at the start; `updates` the mean absolute value of
    (W_end - W_start) x, with x the module's input at the end: what the weight update itself adds to the output,
    whatever has happened upstream. Of norms, whose input is of size 1, it is that of the change of the weight.
    """

    def __init__(self, model: TeleFLM) -> None:
        self.model = model
        linear = (ColumnParallelLinear, RowParallelLinear)
        self.modules = {_label(name): m for name, m in model.named_modules() if isinstance(m, linear)}
        self.norms = {_label(name): m for name, m in model.named_modules() if isinstance(m, (RMSNorm, LayerNorm))}
        rows = ((name, model.specs.get(f"{name}.weight")) for name, _ in model.named_modules())
        self._padded = {_label(name) for name, spec in rows if spec is not None and spec.padded}
        self.activations: dict[str, float] = {}
        self.updates: dict[str, float] = {}
        self._weights: dict[str, Tensor] = {}
        self._embedded = torch.empty(0)

    def start(self, tokens: Tensor) -> None:
        """Measure outputs for `tokens` [batch, sequence] and keep the weights."""
        inputs, outputs = self._run(tokens)
        self._embedded = inputs[EMBEDDING]
        self._weights = {name: weight.clone() for name, weight in self._weights_now().items()}
        self.activations = {name: _size(output) for name, output in {EMBEDDING: self._embedded, **outputs}.items()}

    def end(self, tokens: Tensor) -> None:
        """Measure what the updates since the start add for the same `tokens`."""
        inputs, outputs = self._run(tokens)
        self.updates[EMBEDDING] = _size(inputs[EMBEDDING] - self._embedded)
        changes = {name: weight - self._weights[name] for name, weight in self._weights_now().items()}
        for name in outputs:
            self.updates[name] = _size(inputs[name] @ changes[name][: self._true_rows(name)].T)
        self.updates |= {name: _size(changes[name]) for name in self.norms}

    def _weights_now(self) -> dict[str, Tensor]:
        return {name: module.weight.detach() for name, module in (*self.modules.items(), *self.norms.items())}

    def _true_rows(self, name: str) -> int | None:
        return self.model.true_vocab_size if name in self._padded else None

    @torch.no_grad()
    def _run(self, tokens: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Inputs and outputs of every module, copied; under `embedding` the first layer's input."""
        inputs: dict[str, Tensor] = {}
        outputs: dict[str, Tensor] = {}

        def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], tuple[Tensor, Tensor | None]], None]:
            """A hook that keeps a module's input and output."""

            def hook(module: nn.Module, args: tuple[Tensor, ...], output: tuple[Tensor, Tensor | None]) -> None:
                """The engine's linear layers give a pair of output and bias."""
                inputs[name] = args[0].detach().clone()
                outputs[name] = output[0].detach()[..., : self._true_rows(name)].clone()

            return hook

        def keep_embedded(module: nn.Module, args: tuple[object, ...], named: dict[str, Tensor]) -> None:
            """The first layer's input is the embedding times its multiplier."""
            inputs[EMBEDDING] = named["hidden_states"].detach().clone()

        handles = [module.register_forward_hook(keep(name)) for name, module in self.modules.items()]
        handles.append(self.model.decoder.layers[0].register_forward_pre_hook(keep_embedded, with_kwargs=True))
        self.model(tokens.to(current().torch_device))
        for handle in handles:
            handle.remove()
        return inputs, outputs


def _size(values: Tensor) -> float:
    return values.abs().mean().item()


def _label(name: str) -> str:
    """`decoder.layers.0.self_attention.linear_qkv` is shown as `layer 0 linear_qkv`."""
    layer, last = layer_number(name), name.rpartition(".")[2]
    return last if layer is None else f"layer {layer} {last}"
