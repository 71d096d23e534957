"""Make a checkpoint of a Hugging Face folder of Llama's or Tele-FLM's form.

Training can also start from the folder as it is: give it as `checkpoint.initial` in the run file.
"""

from __future__ import annotations

import argparse

from flm_megatron.cli.checkpoint.options import add_dtype, add_vocab_size
from flm_megatron.cli.options.parser import path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `flm checkpoint import-hf`."""
    parser.add_argument("source", type=path, help="Hugging Face folder: safetensors, or .bin (never run)")
    parser.add_argument("destination", type=path, help="new folder")
    add_dtype(parser)
    add_vocab_size(parser)


def run(args: argparse.Namespace) -> int:
    """Import, and print the logical hash of what was written; returns 0."""
    from flm_megatron.checkpoint.described import required_model
    from flm_megatron.checkpoint.files.destination import require_new
    from flm_megatron.checkpoint.hugging_face.reader import HuggingFaceCheckpoint
    from flm_megatron.checkpoint.lazy.converted import ConvertedCheckpoint, dtype_named
    from flm_megatron.checkpoint.stage_manifest import manifest_for
    from flm_megatron.checkpoint.tools.reshard import reshard
    from flm_megatron.distributed.launched import launched_processes

    require_new(args.destination)
    with launched_processes() as processes:
        source = HuggingFaceCheckpoint(args.source, args.vocab_size)
        model = required_model(source, str(args.source), args.vocab_size)
        view = ConvertedCheckpoint(source, dtype_named(args.dtype))
        manifest = manifest_for(view, model, args.source)
        written = reshard(view, args.destination, processes, manifest)
        if processes.rank == 0:
            print(f"{args.destination}: logical hash {written['logical_hash']}")
    return 0
