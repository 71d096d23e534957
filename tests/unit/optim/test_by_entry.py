"""New entries beside old ones: their first update, with `keep` and with `birth`, and a learning rate of their own."""

from __future__ import annotations

import math
import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flm_megatron.optim.adamw import AdamW
from flm_megatron.optim.by_entry import CHUNK_VALUES, settling_steps, update_by_entry

GROWN_AT = 50_000


def grown_optimizer(beta2: float, step_offset: bool, lr: float = 1e-3) -> tuple[torch.nn.Parameter, AdamW]:
    """A parameter whose second half is new, under an optimizer that has taken GROWN_AT steps."""
    param = torch.nn.Parameter(torch.zeros(2, 4))
    optimizer = AdamW([param], lr=lr, betas=(0.9, beta2), eps=0.0)
    optimizer.param_groups[0]["step"] = GROWN_AT
    old = torch.tensor([[1.0], [0.0]]).expand(2, 4)
    optimizer.state[param] = {"exp_avg": 0.5 * old, "exp_avg_sq": 0.25 * old.clone()}
    if step_offset:
        optimizer.state[param]["step_offset"] = (GROWN_AT * (1 - old)).int()
    param.grad = torch.full((2, 4), 0.5)
    return param, optimizer


@pytest.mark.parametrize(("beta2", "trap"), [(0.999, 3.16), (0.95, 0.447)])
def test_first_update_of_new_entries(beta2: float, trap: float) -> None:
    for step_offset, factor in ((False, trap), (True, 1.0)):
        param, optimizer = grown_optimizer(beta2, step_offset)
        optimizer.step()
        assert (-param[0] / 1e-3).tolist() == pytest.approx([1.0] * 4, rel=1e-4)
        assert (-param[1] / 1e-3).tolist() == pytest.approx([factor] * 4, rel=2e-3)


def test_keep_needs_a_warm_up() -> None:
    """A learning rate that warms up from a hundredth keeps the first update of new entries below the peak rate."""
    param, optimizer = grown_optimizer(0.999, step_offset=False, lr=1e-3 / 100)
    optimizer.step()
    assert -param[1].min().item() < 1e-3 * 0.04


def test_step_offsets_match_a_fresh_optimizer_beside_an_old_one() -> None:
    """Old and new entries of one tensor move as two tensors under two torch optimizers do, over many steps."""
    draw = torch.Generator().manual_seed(1)
    start = torch.randn(6, generator=draw, dtype=torch.float64)
    grads = torch.randn(400, 6, generator=draw, dtype=torch.float64)
    parts = [torch.nn.Parameter(start[:3].clone()), torch.nn.Parameter(start[3:].clone())]
    options: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    optimizers = [torch.optim.AdamW([part], **options) for part in parts]
    param = torch.nn.Parameter(start.clone())
    mixed = AdamW([param], **options)
    for step, grad in enumerate(grads):
        if step < 7:  # the new entries do not exist yet
            grad = grad.clone()
            grad[3:] = 0
        if step == 7:
            with torch.no_grad():
                param[3:] = start[3:]
            mixed.state[param]["step_offset"] = torch.tensor([0, 0, 0, 7, 7, 7], dtype=torch.int32)
        for part, optimizer, piece in zip(parts, optimizers, (grad[:3], grad[3:]), strict=True):
            if step >= 7 or part is parts[0]:
                part.grad = piece.clone()
                optimizer.step()
        param.grad = grad.clone()
        mixed.step()
    torch.testing.assert_close(param.detach(), torch.cat([part.detach() for part in parts]), rtol=1e-9, atol=1e-9)
    assert "step_offset" not in mixed.state[param]


@pytest.mark.parametrize("young", [False, True], ids=["one age", "two ages"])
def test_added_entries_learn_at_a_rate_of_their_own(young: bool) -> None:
    """As two tensors under two torch optimizers with two learning rates, until the factor is 1."""
    draw = torch.Generator().manual_seed(1)
    start, grads = (torch.randn(*size, generator=draw, dtype=torch.float64) for size in ((6,), (12, 6)))
    parts = [torch.nn.Parameter(start[:3].clone()), torch.nn.Parameter(start[3:].clone())]
    options: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    theirs = [torch.optim.AdamW([part], **options) for part in parts]
    param = torch.nn.Parameter(start.clone())
    ours = AdamW([param], **options)
    ours.state[param]["added"] = torch.tensor([False] * 3 + [True] * 3)
    if young:
        ours.state[param]["step_offset"] = torch.zeros(6, dtype=torch.int32)
    for step, grad in enumerate(grads):
        ours.added_lr_mult = factor = max(1.0, 4.0 - step / 2)
        theirs[1].param_groups[0]["lr"] = factor * 1e-2
        for part, optimizer, piece in zip(parts, theirs, (grad[:3], grad[3:]), strict=True):
            part.grad = piece.clone()
            optimizer.step()
        param.grad = grad.clone()
        ours.step()
        assert ("added" in ours.state[param]) == (factor > 1)
    torch.testing.assert_close(param.detach(), torch.cat([part.detach() for part in parts]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("beta2", [0.95, 0.999])
def test_step_offsets_are_dropped_when_they_round_away(beta2: float) -> None:
    age = settling_steps((0.9, beta2))
    assert torch.tensor(1 - beta2**age, dtype=torch.float32) == 1
    assert torch.tensor(1 - beta2 ** (age - 2), dtype=torch.float64) < 1 - 2.0**-26
    param, optimizer = grown_optimizer(beta2, step_offset=True)
    optimizer.param_groups[0]["step"] = GROWN_AT + age - 2
    optimizer.step()
    assert "step_offset" in optimizer.state[param]
    optimizer.step()
    assert "step_offset" not in optimizer.state[param]


def test_update_by_entry_is_adam_where_all_are_old() -> None:
    draw = torch.Generator().manual_seed(2)
    ours, theirs = (torch.nn.Parameter(torch.randn(9, generator=torch.Generator().manual_seed(3))) for _ in range(2))
    state = {"exp_avg": torch.zeros(9), "exp_avg_sq": torch.zeros(9), "step_offset": torch.zeros(9, dtype=torch.int32)}
    options: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    reference = torch.optim.AdamW([theirs], **options)
    for step in range(1, 6):
        ours.grad = torch.randn(9, generator=draw)
        theirs.grad = ours.grad.clone()
        update_by_entry(ours, state, {**options, "step": step})
        reference.step()
    torch.testing.assert_close(ours, theirs)
    assert not math.isclose(ours[0].item(), 0.0)


class LargestMemory(TorchDispatchMode):
    """Follows the bytes of tensors that are made while the mode is on, and of those among them that are still there."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {thing.untyped_storage().data_ptr() for thing in args if isinstance(thing, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        storage = out.untyped_storage() if isinstance(out, torch.Tensor) else None
        if storage is not None and storage.data_ptr() not in given | self._seen:
            self._hold(storage)
        return out

    def _hold(self, storage: torch.UntypedStorage) -> None:
        self._seen.add(storage.data_ptr())
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._release, storage.data_ptr(), storage.nbytes())

    def _release(self, pointer: int, nbytes: int) -> None:
        self._seen.discard(pointer)
        self.now -= nbytes


def reference_update(param: torch.Tensor, state: dict[str, torch.Tensor], group: dict[str, Any]) -> None:
    """The update written out for the whole tensor at once."""
    beta1, beta2 = group["betas"]
    assert param.grad is not None
    gradient = param.grad.to(param.dtype)
    state["exp_avg"].lerp_(gradient, 1 - beta1)
    state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    age = (group["step"] - state["step_offset"]).double()
    mean = state["exp_avg"] / (1 - beta1**age).to(param.dtype)
    root = (state["exp_avg_sq"] / (1 - beta2**age).to(param.dtype)).sqrt_()
    param.mul_(1 - group["lr"] * group["weight_decay"])
    param.addcdiv_(mean, root.add_(group["eps"]), value=-group["lr"])


def test_an_update_in_chunks_takes_little_memory_and_gives_the_same_bits() -> None:
    shape = (3, CHUNK_VALUES + 1237)
    draw = torch.Generator().manual_seed(4)
    step_offset = torch.randint(0, 40, shape, generator=draw, dtype=torch.int32)
    ours, whole = (torch.randn(shape, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    states = [
        {"exp_avg": torch.zeros(shape), "exp_avg_sq": torch.zeros(shape), "step_offset": step_offset} for _ in range(2)
    ]
    group = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    with torch.no_grad(), LargestMemory() as memory:
        for step in (41, 42):
            ours.grad = torch.randn(shape, generator=draw)
            whole.grad = ours.grad.clone()
            before = memory.now
            memory.most = before
            update_by_entry(ours, states[0], {**group, "step": step})
            in_chunks = memory.most - before
            reference_update(whole, states[1], {**group, "step": step})
            at_once = memory.most - before
    assert torch.equal(ours, whole)
    assert all(torch.equal(states[0][name], states[1][name]) for name in ("exp_avg", "exp_avg_sq"))
    assert in_chunks <= 40 * CHUNK_VALUES
    assert at_once >= 20 * ours.numel()
