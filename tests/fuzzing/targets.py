"""What is fuzzed: each target makes an input from seeds and reads it. The outcome has to be data or an FlmError."""

from __future__ import annotations

import argparse
import io
import json
import pathlib
import pickle
import random
import shutil
import struct
import zlib
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch

from flm_megatron.checkpoint.described import recorded_model
from flm_megatron.checkpoint.files import torch_file
from flm_megatron.checkpoint.files.manifest import read_manifest
from flm_megatron.checkpoint.files.pickle.reader import (
    Foreign,
    StoredTensor,
    load_pickle,
    load_records,
)
from flm_megatron.checkpoint.files.pickle.records import Name, Record
from flm_megatron.checkpoint.files.stored_array import StoredArray
from flm_megatron.checkpoint.hugging_face.reader import HuggingFaceCheckpoint
from flm_megatron.checkpoint.hugging_face.safetensors import arrays_in
from flm_megatron.checkpoint.lazy.initial import InitialCheckpoint
from flm_megatron.checkpoint.logical import Region, TensorInfo
from flm_megatron.checkpoint.manifest import Manifest, StagePosition
from flm_megatron.checkpoint.megatron_legacy.reader import MegatronLegacyCheckpoint
from flm_megatron.checkpoint.stage_manifest import manifest_model
from flm_megatron.checkpoint.torch_dist import shard_file, writer
from flm_megatron.checkpoint.torch_dist.metadata import parse_metadata
from flm_megatron.checkpoint.torch_dist.reader import TorchDistCheckpoint
from flm_megatron.checkpoint.torch_dist.writer import copy_checkpoint
from flm_megatron.model.parameters import parameter_specs
from tests.fuzzing.mutations import changed_bytes, changed_json, changed_object, opcodes, said
from tests.fuzzing.watch import Violation

CORPUS = Path(__file__).parent / "corpus"
DATA = (str, int, float, bool, bytes, type(None), torch.dtype, pathlib.PurePosixPath, torch.Tensor, StoredArray)
INERT = (Name, Record, Foreign, StoredTensor)


class Target(ABC):
    """Something that reads files. `folder` is where it finds what it reads, none for what reads bytes."""

    folder = ""
    weight = 1  # inputs in a turn

    @abstractmethod
    def input(self, draw: random.Random) -> bytes:
        """A new input."""

    @abstractmethod
    def read(self, data: bytes) -> None:
        """Read it. Raises FlmError for what is refused, Violation for a result that may not be."""

    def prepare(self, data: bytes) -> None:
        """Put the input where `read` finds it: nothing to do for what reads bytes."""
        return


class Pickles(Target):
    """Pickles of every kind, as bytes."""

    weight = 20

    def __init__(self) -> None:
        self.seeds = [path.read_bytes() for path in sorted(CORPUS.glob("*.pickle"))]

    def input(self, draw: random.Random) -> bytes:
        """Opcodes, or a real pickle with changed bytes."""
        if (kind := draw.random()) < 0.2:
            return opcodes(draw)
        if kind < 0.6:
            data = b"\x80\x04" + said(draw) + b"."
            return data if kind < 0.5 else changed_bytes(data, draw)
        return changed_bytes(draw.choice(self.seeds), draw, draw.choice(self.seeds))

    def read(self, data: bytes) -> None:
        """As records, as values and as metadata; the last two are one choice each, by the length."""
        check_data(load_records(data, "input"))
        if len(data) % 3 == 0:
            parse_metadata(data, "input")
        else:
            check_data(load_pickle(data, "input"))


def check_data(root: Any) -> None:
    """Raise Violation unless all of it is data and records."""
    waiting, seen = [root], set()
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if type(value) in (list, tuple, set, frozenset):
            waiting += value
        elif type(value) is dict:
            waiting += [*value, *value.values()]
        elif isinstance(value, INERT):
            waiting += [getattr(value, name, None) for name in ("args", "state", "items", "path")]
        elif type(value) is argparse.Namespace:
            waiting += vars(value).values()
        elif not isinstance(value, DATA) or isinstance(value, type):
            raise Violation(f"made a {type(value)}")


class FileTarget(Target):
    """One file of a folder that is otherwise whole."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.file = str(folder), folder / name
        self.seed = self.file.read_bytes()

    def input(self, draw: random.Random) -> bytes:
        """The file with changed bytes."""
        return changed_bytes(self.seed, draw, self.seed)

    def prepare(self, data: bytes) -> None:
        """Write it."""
        self.file.write_bytes(data)


class TorchFiles(FileTarget):
    """Files of torch.save."""

    def read(self, data: bytes) -> None:
        """Both ways."""
        check_data(torch_file.read_torch_file(self.file))
        check_data(torch_file.load_torch_file(self.file))


class Metadata(FileTarget):
    """`.metadata` in its folder, and the values that it leads to."""

    def input(self, draw: random.Random) -> bytes:
        """Bytes changed, or fields of what they say."""
        if draw.random() < 0.3:
            return super().input(draw)
        found = pickle.loads(self.seed)
        for _ in range(draw.choice((1, 1, 2, 5))):
            found = changed_object(found, draw)
        try:
            return pickle.dumps(found)
        except (AttributeError, RuntimeError, TypeError):  # what torch's own classes say to strange fields
            return super().input(draw)

    def read(self, data: bytes) -> None:
        """Open it and read the smallest tensor."""
        checkpoint = TorchDistCheckpoint(self.file.parent)
        name = min(checkpoint.tensors, key=lambda name: (len(checkpoint.tensors[name].shape), name), default=None)
        if name is not None and len(checkpoint.tensors[name].shape) == 1 and checkpoint.tensors[name].shape[0] < 10**6:
            checkpoint.read(name)


class TrainingStates(FileTarget):
    """Files of torch.save that are whole, with other fields in them than Megatron-LM writes."""

    def input(self, draw: random.Random) -> bytes:
        """Fields changed."""
        found = torch.load(io.BytesIO(self.seed), weights_only=False)
        for _ in range(draw.choice((1, 1, 2, 5))):
            found = changed_object(found, draw)
        buffer = io.BytesIO()
        torch.save(found, buffer)
        return buffer.getvalue()


class CommonStates(TrainingStates):
    """`common.pt` beside Megatron-LM's `torch_dist` files."""

    def read(self, data: bytes) -> None:
        """What it says of position and model."""
        recorded_model(TorchDistCheckpoint(self.file.parent), 331)


class Ranks(TrainingStates):
    """The file of a rank in Megatron-LM's legacy layout."""

    def read(self, data: bytes) -> None:
        """Open the folder and read a norm."""
        MegatronLegacyCheckpoint(self.file.parents[1], 331).read("decoder.final_layernorm.weight")


class JsonTarget(FileTarget):
    """A JSON file, changed by its structure or by its bytes."""

    def input(self, draw: random.Random) -> bytes:
        """One in four by its bytes."""
        if draw.random() < 0.25:
            return super().input(draw)
        return changed_json(json.loads(self.seed), draw).encode("utf-8", "surrogatepass")


class Manifests(JsonTarget):
    """`manifest.json`, its checksum made right in most of them."""

    def input(self, draw: random.Random) -> bytes:
        """As of JSON, then a checksum that is right if it still can be."""
        data = super().input(draw)
        try:
            value = json.loads(data.decode("utf-8"))
            rest = {key: part for key, part in value.items() if key != "crc32"}
        except (ValueError, AttributeError, RecursionError):
            return data
        text = json.dumps(rest, sort_keys=True)
        return json.dumps({**rest, "crc32": f"{zlib.crc32(text.encode()):08x}"}).encode()

    def read(self, data: bytes) -> None:
        """The manifest and the model in it."""
        manifest = read_manifest(self.file.parent)
        model = manifest_model(manifest or Manifest())
        if model is not None:
            parameter_specs(model)


class Formats(JsonTarget):
    """`metadata.json`."""

    def read(self, data: bytes) -> None:
        """Open the folder."""
        TorchDistCheckpoint(self.file.parent)


class HuggingFace(JsonTarget):
    """`config.json` or the index of a Hugging Face folder."""

    def read(self, data: bytes) -> None:
        """Open the folder and read a norm."""
        HuggingFaceCheckpoint(self.file.parent).read("decoder.final_layernorm.weight")


class SafetensorsHeaders(FileTarget):
    """The header of a safetensors file, by structure or bytes, its length made right in most of them."""

    def input(self, draw: random.Random) -> bytes:
        """Header and values."""
        (length,) = struct.unpack("<Q", self.seed[:8])
        header, values = self.seed[8 : 8 + length], self.seed[8 + length :]
        if draw.random() < 0.7:
            header = changed_json(json.loads(header), draw).encode("utf-8", "surrogatepass")
        else:
            header = changed_bytes(header, draw, header)
        size = len(header) if draw.random() < 0.9 else draw.choice((0, 7, 2**63, 10**8, len(header) + 1))
        return struct.pack("<Q", size) + header + values[: draw.choice((len(values), len(values), 5))]

    def read(self, data: bytes) -> None:
        """The header, and a value of each tensor that it gives."""
        for array in arrays_in(self.file).values():
            if array.nbytes < 10**6:
                array.read()


def all_targets(folder: Path) -> dict[str, Target]:
    """Every target; `folder` is empty and holds the files that they read."""
    from tests.support.checkpoint_cases import MODEL, flm_checkpoint, write_small

    write_small(folder / "ours")
    copy_checkpoint(
        InitialCheckpoint(MODEL, 1), folder / "foreign", Manifest(position=StagePosition(1))
    )  # few regions, so that opening it is fast
    for name in ("manifest.json", "common.pt"):
        (folder / "foreign" / name).unlink()
    assert flm_checkpoint("export-hf", folder / "ours", folder / "hf", "--shard-size", "100KB") == 0
    copies = {name: shutil.copytree(folder / "hf", folder / name) for name in ("config", "index", "safetensors")}
    copies |= {name: shutil.copytree(folder / "foreign", folder / name) for name in ("metadata", "format")}
    shard = sorted(copies["safetensors"].glob("*.safetensors"))[0].name
    torch.save(training_state(), folder / "state.pt")
    assert flm_checkpoint("reshard", folder / "ours", folder / "classic", "--format", "classic", "--tensor", 1) == 0
    rank = next((folder / "classic").rglob("*.pt"))
    copies["common"] = shutil.copytree(folder / "foreign", folder / "common")
    arguments = torch.load(rank, weights_only=False)["args"]
    torch.save({"iteration": 5, "args": arguments, **optimizer_state()}, copies["common"] / "common.pt")
    return {
        "pickle": Pickles(),
        "torch file": TorchFiles(folder, "state.pt"),
        ".metadata": Metadata(copies["metadata"], ".metadata"),
        "common.pt": CommonStates(copies["common"], "common.pt"),
        "mp_rank file": Ranks(folder, str(rank.relative_to(folder))),
        "metadata.json": Formats(copies["format"], "metadata.json"),
        "manifest.json": Manifests(folder / "ours", "manifest.json"),
        "config.json": HuggingFace(copies["config"], "config.json"),
        "index.json": HuggingFace(copies["index"], "model.safetensors.index.json"),
        "safetensors header": SafetensorsHeaders(copies["safetensors"], shard),
    }


def training_state() -> dict[str, Any]:
    """What Megatron-LM saves beside weights, in small."""
    return {
        "iteration": 5,
        "args": argparse.Namespace(num_layers=2, params_dtype=torch.bfloat16, save=pathlib.PurePosixPath("/x")),
        "model": {"weight": torch.arange(6.0).reshape(2, 3), "view": torch.arange(4).bfloat16()},
        **optimizer_state(),
    }


def optimizer_state() -> dict[str, Any]:
    """The parameter groups among it."""
    return {"optimizer": {"param_groups": [{"step": 3, "lr": 1e-3, "betas": (0.9, 0.95)}]}}


def write_corpus() -> None:
    """Make the seeds: run once, the files are kept."""
    CORPUS.mkdir(exist_ok=True)
    state = training_state()
    del state["model"]
    for protocol in (2, 5):
        (CORPUS / f"state_{protocol}.pickle").write_bytes(pickle.dumps(state, protocol))
    plain = {"a": [1, -1, 2**70, 1.5, None, True], ("t", 1): {1, 2}, b"b": frozenset({"x"}), "o": bytearray(b"z")}
    (CORPUS / "plain.pickle").write_bytes(pickle.dumps(plain, 4))
    regions = [Region((0, 0), (2, 3)), Region((2, 0), (2, 3))]
    records = [shard_file.Record("weight", region, "__0_0.distcp", 100 * i, 90) for i, region in enumerate(regions)]
    metadata = writer._metadata({"weight": TensorInfo((4, 3), torch.bfloat16)}, records)
    (CORPUS / "metadata.pickle").write_bytes(pickle.dumps(metadata))
