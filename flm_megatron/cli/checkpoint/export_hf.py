"""Write a checkpoint as a Hugging Face folder, adapters merged into its weights.

The `teleflm` flavour has the released form, with its multipliers in config.json and code that `transformers` loads
with trust_remote_code. Every other flavour is a family of `transformers`, such as `llama`: it has the multipliers
folded into embedding and head, so that every inference server that knows the family gives the same logits.
"""

from __future__ import annotations

import argparse

from flm_megatron.cli.checkpoint.options import add_dtype, add_vocab_size
from flm_megatron.cli.options.parser import byte_size, location, path, positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `flm checkpoint export-hf`."""
    parser.add_argument("source", type=location, help="checkpoint of any format")
    parser.add_argument("destination", type=path, help="new folder")
    parser.add_argument("--flavour", default="teleflm", help="family to write, such as llama; teleflm if not given")
    parser.add_argument("--shard-size", type=byte_size, default=5 * 10**9, help="largest shard, such as 5GB (default)")
    parser.add_argument("--pad-vocab-to", type=positive, default=1, help="pad the vocabulary to a multiple of this")
    parser.add_argument("--tokenizer", type=path, help="tokenizer, a file or a folder; the run's if not given")
    parser.add_argument("--fold-mask", action="store_true", help="fold a half-open growth mask in, where that is exact")
    add_dtype(parser)
    add_vocab_size(parser)


def run(args: argparse.Namespace) -> int:
    """Export, and say how exact it is; returns 0."""
    from flm_megatron.api.hugging_face import export_hf
    from flm_megatron.distributed.launched import is_first_process

    written = export_hf(
        args.source,
        args.destination,
        flavour=args.flavour,
        dtype=args.dtype,
        shard_size=args.shard_size,
        pad_vocab_to=args.pad_vocab_to,
        tokenizer=args.tokenizer,
        fold_mask=args.fold_mask,
        vocab_size=args.vocab_size,
    )
    if is_first_process():
        print(f"{args.destination}: {written.nbytes:,} bytes of weights")
        if written.folding:
            print(written.folding)
        if written.no_tokenizer:
            print(f"no tokenizer files were written: {written.no_tokenizer}")
    return 0
