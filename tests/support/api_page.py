"""What docs/api.md shows: its run file, its examples and its program, and a folder in which they work."""

from __future__ import annotations

import re
from pathlib import Path

from flm_megatron.checkpoint.lazy.initial import InitialCheckpoint
from flm_megatron.checkpoint.manifest import Manifest
from flm_megatron.checkpoint.torch_dist.writer import copy_checkpoint
from flm_megatron.config.loader import load_run, run_to_dict
from tests.support import REPOSITORY

PAGE = REPOSITORY / "docs" / "api.md"
TRAINED = "runs/tiny/checkpoints/small/step_00000008"


def blocks(language: str) -> list[str]:
    """The page's blocks of code in a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), flags=re.M | re.S)


def program() -> str:
    """The page's program that trains."""
    return next(block for block in blocks("python") if "__main__" in block)


def write_run_file(folder: Path) -> Path:
    """The page's run file, in `folder`."""
    (file := folder / "run.yaml").write_text(blocks("yaml")[0])
    return file


def write_trained(folder: Path) -> Path:
    """A stand-in for the checkpoint that training the page's first stage makes; its values are never trained."""
    run = load_run(write_run_file(folder))
    manifest = {"stage": "small", "step": 8, "tokens": 1024, "samples": 32, "optimizer_step": 8}
    checkpoint = InitialCheckpoint(run.stages[0].model, 3, optimizer=True)
    copy_checkpoint(checkpoint, folder / TRAINED, Manifest.from_json({"run": run_to_dict(run), **manifest}))
    return folder / TRAINED
