"""Nothing that a checkpoint's pickles name is ever run."""

from __future__ import annotations

import argparse
import io
import os
import pickle
import shutil
import signal
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from flm_megatron.checkpoint.files import torch_file
from flm_megatron.checkpoint.files.manifest import MANIFEST
from flm_megatron.checkpoint.files.pickle.reader import Foreign, load_pickle
from flm_megatron.checkpoint.files.torch_file import load_torch_file
from flm_megatron.checkpoint.lazy.initial import InitialCheckpoint
from flm_megatron.checkpoint.manifest import Manifest, StagePosition
from flm_megatron.checkpoint.opening import open_checkpoint
from flm_megatron.checkpoint.torch_dist.logical_hash import tensor_hashes
from flm_megatron.checkpoint.torch_dist.writer import copy_checkpoint
from flm_megatron.config.schema import ModelConfig
from flm_megatron.errors import DamagedError
from tests.support.checkpoint_cases import as_foreign

MODEL = ModelConfig(num_layers=2, hidden_size=16, ffn_hidden_size=24, num_attention_heads=2, vocab_size=50)


class Payload:
    """Pickles as a call of `function`, which makes a file if it runs."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def payloads(trap: Path) -> list[Payload]:
    return [
        Payload(os.system, f"touch {trap}"),
        Payload(eval, f"open({str(trap)!r}, 'w')"),
        Payload(getattr(torch.serialization, "load"), str(trap)),  # noqa: B009
        Payload(io.open, str(trap), "w"),
    ]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    copy_checkpoint(InitialCheckpoint(MODEL, 1), tmp_path / "a", Manifest(position=StagePosition(1)))
    (tmp_path / "a" / MANIFEST).unlink()  # so that common.pt is read as well
    return tmp_path / "a"


@pytest.mark.parametrize("which", range(4))
def test_payload_in_metadata(checkpoint: Path, tmp_path: Path, which: int) -> None:
    trap = tmp_path / "trap"
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    metadata.planner_data = {"x": payloads(trap)[which]}
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(DamagedError, match=r"\.metadata: names .*not loaded"):
        open_checkpoint(checkpoint)
    assert not trap.exists()


@pytest.mark.parametrize("which", range(4))
def test_payload_in_common_state(checkpoint: Path, tmp_path: Path, which: int) -> None:
    trap = tmp_path / "trap"
    torch.save({"iteration": 5, "x": payloads(trap)[which]}, checkpoint / "common.pt")
    with pytest.raises(DamagedError, match=r"common\.pt: names .*not loaded"):
        open_checkpoint(checkpoint)
    assert not trap.exists()


def test_payload_in_a_byte_entry(tmp_path: Path) -> None:
    """Byte entries are never read; torch's own loader runs this one (so the trap is a real one)."""
    trap = tmp_path / "trap"
    state = {"weight": torch.arange(6.0), "extra": Payload(os.system, f"touch {trap}")}
    dcp.save(state, checkpoint_id=str(tmp_path / "a"), no_dist=True)
    checkpoint = open_checkpoint(tmp_path / "a")
    assert set(checkpoint.tensors) == {"weight"} and torch.equal(checkpoint.read("weight"), torch.arange(6.0))
    tensor_hashes(checkpoint)
    assert not trap.exists()
    dcp.load({"extra": None}, checkpoint_id=str(tmp_path / "a"), no_dist=True)
    assert trap.exists()


def test_payload_in_a_tensor_record(checkpoint: Path, tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    name = "decoder.final_layernorm.weight"
    info = next(info for index, info in metadata.storage_data.items() if index.fqn == name)
    buffer = io.BytesIO()
    torch.save(Payload(os.system, f"touch {trap}"), buffer)
    (checkpoint / "evil.distcp").write_bytes(buffer.getvalue())
    info.relative_path, info.offset, info.length = "evil.distcp", 0, len(buffer.getvalue())
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    as_foreign(checkpoint)
    with pytest.raises(DamagedError, match=r"evil\.distcp.*system"):
        open_checkpoint(checkpoint).read(name)
    assert not trap.exists()


def test_files_outside_of_the_folder_are_not_opened(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copy(checkpoint / "__0_0.distcp", tmp_path / "outside")
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = "../outside"
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    as_foreign(checkpoint)
    with pytest.raises(DamagedError, match="outside of the folder"):
        open_checkpoint(checkpoint)


def test_plain_state_is_read_as_torch_reads_it(tmp_path: Path) -> None:
    tensor = torch.randn(4, 5).bfloat16()
    state: dict[str, Any] = {
        "a": [1, 2.5, "x", None, (True, b"raw")],
        "args": argparse.Namespace(hidden_size=64, params_dtype=torch.bfloat16),
        "tensor": tensor,
        "view": tensor[1:3, 2:4],
        "parameter": torch.nn.Parameter(torch.ones(3)),
        "size": torch.Size([3, 4]),
        "where": Path("/somewhere"),
        "signal": signal.SIGTERM,
    }
    torch.save(state, tmp_path / "x.pt")
    read = load_torch_file(tmp_path / "x.pt")
    assert read["a"] == state["a"] and read["args"] == state["args"] and read["size"] == tuple(state["size"])
    assert all(torch.equal(read[key], state[key]) for key in ("tensor", "view", "parameter"))
    assert str(read["where"]) == "/somewhere"
    assert isinstance(read["signal"], Foreign) and read["signal"].args == (15,)


def test_classes_of_megatron_become_inert_records() -> None:
    class_of_megatron = (
        b"\x80\x02cmegatron.core.enums\nNoSuchThing\nX\x01\x00\x00\x00a\x85R}X\x01\x00\x00\x00k\x4b\x01sb."
    )
    record = load_pickle(class_of_megatron, "x")
    assert record.args == ("a",) and record.state == {"k": 1}
    with pytest.raises(DamagedError, match=r"x: names megatron\.core\.enums\.os\.system"):
        load_pickle(b"\x80\x04\x8c\x13megatron.core.enums\x8c\x09os.system\x93.", "x")


@pytest.mark.parametrize("data", [b"", b"nonsense", b"\x80\x02]q\x00K", pickle.dumps(object)])
def test_broken_pickles(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(DamagedError, match=str(tmp_path / "x")):
        load_pickle(data, str(tmp_path / "x"))
    with pytest.raises(DamagedError, match=r"torch\.save"):
        load_torch_file(tmp_path / "x")


def test_a_missing_pickle(tmp_path: Path) -> None:
    with pytest.raises(DamagedError, match="x is missing"):
        load_torch_file(tmp_path / "x")


def test_tensors_of_one_storage_share_it(tmp_path: Path) -> None:
    """A file of a few kilobytes may name one large storage very often."""
    whole = torch.arange(1000)
    torch.save([whole, *(whole[i:] for i in range(100))], tmp_path / "x.pt")
    first, *checkpoints = load_torch_file(tmp_path / "x.pt")
    first[999] = -1
    assert all(checkpoint[-1] == -1 for checkpoint in checkpoints)


@pytest.mark.parametrize("size", [1000, 10**9])
def test_an_archive_that_announces_more_than_it_has_is_damage(size: int, tmp_path: Path) -> None:
    """zipfile raises an EOFError for some of these."""
    path = tmp_path / "x.pt"
    torch.save({"step": 1}, path)
    data = bytearray(path.read_bytes())
    entry = data.index(b"PK\1\2", data.index(b"data.pkl"))
    data[entry + 20 : entry + 28] = 2 * struct.pack("<I", size)
    path.write_bytes(data)
    for read in (load_torch_file, torch_file.read_torch_file):
        with pytest.raises(DamagedError, match=r"x\.pt"):
            read(path)
