"""Pickles that attack: whatever they say, what comes back is data, soon, and nothing in the program has changed."""

from __future__ import annotations

import argparse
import collections
import importlib
import pathlib
import pickle
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from flm_megatron.checkpoint.files.pickle.reader import CLASSES, load_pickle, load_records
from flm_megatron.checkpoint.files.pickle.records import Name, Record
from flm_megatron.checkpoint.files.torch_file import load_torch_file
from flm_megatron.checkpoint.manifest import StagePosition
from flm_megatron.checkpoint.opening import open_checkpoint
from flm_megatron.checkpoint.torch_dist.metadata import parse_metadata
from flm_megatron.errors import DamagedError
from tests.support.checkpoint_cases import as_foreign, write_small

NAMES = [(module, name) for module, names in CLASSES.items() for name in names]
PROTOCOL = b"\x80\x04"


def text(value: str) -> bytes:
    """Opcode that pushes a text."""
    data = value.encode()
    return pickle.SHORT_BINUNICODE + bytes([len(data)]) + data


def named(module: str, name: str) -> bytes:
    """Opcodes that push a global."""
    return text(module) + text(name) + pickle.STACK_GLOBAL


def slot_state(attribute: str) -> bytes:
    """Opcodes that set an attribute of what lies on the stack: BUILD with state (None, {attribute: "owned"})."""
    fields = pickle.EMPTY_DICT + text(attribute) + text("owned") + pickle.SETITEM
    return pickle.NONE + fields + pickle.TUPLE2 + pickle.BUILD


@pytest.mark.parametrize(("module", "name"), NAMES, ids=[".".join(name) for name in NAMES])
def test_attributes_of_a_named_class_cannot_be_set(module: str, name: str) -> None:
    data = PROTOCOL + named(module, name) + slot_state("owned_by_test") + pickle.STOP
    with pytest.raises(DamagedError, match="gives a state to something that has none"):
        load_pickle(data, "x")
    try:
        real = getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError:  # pathlib._local, of newer Pythons
        return
    assert not hasattr(real, "owned_by_test")


def test_the_attack_is_one_on_pythons_own_unpickler() -> None:
    """The same bytes set an attribute of a real class there, so the test above shows something."""

    class Victim(argparse.Namespace):
        pass

    globals()["Victim"] = Victim
    try:
        pickle.loads(PROTOCOL + named(__name__, "Victim") + slot_state("owned_by_test") + pickle.STOP)
    finally:
        del globals()["Victim"]
    assert Victim.owned_by_test == "owned"  # type: ignore[attr-defined]


@pytest.mark.parametrize("make", [pickle.EMPTY_TUPLE + pickle.REDUCE, pickle.EMPTY_TUPLE + pickle.NEWOBJ])
@pytest.mark.parametrize(("module", "name"), NAMES, ids=[".".join(name) for name in NAMES])
def test_what_is_named_and_made_is_a_record(module: str, name: str, make: bytes) -> None:
    said = load_records(PROTOCOL + named(module, name) + make + slot_state("__class__") + pickle.STOP, "x")
    assert type(said) is Record and type(said).__class__ is type
    assert type(load_records(PROTOCOL + named(module, name) + pickle.STOP, "x")) is Name


def doubling(pair: bytes, times: int) -> bytes:
    """Opcodes for an object that holds one twice that holds one twice that ..."""
    return pickle.NONE + (pickle.MEMOIZE + pickle.DUP + pair) * times


def lists(times: int) -> bytes:
    """The same of lists: [x, x] of the top of the stack."""
    step = b"".join(
        pickle.MEMOIZE + pickle.POP + pickle.EMPTY_LIST + pickle.MARK + get(n) + get(n) + pickle.APPENDS
        for n in range(times)
    )
    return pickle.NONE + step


def get(number: int) -> bytes:
    return pickle.LONG_BINGET + struct.pack("<I", number)


def length8(value: int) -> bytes:
    return struct.pack("<Q", value)


REFUSED: dict[str, bytes] = {
    "a key that takes 2^60 steps to hash": pickle.EMPTY_DICT + doubling(pickle.TUPLE2, 60) + b"K\1" + pickle.SETITEM,
    "an element of a set that does": pickle.EMPTY_SET + pickle.MARK + doubling(pickle.TUPLE2, 60) + pickle.ADDITEMS,
    "a frozen set of it": pickle.MARK + doubling(pickle.TUPLE2, 60) + pickle.FROZENSET,
    "a memo of 2^31 places": pickle.NONE + pickle.LONG_BINPUT + b"\xff\xff\xff\x7f",
    "a text of 2^60 bytes": pickle.BINUNICODE8 + length8(2**60),
    "bytes of 2^62": pickle.BINBYTES8 + length8(2**62),
    "an array of 2^40 bytes": pickle.BYTEARRAY8 + length8(2**40),
    "an integer of a million bytes": pickle.LONG4 + struct.pack("<i", 10**6) + b"\x11" * 10**6,
    "an integer of negative length": pickle.LONG4 + b"\xff\xff\xff\xff",
    "a million brackets": pickle.EMPTY_LIST * 10**6 + pickle.APPEND * (10**6 - 1),
    "a million tuples": pickle.NONE + pickle.TUPLE1 * 10**6,
    "a list in itself": pickle.EMPTY_LIST + pickle.MEMOIZE + get(0) + pickle.APPEND,
    "an object in its own state": named("argparse", "Namespace") + b")\x81" + pickle.MEMOIZE + get(2) + pickle.BUILD,
    "an extension": pickle.EXT1 + b"\1",
    "a persistent id in text": b"Pevil\n",
    "a global of protocol 0": b"ios\nsystem\n",
    "something called that is data": text("x") + pickle.EMPTY_TUPLE + pickle.REDUCE,
    "a class made by a class": named("torch", "Size") + named("torch", "Size") + pickle.TUPLE1 + pickle.NEWOBJ + b")R",
    "nothing": b"",
    "too much": pickle.NONE + pickle.NONE,
    "a mark too few": pickle.NONE + pickle.TUPLE,
    "keys without values": pickle.EMPTY_DICT + pickle.MARK + pickle.NONE + pickle.SETITEMS,
    "a path of very much text": lists(60) + named("pathlib", "PosixPath") + get(59) + pickle.TUPLE1 + b"R",
    "a dotted name": named("megatron.core", "enums.os.system"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bombs_and_nonsense_are_damage_and_soon(case: str) -> None:
    began = time.monotonic()
    with pytest.raises(DamagedError, match="x: "):
        load_pickle(PROTOCOL + REFUSED[case] + pickle.STOP, "x")
    assert time.monotonic() - began < 3


def test_parts_that_are_shared_are_read_once() -> None:
    """2^90 elements, said in 180 opcodes."""
    began = time.monotonic()
    deep = load_pickle(PROTOCOL + lists(90) + pickle.STOP, "x")
    assert deep[0] is deep[1] and time.monotonic() - began < 1


def test_a_training_state_of_shared_parts_is_looked_through_once(tmp_path: Path) -> None:
    parts: list[Any] = []
    for _ in range(60):
        parts = [parts, parts]
    write_small(tmp_path / "a")
    as_foreign(tmp_path / "a")
    torch.save({"optimizer": parts, "iteration": 3}, tmp_path / "a" / "common.pt")
    began = time.monotonic()
    assert open_checkpoint(tmp_path / "a").manifest.position == StagePosition(3)
    assert time.monotonic() - began < 5


KEYS = st.text() | st.integers(-(2**63), 2**63) | st.tuples(st.text(), st.booleans())
SETS = st.sets(KEYS) | st.frozensets(st.binary()) | st.dictionaries(KEYS, st.floats()).map(collections.OrderedDict)
PLAIN = st.recursive(
    SETS | st.none() | st.booleans() | st.integers(-(2**200), 2**200) | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner) | st.tuples(inner),
    max_leaves=20,
)


@given(PLAIN, st.integers(2, 5))
@settings(max_examples=300, deadline=None)
def test_plain_data_is_read_as_python_reads_it(value: Any, protocol: int) -> None:
    data = pickle.dumps(value, protocol)
    assert repr(plain(load_pickle(data, "x"))) == repr(plain(pickle.loads(data)))


def plain(value: Any) -> Any:
    """`value` with sets in order and dictionaries of one kind, so that equal ones have one `repr`."""
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, set | frozenset):
        return type(value).__name__, sorted(map(repr, value))
    return type(value)(map(plain, value)) if isinstance(value, list | tuple) else value


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("small") / "a"
    write_small(path)
    yield path


def test_metadata_says_what_torch_reads_in_it(small: Path) -> None:
    ours = parse_metadata((small / ".metadata").read_bytes(), "x")
    theirs = FileSystemReader(small).read_metadata()
    assert ours.entries.keys() == theirs.state_dict_metadata.keys()
    for name, entry in theirs.state_dict_metadata.items():
        found = ours.entries[name]
        assert isinstance(entry, TensorStorageMetadata)
        assert (found.size, found.dtype) == (tuple(entry.size), entry.properties.dtype)
        assert found.chunks == tuple((tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in entry.chunks)
    for index, info in theirs.storage_data.items():
        place = ours.places[index.fqn, tuple(index.offset)]
        assert place == (info.relative_path, info.offset, info.length, False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: setattr(entry(m), "size", [3, 4]), "sizes were expected"),
        (lambda m: setattr(entry(m).chunks[0], "sizes", torch.Size([2**61, 2**61])), "in a tensor of"),
        (lambda m: setattr(entry(m).chunks[0], "offsets", torch.Size([-1, 0])), "no counts"),
        (lambda m: setattr(entry(m).chunks[0], "offsets", torch.Size([0])), "dimensions"),
        (lambda m: setattr(entry(m).chunks[0], "offsets", None), "sizes were expected"),
        (lambda m: setattr(entry(m), "properties", None), "without a dtype"),
        (lambda m: setattr(entry(m), "chunks", {}), "without chunks"),
        (lambda m: setattr(place(m), "offset", -5), "no count"),
        (lambda m: setattr(place(m), "length", "9"), "a count was expected"),
        (lambda m: setattr(place(m), "relative_path", "/etc/passwd"), "outside of the folder"),
        (lambda m: setattr(place(m), "relative_path", "a\0b"), "outside of the folder"),
        (lambda m: setattr(place(m), "relative_path", ".."), "outside of the folder"),
        (lambda m: setattr(place(m), "relative_path", 7), "a name was expected"),
        (lambda m: setattr(m, "state_dict_metadata", []), "no tables"),
        (lambda m: m.state_dict_metadata.update({5: 5}), "a name was expected"),
        (lambda m: m.storage_data.update({"x": "y"}), "MetadataIndex was expected"),
    ],
)
def test_metadata_of_other_types_and_places_is_damage(small: Path, change: Any, message: str) -> None:
    metadata = pickle.loads((small / ".metadata").read_bytes())
    change(metadata)
    with pytest.raises(DamagedError, match=message):
        parse_metadata(pickle.dumps(metadata), "x")


def entry(metadata: Any) -> Any:
    return metadata.state_dict_metadata["output_layer.weight"]


def place(metadata: Any) -> Any:
    return next(iter(metadata.storage_data.values()))


def test_tensors_at_impossible_places_are_damage(tmp_path: Path) -> None:
    class Evil:
        def __init__(self, size: Any, stride: Any, offset: Any = 0) -> None:
            self.call = torch.ones(4).untyped_storage(), offset, size, stride

        def __reduce__(self) -> Any:
            storage, *rest = self.call
            typed = torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.float32, _internal=True)
            return torch._utils._rebuild_tensor_v2, (typed, *rest, False, collections.OrderedDict())

    for size, stride, offset in (((10**9,), (1,), 0), ((4,), (1,), 1), ((-1,), (1,), 0), ((2,), (2**61,), 0)):
        torch.save({"x": Evil(size, stride, offset)}, tmp_path / "x.pt")
        with pytest.raises(DamagedError, match=r"x\.pt"):
            load_torch_file(tmp_path / "x.pt")


def test_a_path_is_made_of_text_alone() -> None:
    assert load_pickle(pickle.dumps(pathlib.PurePosixPath("/a/b")), "x") == pathlib.PurePosixPath("/a/b")
