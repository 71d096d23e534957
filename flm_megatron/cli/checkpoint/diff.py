"""Compare two checkpoints of any two formats, tensor by tensor. Exit status 1 if they differ beyond --tolerance.

Optimizer state is compared where both have it.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from flm_megatron.cli.checkpoint.options import add_vocab_size
from flm_megatron.cli.options.output import add_json, print_json
from flm_megatron.cli.options.parser import location, real

if TYPE_CHECKING:
    from flm_megatron.checkpoint.tools.compare import Comparison


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `flm checkpoint diff`."""
    parser.add_argument("first", type=location, help="checkpoint")
    parser.add_argument("second", type=location, help="checkpoint")
    parser.add_argument(
        "--tolerance",
        type=real(0.0),
        default=0.0,
        help="allowed difference of values over the largest magnitude in the tensor (default 0: equal values)",
    )
    add_json(parser)
    add_vocab_size(parser)


def run(args: argparse.Namespace) -> int:
    """Print a line for each tensor that differs; returns 1 if any does beyond the tolerance."""
    from flm_megatron.api.compare import compare
    from flm_megatron.distributed.launched import is_first_process

    comparison = compare(args.first, args.second, vocab_size=args.vocab_size)
    beyond = comparison.beyond(args.tolerance)
    if is_first_process():
        print_json(_data(comparison, beyond)) if args.json else print(_as_text(comparison, beyond))
    return 1 if beyond else 0


def _data(comparison: Comparison, beyond: list[str]) -> dict[str, object]:
    return {
        "differences": {name: vars(difference) for name, difference in comparison.differences.items()},
        "only_first": comparison.only_first,
        "only_second": comparison.only_second,
        "beyond_tolerance": beyond,
    }


def _as_text(comparison: Comparison, beyond: list[str]) -> str:
    lines = [
        f"{name}: absolute {difference.absolute:.6g}, relative {difference.relative:.6g}"
        for name, difference in comparison.differences.items()
        if difference.absolute
    ]
    for which, names in (("first", comparison.only_first), ("second", comparison.only_second)):
        if names:
            lines.append(f"only in the {which}: {len(names)} tensors, such as {names[0]}")
    equal = sum(not difference.absolute for difference in comparison.differences.values())
    verdict = f"{len(beyond)} beyond the tolerance" if beyond else "none beyond the tolerance"
    return "\n".join([*lines, f"{equal} of {len(comparison.differences)} common tensors equal, {verdict}"])
