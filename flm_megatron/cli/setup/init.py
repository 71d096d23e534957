"""Write a run file for your hardware, budget, model and data: asks for what options do not say, and gives the reasons.

The file is checked as `flm config` does before it is there, and no file is overwritten.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from flm_megatron.cli.options.parser import path, processes, real
from flm_megatron.errors import RequestError

Number = TypeVar("Number", int, float)
QUESTIONS = {
    "gpu": "Accelerator, such as h100, a800 or mi300x (empty: the processors of this machine)",
    "gpus": "How many accelerators, or processes",
    "model": "Model: a preset such as tiny or tele-flm-52b, a size such as 125M, or a Hugging Face folder",
    "data": "Data: the prefix of an indexed dataset, or text (a folder, or a .txt, .md or .jsonl file)",
    "tokenizer": "Tokenizer (empty: train one on the text, or the model's own)",
    "tokens": "Tokens to train on (empty: the preset's, or 20 for each parameter)",
}
DEFAULTS = {"gpus": "1", "model": "tiny"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `flm init`."""
    parser.add_argument("--gpu", help="accelerator, such as h100, a800, mi300x (default: processors)")
    parser.add_argument("--gpus", type=processes, help="how many accelerators, or processes (default 1)")
    parser.add_argument("--model", help="preset, size such as 125M or 7B, or Hugging Face folder (default tiny)")
    parser.add_argument("--data", help="prefix of an indexed dataset, or text: a folder, .txt, .md or .jsonl")
    parser.add_argument("--tokenizer", help="tokenizer (default: the model's own, or one trained on the text)")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--tokens", type=real(1.0, 1e15), help="tokens to train on")
    budget.add_argument("--hours", type=real(0.0, 1e6, above=True), help="hours to train for on --gpus of --gpu")
    parser.add_argument("--grow", action="store_true", help="train a smaller model first and grow it, as advised")
    parser.add_argument("--name", default="run", help="name of the run; its output folder is runs/NAME (default run)")
    parser.add_argument("--out", type=path, default=Path("run.yaml"), metavar="FILE", help="file to write (run.yaml)")
    parser.add_argument("--yes", action="store_true", help="ask nothing: take the defaults of what is not given")


def run(args: argparse.Namespace) -> int:
    """Ask, write and say what comes next; returns 0."""
    from flm_megatron.api.new_run.request import NewRun
    from flm_megatron.api.new_run.write import require_new, write_new_run

    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", args.name):
        raise RequestError(f"--name {args.name!r} is no name of a folder: letters, digits, ., _ and -")
    require_new(args.out)
    given = {name: _answer(args, name) for name in QUESTIONS}
    asked = NewRun(
        model=given["model"] or DEFAULTS["model"],
        data=given["data"] or "",
        tokenizer=given["tokenizer"] or None,
        gpu=given["gpu"] or None,
        gpus=_converted("gpus", given["gpus"] or DEFAULTS["gpus"], processes),
        tokens=_converted("tokens", given["tokens"], real(1.0, 1e15)) if given["tokens"] else None,
        hours=args.hours,
        grow=args.grow,
        name=args.name,
    )
    written = write_new_run(asked, args.out)
    print(f"written: {written.path}")
    if written.advice is not None and written.advice.verdict == "grow" and not args.grow:
        print("growing a smaller model into this one is expected to pay (see the file): give --grow for such a file")
    print("next:", *(f"  {command}" for command in written.commands), sep="\n")
    return 0


def _answer(args: argparse.Namespace, name: str) -> str | None:
    """What an option says, or else the answer to its question."""
    value = getattr(args, name)
    if value is not None or args.yes or (name == "tokens" and args.hours is not None):
        return None if value is None else str(value)
    default = f" [{DEFAULTS[name]}]" if name in DEFAULTS else ""
    try:
        return input(f"{QUESTIONS[name]}{default}: ").strip()
    except EOFError:
        raise RequestError(f"no answer about {name}: give --{name}, or --yes to take the defaults") from None


def _converted(name: str, text: str, convert: Callable[[str], Number]) -> Number:
    """An answer as a number. Raises RequestError if it is none."""
    try:
        return convert(text)
    except argparse.ArgumentTypeError as error:
        raise RequestError(f"{name}: {error}") from None
