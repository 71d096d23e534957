"""Push a checkpoint's weights from some ranks to others under another layout, in one world, and check what arrived.

It shows, with seconds and bytes, what a trainer and a generator do with `flm_megatron.Refit`:
`torchrun --nproc-per-node 6 -m flm_megatron.cli.main refit CKPT --from-ranks 0-3 --from.tensor 2 --to-ranks 4,5`.
"""

from __future__ import annotations

import argparse
import re

from flm_megatron.cli.options.parser import location, whole
from flm_megatron.config.ranges import LARGEST_WORLD

SIZE = whole(1, LARGEST_WORLD)


def ranks(text: str) -> tuple[int, ...]:
    """Ranks in order, such as `0-3,6`: none twice."""
    found: list[int] = []
    for part in text.split(","):
        ends = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", part)
        if ends is None or int(ends[2] or ends[1]) >= LARGEST_WORLD:
            raise argparse.ArgumentTypeError(f"{text!r} is no list of ranks such as 0-3 or 4,5")
        found += range(int(ends[1]), int(ends[2] or ends[1]) + 1)
    if not found or len({*found}) != len(found):
        raise argparse.ArgumentTypeError(f"{text!r} names no rank, or one twice")
    return tuple(found)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `flm refit`."""
    parser.add_argument("checkpoint", type=location, help="checkpoint of any format whose weights are pushed")
    for side, what in (("from", "hold the weights"), ("to", "want them")):
        parser.add_argument(
            f"--{side}-ranks", type=ranks, required=True, metavar="RANKS", help=f"ranks that {what}: 0-3"
        )
        for size in ("tensor", "pipeline"):
            parser.add_argument(
                f"--{side}.{size}",
                type=SIZE,
                default=1,
                metavar="N",
                help=f"{size}-parallel size of these (default: 1)",
            )
    parser.add_argument("--pushes", type=whole(1, 1000), default=2, help="how often they are pushed (default: 2)")


def run(args: argparse.Namespace) -> int:
    """Push, and print what it took; returns 0."""
    from flm_megatron.api.refit import refit
    from flm_megatron.config.schema import ParallelConfig
    from flm_megatron.distributed.launched import is_first_process

    layouts = [
        ParallelConfig(tensor=getattr(args, f"{side}.tensor"), pipeline=getattr(args, f"{side}.pipeline"))
        for side in ("from", "to")
    ]
    done = refit(
        args.checkpoint,
        from_ranks=args.from_ranks,
        to_ranks=args.to_ranks,
        from_layout=layouts[0],
        to_layout=layouts[1],
        pushes=args.pushes,
    )
    if is_first_process():
        sent, most = sum(done.traffic.sent) / 2**20, max(done.traffic.sent) / 2**20
        print(
            f"each push: {sent:,.2f} MiB, at most {most:,.2f} from one rank, {sum(done.traffic.messages)} messages in "
            f"{done.traffic.rounds} rounds; plan {done.plan_s:.3f} s, pushes "
            f"{' '.join(f'{seconds:.3f}' for seconds in done.push_s)} s\n"
            f"logical hash of what arrived {done.logical_hash}: the checkpoint's"
        )
    return 0
