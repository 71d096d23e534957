"""A parser whose mistakes are one line, and the types of options that say what is wrong with a value."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from flm_megatron.config.ranges import LARGEST_MODEL, LARGEST_WORLD
from flm_megatron.errors import RequestError, one_line
from flm_megatron.paths import expanded, given_path

LONGEST_SHOWN = 300
"""Characters of a line about a mistake: a value may be any number of them long."""
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
LARGEST_NUMBER = 2**63 - 1


class UsageError(RequestError):
    """Arguments that no command takes; the message begins with the command."""


class Parser(argparse.ArgumentParser):
    """Raises UsageError, one line that says where the usage is, in place of printing the usage and ending."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong with the arguments."""
        line = one_line(message)
        shown = line if len(line) <= LONGEST_SHOWN else f"{line[: LONGEST_SHOWN - 4]} ..."
        raise UsageError(f"{self.prog}: {shown}; see {self.prog} --help")


def take_overrides(parser: argparse.ArgumentParser) -> None:
    """Let a command that reads a run file take `--field value` for every field of it."""
    parser.epilog = "Any field of the run file can be overridden: --stages.0.parallel.tensor 2 (see `flm config`)."
    parser.set_defaults(accepts_overrides=True)


def path(text: str) -> Path:
    """A path, `~` replaced by the home."""
    try:
        return given_path(text, "the path")
    except RequestError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def location(text: str) -> Path:
    """A path, `~` replaced by the home, or a URL without secrets, as checkpoints have them."""
    from flm_megatron.storage.path import given_location

    try:
        return given_location(text, "the path")
    except RequestError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def place(text: str) -> str:
    """A path, `~` replaced by the home, or a URL without secrets."""
    try:
        return expanded(text, "the path")
    except RequestError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def template(text: str) -> str:
    """A chat template: a name, or the path of a file, `~` replaced by the home."""
    return str(path(text))


def whole(least: int, largest: int = LARGEST_NUMBER) -> Callable[[str], int]:
    """The type of a whole number from `least` to `largest`."""

    def convert(text: str) -> int:
        """A whole number within the limits."""
        try:
            number = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if not least <= number <= largest:
            raise argparse.ArgumentTypeError(_outside(text, least, largest))
        return number

    return convert


def _outside(text: str, least: int, largest: int) -> str:
    return f"{text} is below {least}" if int(text) < least else f"{text} is above {largest}"


positive = whole(1)
count = whole(0)
seed = whole(-(2**63))
processes = whole(1, LARGEST_WORLD)
vocabulary = whole(1, LARGEST_MODEL["vocab_size"])
layers = whole(1, LARGEST_MODEL["num_layers"])
width = whole(1, LARGEST_MODEL["hidden_size"])


def real(least: float = -math.inf, largest: float = math.inf, above: bool = False) -> Callable[[str], float]:
    """The type of a finite number from `least` (or `above` it) to `largest`."""

    def convert(text: str) -> float:
        """A finite number within the limits."""
        try:
            number = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        if not math.isfinite(number):
            raise argparse.ArgumentTypeError(f"{text} is not finite")
        if number < least or (above and number == least):
            raise argparse.ArgumentTypeError(f"{text} is {'not above' if above else 'below'} {least:g}")
        if number > largest:
            raise argparse.ArgumentTypeError(f"{text} is above {largest:g}")
        return number

    return convert


def byte_size(text: str) -> int:
    """A number of bytes such as 5GB, 500MB or 2GiB."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B)?", text.strip().upper())
    if not match or float(match[1]) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 5GB or 500MB")
    return int(float(match[1]) * UNITS[match[2] or ""])
