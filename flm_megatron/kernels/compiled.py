"""References whose steps torch.compile puts together into one loop (on a CPU, in C++) or kernel.

Only what lies between matrix products and exchanges is compiled, one operation at a time: no graph of torch.compile
holds a collective or a weight, so that it cannot meet parallelism, recomputation or masks.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
VARIANTS = 64
"""Shapes, dtypes and optional operands for which a function may be compiled in one process."""


def compiled(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """`function`, compiled as a whole at its first call with each kind of arguments."""
    torch._dynamo.config.recompile_limit = max(VARIANTS, torch._dynamo.config.recompile_limit)
    return torch.compile(function, fullgraph=True)


def compiler_obstacle() -> str | None:
    """Why nothing can be compiled for a CPU; none if the compiler that torch.compile would call is there."""
    compiler = os.environ.get("CXX", "g++")
    return None if shutil.which(compiler) else f"there is no C++ compiler {compiler} (install it, or name one in CXX)"
