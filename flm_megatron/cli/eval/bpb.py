"""Bits per byte of a checkpoint on text: total negative log-likelihood in nats / (ln 2 x UTF-8 bytes).

Windows slide over each document, so that every token is predicted once and with context. Several checkpoints, or the
last of every stage of a run, make one table.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from flm_megatron.cli.options.model import add_model_options, checkpoints_of, layout_of
from flm_megatron.cli.options.parser import location, path, positive, real
from flm_megatron.errors import RequestError
from flm_megatron.paths import require_file

if TYPE_CHECKING:
    from flm_megatron.evaluation.perplexity.run import BitsPerByteRequest

Value = TypeVar("Value", Path, float)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `flm eval bpb`."""
    parser.add_argument("checkpoints", nargs="*", type=location, metavar="CKPT", help="checkpoints of any format")
    parser.add_argument("--all-stages", type=path, metavar="RUN_DIR", help="the last checkpoint of each stage of a run")
    parser.add_argument(
        "--text",
        nargs="+",
        required=True,
        type=_named_path,
        metavar="NAME=FILE",
        help="a domain and its text: a file (one document), .jsonl (one in `text` of each line) or a source tree",
    )
    parser.add_argument(
        "--weights",
        nargs="+",
        type=_named_number,
        metavar="NAME=SHARE",
        help="the domains' shares, for a weighted mean",
    )
    parser.add_argument("--window", type=positive, help="tokens of a window; the sequence length of the training")
    parser.add_argument("--stride", type=positive, help="tokens that windows move by; half a window")
    parser.add_argument("--batch", type=positive, default=1, help="windows in one forward pass (default 1)")
    parser.add_argument("--json", type=path, metavar="FILE", help="also write the result here; - prints it instead")
    add_model_options(parser)


def run(args: argparse.Namespace) -> int:
    """Check the request, then score on every process; returns 0."""
    from flm_megatron.distributed.under_layout import run_under
    from flm_megatron.evaluation.perplexity.run import check_request, evaluate

    if args.json and args.json != Path("-"):
        require_file(args.json, "--json")
    request = _request(args)
    check_request(request)
    return run_under(request.parallel, evaluate, request)


def _request(args: argparse.Namespace) -> BitsPerByteRequest:
    from flm_megatron.evaluation.perplexity.run import BitsPerByteRequest

    return BitsPerByteRequest(
        checkpoints=checkpoints_of(args),
        texts=_unique(args.text, "--text"),
        shares=_unique(args.weights, "--weights") if args.weights else {},
        window=args.window,
        stride=args.stride,
        batch=args.batch,
        json=args.json,
        tokenizer=args.tokenizer,
        precision=args.precision,
        vocab_size=args.vocab_size,
        parallel=layout_of(args),
    )


def _unique(pairs: list[tuple[str, Value]], option: str) -> Mapping[str, Value]:
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise RequestError(f"{option} names {name!r} twice: every domain has one name")
    return dict(pairs)


def _named_path(text: str) -> tuple[str, Path]:
    name, given, file = text.partition("=")
    if given and not name:
        raise argparse.ArgumentTypeError(f"{text!r} has no name before the =")
    return (name, path(file)) if given else (Path(text).stem, path(text))


def _named_number(text: str) -> tuple[str, float]:
    name, given, number = text.partition("=")
    if not given:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=SHARE, such as english=0.6")
    return name, real(0.0)(number)
