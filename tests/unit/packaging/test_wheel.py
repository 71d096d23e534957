"""The wheel, made as `python -m build` makes it: a source archive, and a wheel of that; used away from the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from email import message_from_string
from pathlib import Path

import pytest

import flm_megatron
from tests.fixtures import CHECKPOINT_V1, copy_of

ROOT = Path(__file__).parents[3]
SOURCES = ("flm_megatron", "pyproject.toml", "setup.py", "README.md", "LICENSE")
RUN_OF_WHEEL = """
import sys
from flm_megatron.cli.main import main
status = main(sys.argv[1:])
files = [module.__file__ for name, module in sys.modules.items() if name.split(".")[0] == "flm_megatron"]
assert files and all(file.startswith({target!r}) for file in files), files
sys.exit(status)
"""


@dataclass(frozen=True)
class Installed:
    """The wheel, what it was unpacked to, and a folder to work in."""

    wheel: Path
    target: Path
    folder: Path

    def run(self, *arguments: str | Path) -> str:
        """What `flm` prints, run from the wheel's files; a module from anywhere else fails it."""
        code = RUN_OF_WHEEL.format(target=f"{self.target}{os.sep}")
        return self.python("-c", code, *arguments)

    def python(self, *arguments: str | Path) -> str:
        """What Python prints that finds the wheel's files first, and away from the checkout."""
        environment = os.environ | {"PYTHONPATH": str(self.target)}
        command = [sys.executable, *map(str, arguments)]
        done = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """The wheel of this checkout in a folder of its own; what it was made of is gone."""
    folder = tmp_path_factory.mktemp("wheel")
    source = _copied_sources(folder / "checkout")
    _build("sdist", source, folder)
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    _build("wheel", next((folder / "unpacked").iterdir()), folder)
    shutil.rmtree(source)
    shutil.rmtree(folder / "unpacked")
    wheel = next(folder.glob("*.whl"))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    subprocess.run([*pip, "--target", folder / "site", wheel], cwd=folder, check=True)
    return Installed(wheel, folder / "site", folder)


def _copied_sources(folder: Path) -> Path:
    """What a wheel is made of, so that nothing is written into the checkout."""
    folder.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


def _build(kind: str, source: Path, out: Path) -> None:
    """Call the build backend as `python -m build --no-isolation` does; needs no network."""
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(out)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)


def test_wheel_holds_every_file_of_the_package(installed: Installed) -> None:
    package = ROOT / "flm_megatron"
    here = {f"flm_megatron/{file.relative_to(package)}" for file in package.rglob("*") if file.is_file()}
    with zipfile.ZipFile(installed.wheel) as archive:
        inside = {name for name in archive.namelist() if not name.split("/")[0].endswith(".dist-info")}
    assert inside == {name for name in here if "__pycache__" not in name}
    assert "flm_megatron/py.typed" in inside


def test_metadata_says_what_the_project_needs(installed: Installed) -> None:
    with zipfile.ZipFile(installed.wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = message_from_string(archive.read(name).decode())
    assert metadata["Version"] == flm_megatron.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    required = [line for line in metadata.get_all("Requires-Dist") or [] if "extra ==" not in line]
    assert any(line.startswith("megatron-core") and ">=0.16.1" in line for line in required)
    assert "torch>=2.6" in required
    assert set(metadata.get_all("Provides-Extra") or []) == {
        *("te", "screen", "eval", "data", "storage", "trackers", "docs", "dev")
    }


def test_script_starts(installed: Installed) -> None:
    said = installed.python(installed.target / "bin" / "flm", "--version")
    assert said == f"flm_megatron {flm_megatron.__version__}\n"


def test_presets_and_templates_are_found(installed: Installed) -> None:
    run_file = ROOT / "examples" / "tele-flm-52b.yaml"
    assert "num_layers: 64" in installed.run("config", run_file)
    for launcher, word in (("slurm", "#SBATCH"), ("torchrun", "torchrun"), ("kubernetes", "kind: TrainJob")):
        assert word in installed.run("launch", run_file, "--on", launcher, "--nodes", "2", "--dry-run")


def test_report_has_its_style_and_its_script(installed: Installed) -> None:
    fixture = copy_of(CHECKPOINT_V1, installed.folder / "reported")
    installed.run("report", fixture / "output", "--out", installed.folder / "page.html")
    page = (installed.folder / "page.html").read_text()
    for name in ("page.css", "charts.js", "uplot.min.js", "uplot.min.css"):
        assert (ROOT / "flm_megatron" / "evaluation" / "report" / "assets" / name).read_text().strip() in page


def test_export_takes_the_released_code_along(installed: Installed) -> None:
    fixture = copy_of(CHECKPOINT_V1, installed.folder / "exported")
    checkpoint = fixture / "output" / "checkpoints" / "small" / "step_00000004"
    out = installed.folder / "hf"
    installed.run("checkpoint", "export-hf", checkpoint, out, "--tokenizer", fixture / "tokenizer.model")
    released = ROOT / "flm_megatron" / "checkpoint" / "hugging_face" / "released_form"
    for name in ("configuration_teleflm.py", "modeling_teleflm.py"):
        assert (out / name).read_bytes() == (released / name).read_bytes()
