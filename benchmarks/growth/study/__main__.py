"""What growth saves: runs from scratch and grown ones, judged at the end of their decay.

    flm data stdlib --out DATA --vocab-size 512 --max-bytes 40000000
    python -m benchmarks.growth.study --data DATA --out OUT [--seeds 1 2 3] [--jobs 2]

One learning rate over both stages, growth in its stable phase, decay over the last fifth of the FLOPs. A trunk at a
constant learning rate is trained once, and a branch decays from it for every budget. Writes results.jsonl, tables.md
and study.png into OUT; what has a result is not run again.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from benchmarks.growth.study.arms import ARMS
from benchmarks.growth.study.page import write
from benchmarks.growth.study.runs import Study
from benchmarks.growth.study.sizes import Sizes


def main() -> None:
    """Run what has no result yet, seed by seed, and write the page."""
    args = _arguments()
    from flm_megatron.data.tokenizer import open_tokenizer

    sizes = Sizes(args.hidden, args.layers, open_tokenizer(str(args.data / "tokenizer.model")).vocab_size, args.lr)
    args.out.mkdir(parents=True, exist_ok=True)
    study = Study(args.out.resolve(), args.data.resolve(), sizes, tuple(args.budgets), args.validation_samples)
    chains: list[Callable[[], None]] = []
    for seed in args.seeds:
        chains.append(partial(study.scratch, seed, tuple(args.scratch_budgets)))
        chains += [partial(study.grown, arm, seed, at) for at in args.grow_at for arm in args.arms]
    with ThreadPoolExecutor(args.jobs) as pool:
        for future in [pool.submit(chain) for chain in chains]:
            future.result()
    print(write(study.results(), sizes, args.out))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder made by `flm data stdlib`")
    parser.add_argument("--out", type=Path, required=True, help="folder for runs and results")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--arms", nargs="*", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--budgets", type=float, nargs="+", default=[1.3, 5, 10], help="tokens per parameter")
    parser.add_argument("--scratch-budgets", type=float, nargs="+", default=[0.9, 1.3, 2, 3.5, 5, 7, 10, 14])
    parser.add_argument(
        "--grow-at", type=float, nargs="+", default=[0.325, 1.25], help="FLOPs before the growth, as a budget"
    )
    parser.add_argument("--hidden", type=int, default=64, help="width of the large model, a multiple of 32")
    parser.add_argument("--layers", type=int, default=4, help="layers of the large model, a multiple of 4")
    parser.add_argument("--lr", type=float, help="learning rate of all models, in place of the tuned one")
    parser.add_argument("--validation-samples", type=int, default=1024)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    return parser.parse_args()


if __name__ == "__main__":
    main()
