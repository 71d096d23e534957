"""What a process is made ready with for megatron-core."""

from __future__ import annotations

import torch

from flm_megatron.engine.prepare import prepare, put_back


def test_freed_activations_get_their_values_back_without_a_compiler() -> None:
    prepare()
    from megatron.core.tensor_parallel import random

    assert getattr(random, "_get_share_storage", lambda: put_back)() is put_back
    values = torch.arange(6.0, requires_grad=True)
    output = (values * 2).view(2, 3)
    view, version = output[1], output._version
    output.untyped_storage().resize_(0)
    put_back(output, (values * 2).view(2, 3))
    assert output.tolist() == [[0.0, 2.0, 4.0], [6.0, 8.0, 10.0]] and view.tolist() == [6.0, 8.0, 10.0]
    assert output._version == version
