"""The page for those who bring their data, tokenizer, bucket and trackers: its blocks, one after another."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy
import pytest
import torch

from flm_megatron.data.tokenizer import open_tokenizer
from flm_megatron.engine.prepare import prepare
from flm_megatron.training.metrics.events import EvaluationEvent, GrowthEvent, RestartEvent, StepEvent, read_events
from tests.support import REPOSITORY
from tests.support.object_store import ObjectStore
from tests.support.prose import prose
from tests.support.tokenizer_cases import hugging_face

KILLED_AFTER = 32
"""Steps of the first stage, of 80, after which the run is killed."""


def blocks(port: int) -> tuple[str, list[list[str]]]:
    """The page's run file, and its commands as they are typed, with the bucket and port of the test."""
    text = (REPOSITORY / "docs" / "bring-your-own.md").read_text(encoding="utf-8")
    text = text.replace("BUCKET", os.environ["TEST_BUCKET"]).replace("9464", str(port))
    found = re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.M | re.S)
    (run_file,) = (block for kind, block in found if kind == "yaml")
    return run_file, [line.split()[1:] for kind, block in found if not kind for line in block.splitlines()]


def preprocessed(folder: Path) -> None:
    """What preprocess_data.py leaves, with its tokenizer, and a text of its own."""
    prepare()
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    tokenizer = hugging_face(folder)
    builder = IndexedDatasetBuilder(str(folder / "corpus_text_document.bin"), dtype=numpy.uint16)
    for text in prose(60)[4:]:
        ids = numpy.array([*tokenizer.encode(text), tokenizer.eod], dtype=numpy.uint16)
        builder.add_document(ids, [len(ids)])
    builder.finalize(str(folder / "corpus_text_document.idx"))
    (folder / "held-out.txt").write_text("".join(prose(60)[:4]))


def start(folder: Path, arguments: list[str], cache: str) -> subprocess.Popen[str]:
    """The command, in `folder`, on a machine with this cache."""
    command = [sys.executable, "-m", "flm_megatron.cli.main", *arguments]
    environment = {**os.environ, "FLM_CACHE": str(folder / cache), "PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def done(folder: Path, arguments: list[str], cache: str = "here") -> str:
    """What the command says, which ends with status 0."""
    process = start(folder, arguments, cache)
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 0, said
    return said


def scraped(port: int) -> dict[str, float]:
    """Values without labels that Prometheus would read; nothing while there is no endpoint."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            lines = answer.read().decode().splitlines()
    except (urllib.error.URLError, OSError):
        return {}
    found = (re.fullmatch(r"(\w+)(?:\{[^}]*\})? (\S+)", line) for line in lines)
    return {match[1]: float(match[2]) for match in found if match}


def wait_for_step(port: int, step: int, process: subprocess.Popen[str]) -> float:
    """Until Prometheus sees the step; returns the loss that it sees."""
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        values = scraped(port)
        if values.get("flm_step", 0) >= step:
            return values["flm_loss"]
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    raise TimeoutError(f"step {step} was not seen")


@pytest.mark.slow
def test_the_page(object_store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_BUCKET", object_store.url().removeprefix("s3://").strip("/"))
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    preprocessed(tmp_path)
    run_file, (adopt, config, train, *after) = blocks(port)
    (tmp_path / "run.yaml").write_text(run_file)
    assert "documents end with id 0" in done(tmp_path, adopt)
    done(tmp_path, config)

    process = start(tmp_path, train, "here")
    assert 0 < wait_for_step(port, KILLED_AFTER, process) < 7
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    shutil.rmtree(tmp_path / "here")  # that machine is gone

    said = done(tmp_path, train, "there")
    (output,) = (tmp_path / "there" / "runs").iterdir()
    steps = read_events(output, StepEvent)
    assert [(step.stage, step.step) for step in steps] == [
        *(("small", number + 1) for number in range(80)),
        *(("large", number + 1) for number in range(20)),
    ]
    assert read_events(output, RestartEvent)[0].step > 0, said
    (grown,) = read_events(output, GrowthEvent)
    assert grown.certificate is not None and grown.certificate.preserving
    found = read_events(output, EvaluationEvent)
    assert [event.stage for event in found] == ["small", "large"] and all(event.completions for event in found)

    scores = done(tmp_path, after[0], "elsewhere")
    assert f"{found[1].values['bits_per_byte/held-out']:.4f}" in scores
    done(tmp_path, after[1], "elsewhere")
    exported(tmp_path / "exported")
    tracked(tmp_path, steps)
    assert object_store.open_uploads() == []


def exported(folder: Path) -> None:
    """What was exported loads, with its tokenizer, and gives losses below those of chance."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([tokenizer.encode(prose(1)[0])[:64]])
    assert ids.tolist()[0] == open_tokenizer(folder).encode(prose(1)[0])[:64]
    with torch.no_grad():
        assert float(model(ids, labels=ids).loss) < 0.9 * float(numpy.log(len(tokenizer)))


def tracked(folder: Path, steps: list[StepEvent]) -> None:
    """MLflow has the last loss, the growth and the evaluation."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=(folder / "mlruns").as_uri())
    (run,) = client.search_runs([each.experiment_id for each in client.search_experiments()])
    assert run.data.metrics["train/loss"] == pytest.approx(steps[-1].loss)
    assert "evaluation/bits_per_byte/held-out" in run.data.metrics and "growth/loss_after" in run.data.metrics
