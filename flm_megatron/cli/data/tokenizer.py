"""Train a tokenizer: a SentencePiece model or a `tokenizer.json`."""

from __future__ import annotations

import argparse

from flm_megatron.cli.options.parser import path, positive, seed, vocabulary
from flm_megatron.errors import RequestError

KINDS = ("bpe", "unigram", "bytes")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `flm data tokenizer`, besides those of the text."""
    parser.add_argument(
        "--out", required=True, type=path, help="file to write: X.json a tokenizer.json, X.model a SentencePiece model"
    )
    parser.add_argument(
        "--kind", choices=KINDS, default="bpe", help="bpe (default), unigram, or bytes, which takes no text"
    )
    parser.add_argument("--vocab-size", type=vocabulary, help="number of ids (default: 32000)")
    parser.add_argument(
        "--max-bytes",
        type=positive,
        default=200_000_000,
        help="bytes of text to learn from, sampled (default: 200000000)",
    )
    parser.add_argument("--seed", type=seed, default=1234, help="seed of the sampling (default: 1234)")
    parser.set_defaults(run_data=run)


def run(args: argparse.Namespace) -> int:
    """Train and print the number of ids and the fingerprint; returns 0."""
    from flm_megatron.cli.data import corpus_of
    from flm_megatron.data.tokenizer import train_tokenizer

    if bool(args.inputs) == (args.kind == "bytes"):
        raise RequestError(
            "a vocabulary of bytes learns from no text: leave the inputs out"
            if args.inputs
            else f"--kind {args.kind} learns from text: name files or folders of it"
        )
    corpus = corpus_of(args)
    tokenizer = train_tokenizer(
        corpus.documents(),
        args.out,
        args.vocab_size,
        kind=args.kind,
        text_bytes=corpus.size_bytes(),
        max_bytes=args.max_bytes,
        seed=args.seed,
    )
    print(f"{args.out}: {tokenizer.vocab_size:,} ids, fingerprint {tokenizer.fingerprint}")
    return 0
