"""Encode text into an indexed dataset."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING

from flm_megatron.cli.options.parser import path, place, real, whole
from flm_megatron.errors import RequestError

if TYPE_CHECKING:
    from flm_megatron.data.corpus.build import Built

SIMILARITY = 0.8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `flm data build`, besides those of the text."""
    parser.add_argument("--tokenizer", required=True, type=place, help="tokenizer, a file or a folder")
    parser.add_argument(
        "--out", required=True, type=path, metavar="PREFIX", help="write PREFIX.bin, PREFIX.idx and PREFIX.json"
    )
    parser.add_argument(
        "--workers", type=whole(1, 1024), default=os.cpu_count() or 1, help="processes (default: one per core)"
    )
    parser.add_argument(
        "--validation-share",
        type=real(0.0, 1.0),
        default=0.0,
        help="share of documents for PREFIX_validation (default: 0)",
    )
    parser.add_argument(
        "--dedup", choices=("exact", "near"), help="leave out documents that occurred before; near: also similar ones"
    )
    parser.add_argument(
        "--similarity",
        type=real(0.0, 1.0),
        help=f"of --dedup near: share of their runs of five words that two have in common (default: {SIMILARITY})",
    )
    parser.set_defaults(run_data=run)


def run(args: argparse.Namespace) -> int:
    """Build, print what was written, and to stderr how fast and what was left out; returns 0."""
    from flm_megatron.cli.data import corpus_of, described
    from flm_megatron.data.corpus.build import BuildOptions, build
    from flm_megatron.data.corpus.losses import Losses
    from flm_megatron.data.tokenizer import open_tokenizer

    if args.similarity is not None and args.dedup != "near":
        raise RequestError("--similarity means something with --dedup near alone: give that, or leave it out")
    corpus, tokenizer = corpus_of(args), open_tokenizer(args.tokenizer)
    losses = Losses(tokenizer)
    near = (args.similarity or SIMILARITY) if args.dedup == "near" else None
    options = BuildOptions(args.workers, args.validation_share, args.dedup is not None, near, corpus.identity())
    built = build(losses.watch(corpus.documents()), tokenizer, args.out, options, corpus.size_bytes())
    for prefix, description in built.datasets.items():
        print(described(prefix, description))
    print("\n".join(_notes(built, args.workers)), file=sys.stderr)
    if line := losses.line():
        print(line, file=sys.stderr)
    return 0


def _notes(built: Built, workers: int) -> list[str]:
    """What was left out, and how fast it was."""
    notes = []
    if built.resumed:
        notes.append(f"went on after {built.resumed:,} documents of a build that was killed")
    if built.copies or built.near:
        notes.append(f"left out: {built.copies:,} copies, {built.near:,} near duplicates")
    rate, tokens = built.text_bytes / 1e6 / max(built.seconds, 1e-9), built.tokens / max(built.seconds, 1e-9)
    notes.append(
        f"{built.seconds:.1f} s: {rate:,.2f} MB/s, {tokens:,.0f} tokens/s;"
        f" {rate / workers:,.2f} MB/s in each of {workers} processes"
    )
    return notes
