"""`flm data adopt`: describe a dataset that another program made, so that runs take it."""

from __future__ import annotations

import argparse
import sys

from flm_megatron.cli.options.parser import path, place


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("prefix", type=path, metavar="PREFIX", help="of PREFIX.bin and PREFIX.idx")
    parser.add_argument("--tokenizer", required=True, type=place, help="tokenizer that the dataset was made with")
    parser.add_argument(
        "--out", type=path, metavar="OUT", help="write OUT.json, with links to both files (default: PREFIX.json)"
    )
    parser.set_defaults(run_data=run)


def run(args: argparse.Namespace) -> int:
    """Describe the dataset, and say what was found."""
    from tqdm import tqdm

    from flm_megatron.data.corpus.adopt import adopt_dataset
    from flm_megatron.data.tokenizer import open_tokenizer

    tokenizer = open_tokenizer(args.tokenizer)
    with tqdm(unit="B", unit_scale=True, desc="adopt", disable=not sys.stderr.isatty()) as bar:
        found = adopt_dataset(args.prefix, tokenizer, args.out, bar.update)
    made = found.description
    print(
        f"{args.out or args.prefix}: {made.tokens:,} tokens, {made.documents:,} documents, about {made.text_bytes:,} "
        f"bytes ({made.text_bytes / made.tokens:.2f} a token, estimated)"
    )
    ended = f"{found.ended:,} of {made.documents:,} documents end with id {made.eod}"
    print(f"{ended}; the first begins {found.beginning!r}")
    if found.ended < made.documents:
        print(
            f"WARNING: {made.documents - found.ended:,} documents do not end with id {made.eod} and run into the next: "
            "make them again with --append-eod, or the model is not taught where those texts end"
        )
    if found.unreadable > 0.01:
        print(
            f"WARNING: {100 * found.unreadable:.0f}% of the text that was decoded is no text: is this the tokenizer "
            "that the dataset was made with?"
        )
    return 0
