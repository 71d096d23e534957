"""What functions return and write is what their commands print and write; what these refuse, so do they."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import flm_megatron as flm
from flm_megatron.checkpoint.files.manifest import manifest_text
from flm_megatron.checkpoint.manifest import Manifest
from flm_megatron.cli.main import main
from flm_megatron.config.loader import run_to_dict
from tests.support.api_page import TRAINED, write_trained
from tests.support.checkpoint_cases import flip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run file and a checkpoint of its first stage; tests write beside them, under names of their own."""
    write_trained(folder := tmp_path_factory.mktemp("api"))
    return folder


@pytest.fixture
def tiny(made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same as the working folder."""
    monkeypatch.chdir(made)
    return made


def files(folder: str) -> dict[str, bytes]:
    """All files below a folder, but for a manifest's time of writing."""
    found = {str(file.relative_to(folder)): file.read_bytes() for file in Path(folder).rglob("*") if file.is_file()}
    return {name: data for name, data in found.items() if name != "manifest.json"}


def manifest(folder: str) -> dict[str, object]:
    """What a checkpoint says of itself, but for when it was written."""
    return json.loads((Path(folder) / "manifest.json").read_text())


def test_grow_writes_what_the_command_writes(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grown = flm.grow(TRAINED, flm.load_run("run.yaml"), "large", "grown")
    assert main(["grow", TRAINED, "run.yaml", "--stage", "large", "--out", "grown-cli"]) == 0
    assert files("grown") == files("grown-cli") and manifest("grown") == manifest("grown-cli")
    assert grown.logical_hash in capsys.readouterr().out
    assert grown.certificate is None and [layer.source for layer in grown.plan.layer_sources] == [0, 1, 1]


def test_grow_takes_distances_as_numbers_or_as_the_file_of_the_command(tiny: Path) -> None:
    run = flm.load_run("run.yaml", {"stages.large.growth.layer_selection": "distance"})
    Path("distances.json").write_text(json.dumps([{"cosine": 0.1, "l2": 1.0}, {"cosine": 0.5, "l2": 2.0}]))
    numbers = flm.grow(flm.open_checkpoint(TRAINED), run, "large", "by-numbers", distances=[0.1, 0.5])
    read = flm.grow(TRAINED, run, "large", Path("by-file"), distances="distances.json")
    assert numbers.plan == read.plan and numbers.logical_hash == read.logical_hash
    with pytest.raises(flm.RequestError, match="distances has 3 numbers: give one for each of the 2 layers"):
        flm.grow(TRAINED, run, "large", "refused", distances=[0.1, 0.2, 0.3])
    left_out = flm.load_run("run.yaml", {"stages.large.growth.layer_selection": None})
    with pytest.raises(flm.RequestError, match=r"layer_selection of stage 'large' is `stack`: set it to distance"):
        flm.grow(TRAINED, left_out, "large", "refused", distances=[0.1, 0.5])
    shutil.copytree(TRAINED, "earlier")  # a run of a version that chose by distance if nothing was given
    saved = manifest(TRAINED) | {"run": run_to_dict(run)}
    Path("earlier/manifest.json").write_text(manifest_text(Manifest.from_json(saved)))
    earlier = flm.grow("earlier", left_out, "large", "as-the-run", distances=[0.1, 0.5])
    assert earlier.plan.layer_sources == numbers.plan.layer_sources


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, []),
        ({"flavour": "llama", "dtype": "bf16"}, ["--flavour", "llama", "--dtype", "bf16"]),
        ({"shard_size": 20_000, "pad_vocab_to": 128}, ["--shard-size", "20KB", "--pad-vocab-to", "128"]),
    ],
)
def test_export_writes_what_the_command_writes(
    tiny: Path, options: dict[str, object], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    ours, theirs = f"hf{len(words)}{'-'.join(words[-1:])}", f"cli{len(words)}{'-'.join(words[-1:])}"
    written = flm.export_hf(TRAINED, ours, **options)  # type: ignore[arg-type]
    assert main(["checkpoint", "export-hf", TRAINED, theirs, *words]) == 0
    assert files(ours) == files(theirs) != {}
    said = capsys.readouterr().out
    assert f"{written.nbytes:,} bytes" in said and written.no_tokenizer in said
    assert (written.folding or "multipliers") in said or not written.folding


def test_import_writes_what_the_command_writes(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flm.export_hf(TRAINED, "hf-source", flavour="llama")
    written = flm.import_hf("hf-source", "imported", dtype="bf16")
    assert main(["checkpoint", "import-hf", "hf-source", "imported-cli", "--dtype", "bf16"]) == 0
    assert files("imported") == files("imported-cli") != {}
    assert written.logical_hash in capsys.readouterr().out


@pytest.mark.parametrize("format", ["torch_dist", "classic"])
def test_reshard_writes_what_the_command_writes(tiny: Path, format: str, capsys: pytest.CaptureFixture[str]) -> None:
    written = flm.reshard(TRAINED, f"copy-{format}", format=format, tensor=2)  # type: ignore[arg-type]
    assert main(["checkpoint", "reshard", TRAINED, f"cli-{format}", "--format", format, "--tensor", "2"]) == 0
    assert files(f"copy-{format}") == files(f"cli-{format}") != {}
    assert capsys.readouterr().out.count(written.logical_hash) == 2


def test_verify_finds_what_the_command_finds(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flm.reshard(TRAINED, "flipped")
    assert flm.verify("flipped").problems == []
    flip(Path("flipped/__0_0.distcp"), 3000)
    found = flm.verify("flipped")
    assert main(["checkpoint", "verify", "flipped"]) == 1
    assert len(found.problems) == 1 and found.problems[0] in capsys.readouterr().err
    assert flm.verify("flipped", quick=True).problems == []


def test_compare_finds_what_the_command_finds(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flm.reshard(TRAINED, "rounded", dtype="bf16", optimizer=False)
    found = flm.compare(TRAINED, "rounded")
    assert main(["checkpoint", "diff", TRAINED, "rounded", "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert said["differences"] == {name: vars(difference) for name, difference in found.differences.items()}
    assert said["beyond_tolerance"] == found.beyond(0.0) != [] and found.beyond(1e-2) == []


def test_plan_has_the_numbers_that_the_command_prints(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    planned = flm.plan(flm.load_run("run.yaml"), gpu="h100", gpus=4, mtbf=50_000)
    words = ["plan", "run.yaml", "--gpu", "h100", "--gpus", "4", "--mtbf", "50000"]
    assert main(words) == 0
    assert capsys.readouterr().out == f"{planned}\n"
    assert main([*words, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said == json.loads(json.dumps(planned.to_dict()))
    assert said["total"]["gpu_hours"] == planned.total.gpu_hours
    one = flm.plan(flm.load_run("run.yaml"), gpu="h100", gpus=4, stage="large", nodes_of=4)
    assert [stage.name for stage in one.stages] == ["large"] and one.machine.node_size == 4 and not one.goodput


def test_search_has_the_layouts_that_the_command_prints(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = flm.search_layouts(flm.load_run("run.yaml"), gpu="h100", gpus=4)
    assert main(["plan", "run.yaml", "--gpu", "h100", "--gpus", "4", "--search", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert {name: result["fitting"] for name, result in said.items()} == {
        name: len(result.candidates) for name, result in found.items()
    }


def test_a_budget_is_divided_as_the_command_does(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    divided = flm.plan_budget(flm.load_run("run.yaml"), 2.5, gpu="h100", gpus=4)
    words = ["plan", "run.yaml", "--gpu", "h100", "--gpus", "4", "--budget", "2.5"]
    assert main(words) == 0
    assert capsys.readouterr().out == f"{divided}\n"
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == divided.to_dict()
    assert sum(divided.gpu_hours) == pytest.approx(2.5, rel=1e-2)


def test_a_run_that_is_passed_on_is_not_changed(tiny: Path) -> None:
    run = flm.load_run("run.yaml")
    before = copy.deepcopy(run)
    flm.plan(run, gpu="h100", gpus=4, stage="large")
    flm.grow(TRAINED, run, "large", "unchanged")
    with pytest.raises(flm.Mistakes, match=r"tokenizer\.model is not there"):
        flm.train(run)
    assert run == before


@pytest.mark.parametrize("function", [flm.train, flm.fine_tune])
def test_training_is_for_the_main_thread(tiny: Path, function: Callable[[flm.RunConfig], int]) -> None:
    with ThreadPoolExecutor() as threads, pytest.raises(flm.RequestError, match="the main thread alone"):
        threads.submit(function, flm.load_run("run.yaml")).result()


Refused = Callable[[flm.RunConfig], object]


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (lambda run: flm.load_run("nowhere.yaml"), "config nowhere.yaml"),
        (lambda run: flm.load_run("run.yaml", {"stages.small.size": 1}), "config run.yaml --stages.small.size 1"),
        (lambda run: flm.train(run), "train run.yaml"),
        (lambda run: flm.train(run, stage="other"), "train run.yaml --stage other"),
        (lambda run: flm.fine_tune(run), "sft run.yaml"),
        (lambda run: flm.plan(run, gpu="abacus", gpus=1), "plan run.yaml --gpu abacus --gpus 1"),
        (lambda run: flm.plan(run, gpu="h100", gpus=3), "plan run.yaml --gpu h100 --gpus 3"),
        (lambda run: flm.grow(TRAINED, run, "huge", "o"), f"grow {TRAINED} run.yaml --stage huge --out o"),
        (lambda run: flm.grow("gone", run, "large", "o"), "grow gone run.yaml --stage large --out o"),
        (lambda run: flm.grow(TRAINED, run, "large", "f"), f"grow {TRAINED} run.yaml --stage large --out f"),
        (lambda run: flm.export_hf("gone", "o"), "checkpoint export-hf gone o"),
        (lambda run: flm.export_hf(TRAINED, "f"), f"checkpoint export-hf {TRAINED} f"),
        (lambda run: flm.reshard(TRAINED, "o", tensor=3), f"checkpoint reshard {TRAINED} o --tensor 3"),
        (lambda run: flm.reshard("f", "o", virtual_pipeline=2), "checkpoint reshard f o --virtual-pipeline 2"),
        (lambda run: flm.compare(TRAINED, "gone"), f"checkpoint diff {TRAINED} gone"),
        (lambda run: flm.layer_distances("gone", run), "distance gone run.yaml"),
        (lambda run: flm.layer_distances(TRAINED, run, text="gone"), f"distance {TRAINED} run.yaml --text gone"),
        (lambda run: flm.measure_importance("gone", run), "importance gone run.yaml"),
        (lambda run: flm.verify("gone"), "checkpoint verify gone"),
        (lambda run: flm.open_checkpoint("gone"), "checkpoint inspect gone"),
    ],
)
def test_what_the_command_refuses_is_refused_in_the_same_words(
    tiny: Path, request_: Refused, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("f").write_text("a file")
    with pytest.raises(flm.FlmError) as caught:
        request_(flm.load_run("run.yaml"))
    assert main(words.split()) == caught.value.status
    assert capsys.readouterr().err.partition(": ")[2].rstrip() == str(caught.value)
    assert not Path("o").exists()


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (lambda run: flm.plan(run, gpu="h100", gpus=0), "gpus is 0"),
        (lambda run: flm.plan(run, gpu="h100", gpus=2.5), "gpus is 2.5: give a whole number"),  # type: ignore[arg-type]
        (lambda run: flm.plan(run, gpu="h100", gpus=1, mtbf=float("nan")), "mtbf is nan"),
        (lambda run: flm.plan_budget(run, 0.0, gpu="h100", gpus=1), "budget is 0.0: give a number above 0"),
        (
            lambda run: flm.export_hf(TRAINED, "o", flavour="lama"),
            "flavour is 'lama', no family known here",
        ),
        (lambda run: flm.export_hf(TRAINED, "o", dtype="fp8"), "dtype 'fp8' is not one of fp32, bf16, fp16"),  # type: ignore[arg-type]
        (lambda run: flm.reshard(TRAINED, "o", format="zip"), "format is 'zip'"),  # type: ignore[arg-type]
        (lambda run: flm.reshard(TRAINED, "o", tensor=0), "tensor is 0"),
        (lambda run: flm.open_checkpoint(TRAINED, vocab_size=2**30), "vocab_size is 1073741824"),
        (lambda run: flm.open_checkpoint(""), "path is empty"),
    ],
)
def test_values_that_a_command_line_cannot_have_are_refused(tiny: Path, request_: Refused, message: str) -> None:
    with pytest.raises(flm.RequestError, match=message):
        request_(flm.load_run("run.yaml"))
    assert not Path("o").exists()
