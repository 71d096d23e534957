"""The `flm` command."""

from __future__ import annotations

import argparse
import errno
import importlib
import io
import os
import signal
import sys
import time

from flm_megatron.cli.options.parser import Parser, UsageError
from flm_megatron.distributed.error_file import write_error_file
from flm_megatron.distributed.signals import STOPPED, StoppedBeforeTraining
from flm_megatron.errors import FlmError, one_line

FIRST_RANK_SPEAKS_S = 5.0
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
"""What a write may meet at any time; the system does not say in which file."""
COMMANDS = {
    "init": "write a run file for your hardware, budget, model and data",
    "train": "train a run file's stages, growing between them",
    "plan": "plan memory, time and cost before asking for the machines",
    "advise": "whether, when and how to grow into the last model of a run",
    "rehearse": "run ranks of a run at their true size on this machine, without values",
    "bench": "measure throughput on this hardware, or calibrate the planner to it",
    "launch": "start a run on a cluster, or print what would start it",
    "doctor": "check the machines before a run",
    "sft": "fine-tune a checkpoint on conversations",
    "config": "show every field of the run file, or a run file resolved",
    "data": "make datasets and tokenizers",
    "checkpoint": "inspect, verify, compare, re-shard, import and export checkpoints",
    "grow": "write a grown checkpoint",
    "shrink": "write a smaller checkpoint of the units that matter",
    "distance": "measure how near each layer is to the identity",
    "importance": "measure how much each channel, head and layer matters, to shrink by",
    "refit": "push weights from some ranks to others under another layout",
    "mup": "check the maximal-update parametrization",
    "eval": "bits per byte of text, and tasks of lm-evaluation-harness",
    "generate": "let a checkpoint write: prompts, a file of them, or a chat",
    "status": "how a run stands, live with --watch",
    "track": "send a run to its trackers: what is not sent yet",
    "report": "a run, or several compared, as one HTML page",
    "completion": "print a script by which a shell completes commands and options",
}
ALL = "*"
FOLDERS = {
    **dict.fromkeys(("completion", "init"), "setup."),
    **dict.fromkeys(("distance", "grow", "importance", "refit", "shrink"), "shape."),
}
"""Folder of a command's file, where it is not `cli/` itself."""


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 done, 1 failed, 2 wrong request, 3 stopped after saving."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may be bytes that are no text
    try:
        args = parsed(arguments)
    except UsageError as error:
        print(error, file=sys.stderr)
        return error.status
    try:
        return args.run(args)
    except FlmError as error:
        say_last(f"flm {args.command}: {error}", error.status)
        return error.status
    except StoppedBeforeTraining:
        say_last(f"flm {args.command}: stopped by a signal before training began", STOPPED)
        return STOPPED
    except BrokenPipeError:  # what reads our output, such as `head`, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing is left to flush at exit
        return 0
    except OSError as error:
        if error.filename is None and error.errno not in DISK_ERRORS:
            raise
        what = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
        print(one_line(f"flm {args.command}: {what}{error.strerror}"), file=sys.stderr)
        return FlmError.status
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def say_last(line: str, status: int) -> None:
    """Print what ended this process, and leave word for its launcher.

    Of a launched world the first rank speaks of what is wrong before it is joined, for mostly the same is wrong with
    all. The others wait: the launcher ends them then, unless they alone have something to say.
    """
    write_error_file(line, status)
    first = os.environ.get("RANK", "0") == "0" or "WORLD_SIZE" not in os.environ
    if not first and not _has_joined():
        if status == STOPPED:
            return
        time.sleep(FIRST_RANK_SPEAKS_S)
    print(line, file=sys.stderr, flush=True)


def _has_joined() -> bool:
    """Whether this process has been part of a world; torch is not imported to find out."""
    groups = sys.modules.get("flm_megatron.distributed.process_group")
    return groups is not None and groups.joined


def parsed(arguments: list[str]) -> argparse.Namespace:
    """The arguments, with what a command takes as `overrides` of its run file. Raises UsageError."""
    parser = _parser(arguments[0] if arguments else None)
    args, rest = parser.parse_known_args(arguments)
    if rest and not getattr(args, "accepts_overrides", False):
        parser.prog = f"flm {args.command}"
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.overrides = rest
    return args


def whole_parser() -> Parser:
    """The parser with the arguments of every command."""
    return _parser(ALL)


def _parser(wanted: str | None) -> Parser:
    """The parser, with the arguments of the wanted command only, so that help starts fast."""
    from flm_megatron import __version__

    parser = Parser(prog="flm", description="Train very large language models in stages.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"flm_megatron {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, allow_abbrev=False)
        if wanted in (name, ALL):
            _fill(command, name)
    return parser


def command_parser(name: str) -> Parser:
    """The parser of one command, for its help."""
    parser = Parser(prog=f"flm {name}", description=COMMANDS[name], allow_abbrev=False)
    _fill(parser, name)
    return parser


def _fill(command: argparse.ArgumentParser, name: str) -> None:
    """Add the arguments of a command to its parser."""
    module = importlib.import_module(f"flm_megatron.cli.{FOLDERS.get(name, '')}{name}")
    module.add_arguments(command)
    command.set_defaults(run=module.run)


if __name__ == "__main__":
    sys.exit(main())
