"""Inputs out of seeds: bytes changed, JSON changed by its structure, pickles put together from opcodes."""

from __future__ import annotations

import json
import pickle
import random
import struct
from typing import Any

import torch

from flm_megatron.checkpoint.files.pickle.reader import CLASSES

LENGTHS = (0, 1, 2, 7, 127, 128, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1)
STRANGE: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1,
    2,
    10**12,
    -(10**12),
    10**30,
    2**63,
    0.5,
    -1e308,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "96",
    "../x",
    "/etc/passwd",
    "a\0b",
    "\ud800",
    "x" * 5000,
    [],
    {},
    [[]],
    [1, 2],
    {"a": {}},
    {"a": 1, "b": [None]},
)
EVIL = (
    ("os", "system"),
    ("builtins", "eval"),
    ("builtins", "getattr"),
    ("builtins", "__import__"),
    ("io", "open"),
    ("pathlib", "Path"),
    ("torch", "load"),
    ("torch", "Tensor"),
    ("torch.serialization", "load"),
    ("megatron.core.enums", "Thing"),
    ("signal", "Signals"),
    ("torch", "bfloat16"),
    ("torch", "FloatStorage"),
)
NAMES = (*((module, name) for module, names in CLASSES.items() for name in names), *EVIL)
FIELDS = (
    "state_dict_metadata",
    "storage_data",
    "properties",
    "size",
    "chunks",
    "offsets",
    "sizes",
    "fqn",
    "offset",
    "relative_path",
    "length",
    "dtype",
    "num_layers",
)
ATTRIBUTES = ("__class__", "__setstate__", "__dict__", "__reduce__", "__init__", "path", "args", "joinpath", "shape")


def changed_bytes(data: bytes, draw: random.Random, other: bytes = b"") -> bytes:
    """`data` with one to eight places changed; `other` is a second seed, of which parts may be put in."""
    found = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 3, 5, 8))):
        at, size = draw.randint(0, len(found)), draw.choice((1, 1, 2, 4, 8, 32))
        match draw.randrange(7):
            case 0:
                found[at : at + 1] = bytes([draw.randrange(256)])
            case 1 if at < len(found):
                found[at] ^= 1 << draw.randrange(8)
            case 2:
                found[at:at] = draw.randbytes(size)
            case 3:
                del found[at : at + size]
            case 4:
                start = draw.randint(0, len(found))
                found[at:at] = found[start : start + size * 4]
            case 5:
                found[at : at + size] = draw.choice(LENGTHS).to_bytes(8, "little")[:size]
            case 6:
                start = draw.randint(0, len(other))
                found[at : at + draw.choice((0, size))] = other[start : start + size * 4]
    return bytes(found)


def changed_json(value: Any, draw: random.Random) -> str:
    """The text of `value` with one to four of its parts replaced, dropped, renamed, repeated or nested."""
    for _ in range(draw.choice((1, 1, 2, 4))):
        value = _changed_part(json.loads(json.dumps(value)), draw)  # a copy, in which no part stands twice
    text = json.dumps(value)
    if draw.random() < 0.1:  # a key twice
        text = text.replace('{"', '{"version": 1, "' if draw.random() < 0.5 else '{"": 1, "": 2, "', 1)
    if draw.random() < 0.02:
        text = text.replace(":", ":" + "[" * draw.choice((200, 5000, 100_000)), 1)
    return text


def _changed_part(value: Any, draw: random.Random) -> Any:
    if not isinstance(value, dict | list) or not value or draw.random() < 0.15:
        if isinstance(value, dict) and draw.random() < 0.5:
            return {**value, draw.choice(("x", "../x", "", "version", "__metadata__")): draw.choice(STRANGE)}
        return draw.choice(STRANGE)
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = draw.choice(keys)
    match draw.randrange(8):
        case 0:
            del value[key]
        case 1 if isinstance(value, dict):
            value[draw.choice(("../x", "/x", "", "A" * 300, draw.choice(keys)))] = value.pop(key)
        case 2:
            value[key] = value[draw.choice(keys)]
        case 3 if isinstance(value[key], int | float):
            value[key] = value[key] * draw.choice((-1, 2, 0.5, 10**9)) + draw.choice((0, 1, -1))
        case _:
            value[key] = _changed_part(value[key], draw)
    return value


def changed_object(value: Any, draw: random.Random, depth: int = 0) -> Any:
    """A tree of lists, dictionaries and objects with one of its parts, or one of their fields, replaced."""
    places: list[Any] = []
    if isinstance(value, dict):
        places = list(value)
    elif isinstance(value, list):
        places = list(range(len(value)))
    elif hasattr(value, "__dict__"):
        places = list(vars(value))
    if depth > 5 or not places or draw.random() < 0.05:
        return _strange_object(value, draw)
    place = draw.choice(places)
    inside = value if isinstance(value, dict | list) else vars(value)
    inside[place] = changed_object(inside[place], draw, depth + 1)
    return value


def _strange_object(value: Any, draw: random.Random) -> Any:
    if isinstance(value, torch.Size) and value and draw.random() < 0.7:
        numbers = list(value)
        numbers[draw.randrange(len(numbers))] = draw.choice((0, 1, -1, 3, 10**6, 2**40, 2**61))
        return torch.Size(numbers)
    if type(value) is int and draw.random() < 0.7:
        return draw.choice((value + 1, value - 1, -value, value * 1000, 0, 2**61))
    return draw.choice((*STRANGE[:20], torch.Size(), torch.Size([2**40] * 3), torch.int8, value))


def opcodes(draw: random.Random) -> bytes:
    """A pickle of one to sixty opcodes that mostly fit together."""
    return b"\x80\x04" + b"".join(_opcode(draw) for _ in range(draw.randint(1, 60))) + b"."


def said(draw: random.Random, depth: int = 0) -> bytes:
    """Opcodes that push one value: one that an unpickler takes, but for what it says."""
    if depth > 4 or draw.random() < 0.3:
        integer = b"J" + struct.pack("<i", draw.choice((-1, 0, 1, 3, 2**31 - 1)))
        leaves = (b"N", b"\x88", b"K\x03", integer, _text("cpu"), _text("storage"), _text("latin1"), b")", b"]", b"}")
        return draw.choice((*leaves, _name(draw)))
    inner = [said(draw, depth + 1) for _ in range(draw.randint(0, 4))]
    marked = b"(" + b"".join(inner)
    match draw.randrange(8):
        case 0:
            return b"]" + marked + b"e"
        case 1 | 2:
            return marked + b"t"
        case 3:
            return b"}(" + b"".join(_text(draw.choice(FIELDS)) + value for value in inner) + b"u"
        case 4:
            return said(draw, depth + 1) + b"Q" if draw.random() < 0.5 else b"\x8f" + marked + b"\x90"
        case 5:
            return _name(draw) + marked + b"t" + draw.choice((b"R", b"\x81"))
        case 6:
            return _name(draw) + b")\x81" + said(draw, depth + 1) + b"b"
        case _:
            return _name(draw) + marked + b"tR" + said(draw, depth + 1) + b"b"


def _name(draw: random.Random) -> bytes:
    module, name = draw.choice(NAMES[: -len(EVIL)] if draw.random() < 0.9 else NAMES)
    return _text(module) + _text(name) + pickle.STACK_GLOBAL


def _text(value: str) -> bytes:
    data = value.encode()
    return pickle.SHORT_BINUNICODE + bytes([len(data)]) + data


def _opcode(draw: random.Random) -> bytes:
    match draw.randrange(12):
        case 0 | 1:
            module, name = draw.choice(NAMES)
            if draw.random() < 0.3:
                return f"c{module}\n{name}\n".encode()
            return _text(module) + _text(name) + pickle.STACK_GLOBAL
        case 2:  # state (None, {attribute: a value}) for what lies below
            fields = pickle.EMPTY_DICT + _text(draw.choice(ATTRIBUTES)) + b"K\x07" + pickle.SETITEM
            return pickle.NONE + fields + pickle.TUPLE2 + pickle.BUILD
        case 3:
            return draw.choice((b"]", b"}", b"(", b")", b"\x8f", b"N", b"\x88", b"\x89"))
        case 4:
            return draw.choice((b"R", b"\x81", b"\x92", b"b", b"o", b"Q", b"\x82\x01", b"i" + b"os\nsystem\n"))
        case 5:
            return draw.choice((b"t", b"\x85", b"\x86", b"\x87", b"l", b"d", b"\x91"))
        case 6:
            return draw.choice((b"a", b"e", b"s", b"u", b"\x90", b"0", b"1", b"2", b"\x94", b"\x94"))
        case 7:
            return b"h" + bytes([draw.randrange(6)]) if draw.random() < 0.8 else b"j" + draw.randbytes(4)
        case 8:
            return b"K" + bytes([draw.randrange(256)]) if draw.random() < 0.7 else b"J" + draw.randbytes(4)
        case 9:
            return _text(draw.choice(("a", "torch.float32", "storage", "cpu", "latin1", "__class__")))
        case 10:
            code, width = draw.choice(((b"X", "<I"), (b"\x8d", "<Q"), (b"\x8e", "<Q"), (b"B", "<I"), (b"\x8b", "<I")))
            size = draw.choice(LENGTHS[:6]) if draw.random() < 0.7 else draw.choice(LENGTHS) % 2**32
            return code + struct.pack(width, size) + b"z" * min(size, 200)
        case _:
            return bytes([draw.randrange(256)])
