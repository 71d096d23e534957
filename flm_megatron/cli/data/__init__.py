"""`flm data`: make datasets and tokenizers from text, verify them, and choose conversations."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING

from flm_megatron.cli.data import adopt as data_adopt
from flm_megatron.cli.data import build as data_build
from flm_megatron.cli.data import screen as data_screen
from flm_megatron.cli.data import tokenizer as data_tokenizer
from flm_megatron.cli.options.output import add_json, print_json
from flm_megatron.cli.options.parser import path, place, vocabulary, whole

if TYPE_CHECKING:
    from flm_megatron.data.corpus.corpus import Corpus
    from flm_megatron.data.corpus.description import Description


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommands."""
    commands = parser.add_subparsers(dest="data_command", required=True, metavar="COMMAND")
    build = commands.add_parser("build", help="encode text into an indexed dataset", allow_abbrev=False)
    _add_corpus(build)
    data_build.add_arguments(build)
    adopt = commands.add_parser("adopt", help="describe a dataset that another program made", allow_abbrev=False)
    data_adopt.add_arguments(adopt)
    tokenizer = commands.add_parser("tokenizer", help="train a tokenizer", allow_abbrev=False)
    _add_corpus(tokenizer, "*")
    data_tokenizer.add_arguments(tokenizer)
    _add_verify(commands.add_parser("verify", help="check a dataset against what was written", allow_abbrev=False))
    _add_show(commands.add_parser("show", help="the text of a training sample", allow_abbrev=False))
    screen = commands.add_parser("screen", help="choose few good conversations out of many", allow_abbrev=False)
    data_screen.add_arguments(screen)
    _add_stdlib(
        commands.add_parser(
            "stdlib", help="tokenizer and datasets from Python's own standard library", allow_abbrev=False
        )
    )


def run(args: argparse.Namespace) -> int:
    """Run the chosen subcommand."""
    return args.run_data(args)


def _add_corpus(parser: argparse.ArgumentParser, inputs: str = "+") -> None:
    parser.add_argument(
        "inputs",
        type=place,
        nargs=inputs,
        metavar="INPUT",
        help="text, .jsonl, .parquet, .arrow or .tar file (.gz, .bz2, .xz, .zst), a pattern of them, a folder of "
        "sources and prose, a folder that datasets saved, or URLs of such files",
    )
    parser.add_argument("--field", default="text", help="field of a JSON line that holds the text (default: text)")
    parser.add_argument("--suffixes", nargs="+", metavar="SUFFIX", help="files to take from folders, e.g. .py .md")


def _add_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prefixes", nargs="+", type=place, metavar="PREFIX", help="as given to `flm data build --out`")
    add_json(parser)
    parser.set_defaults(run_data=_verify)


def _add_show(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_file", type=path, help="run file (YAML)")
    parser.add_argument(
        "--sample", required=True, metavar="ID", help="SOURCE/EPOCH/SAMPLE as in the log, or its number in the run"
    )
    parser.set_defaults(run_data=_show, accepts_overrides=True)


def _add_stdlib(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", required=True, type=path, metavar="FOLDER", help="folder to write")
    parser.add_argument("--vocab-size", type=vocabulary, default=4096, help="number of ids (default: 4096)")
    parser.add_argument("--max-bytes", type=whole(100_000), default=8_000_000, help="bytes of text (default: 8000000)")
    parser.add_argument("--workers", type=whole(1, 1024), default=1, help="processes (default: 1)")
    parser.set_defaults(run_data=_stdlib)


def corpus_of(args: argparse.Namespace) -> Corpus:
    """The documents that the options of `_add_corpus` name."""
    from flm_megatron.data.corpus.corpus import ALL_SUFFIXES, Corpus

    return Corpus(args.inputs, args.field, args.suffixes or ALL_SUFFIXES)


def _verify(args: argparse.Namespace) -> int:
    """Read every dataset, and say of each that it is whole; the first that is not ends the command."""
    from tqdm import tqdm

    from flm_megatron.data.corpus.verify import verify_dataset

    found = {}
    for prefix in args.prefixes:
        with tqdm(unit="B", unit_scale=True, desc="verify", disable=not sys.stderr.isatty()) as bar:
            found[str(prefix)] = verify_dataset(prefix, bar.update)
        if not args.json:
            print(f"nothing wrong: {described(str(prefix), found[str(prefix)])}")
    if args.json:
        print_json({prefix: vars(description) for prefix, description in found.items()})
    return 0


def _show(args: argparse.Namespace) -> int:
    from flm_megatron.checkpoint.run_file import open_run
    from flm_megatron.data.conversations.show import sample_text
    from flm_megatron.growth.foreseen import check_run_file
    from flm_megatron.training.resume.start import run_history

    config = open_run(args.run_file, args.overrides)
    check_run_file(config)
    print(sample_text(config, args.sample, run_history(config)))
    return 0


def _stdlib(args: argparse.Namespace) -> int:
    from flm_megatron.data.corpus.standard_library import build_standard_library

    made = build_standard_library(args.out, vocab_size=args.vocab_size, max_bytes=args.max_bytes, workers=args.workers)
    print(described(os.path.join(args.out, "train"), made.train))
    print(described(os.path.join(args.out, "validation"), made.validation))
    entropy = made.entropy
    print(
        f"unigram entropy of validation: {entropy.nats_per_token:.4f} nats/token, {entropy.bits_per_byte:.4f} bits/byte"
    )
    return 0


def described(prefix: str, made: Description) -> str:
    """A dataset in a line."""
    return f"{prefix}: {made.tokens:,} tokens, {made.text_bytes:,} bytes, {made.documents:,} documents"
