"""Commands that take a checkpoint at a URL do what they do with one in a folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from flm_megatron.checkpoint.opening import open_checkpoint
from flm_megatron.training.resume.start import checkpoint_store
from tests.support import runs
from tests.support.object_store import ObjectStore

GROWN = ("--model.num_layers", "4")


def done(*arguments: str | Path | int) -> str:
    """What a command says, which ends with status 0."""
    result = runs.flm(*(str(argument) for argument in arguments))
    assert result.returncode == 0, (arguments, result.stderr)
    return result.stdout


def same(
    store: ObjectStore,
    folder: Path,
    name: str,
    command: Callable[[str, str], tuple[str, ...]],
    local: Path,
    url: str,
) -> None:
    """A command makes the same checkpoint of a folder in a folder, and of a URL at a URL."""
    there = store.url(name)
    done(*command(str(local), str(folder / name)))
    done(*command(url, there))
    hashes = [open_checkpoint(found).manifest.logical_hash for found in (there, folder / name)]
    assert hashes[0] is not None and hashes[0] == hashes[1]


@pytest.mark.slow
def test_commands_do_the_same_at_a_url_and_in_a_folder(object_store: ObjectStore, tmp_path: Path) -> None:
    data = runs.make_data(tmp_path)
    source, run = runs.make_run(data, tmp_path / "run")
    assert runs.flm("train", source).returncode == 0
    local = checkpoint_store(run).latest(["small"])
    assert local is not None
    url = object_store.url("copy")
    done("checkpoint", "reshard", local, url)

    for first, second in ((url, local), (local, url)):
        assert "none beyond" in done("checkpoint", "diff", first, second)
    done("checkpoint", "verify", url)
    generate = ("--prompt", "the", "--max-new-tokens", 4, "--temperature", 0, "--tokenizer", data / "tokenizer.model")
    assert done("generate", url, *generate) == done("generate", local, *generate)

    same(object_store, tmp_path, "grown", lambda found, out: ("grow", found, "--out", out, *GROWN), local, url)
    done("checkpoint", "export-hf", url, tmp_path / "hf", "--flavour", "llama")
    for path in (path for path in (tmp_path / "hf").iterdir() if path.is_file()):
        object_store.put(f"hf/{path.name}", path.read_bytes())
    imported = (tmp_path / "hf", object_store.url("hf"))
    same(object_store, tmp_path, "imported", lambda found, out: ("checkpoint", "import-hf", found, out), *imported)

    refused = runs.flm("checkpoint", "export-hf", url, object_store.url("out"), "--flavour", "llama")
    assert refused.returncode == 2 and "is a URL" in refused.stderr
    assert not object_store.open_uploads() and not [key for key in object_store.all_keys() if key.endswith(".writing")]
