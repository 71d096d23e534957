"""Small whole runs for tests: a dataset of made-up prose, and a run file over it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

from flm_megatron.checkpoint.opening import open_checkpoint
from flm_megatron.cli.main import main
from flm_megatron.config.loader import dump_run, load_run
from flm_megatron.config.schema import RunConfig
from flm_megatron.data.corpus.build import build_dataset
from flm_megatron.data.tokenizer import train_tokenizer
from flm_megatron.training.metrics.events import FILE, MetricsEvent, StepEvent, read_events
from flm_megatron.training.resume.start import checkpoint_store
from tests.support.prose import prose

SEQUENCE = 32

RUN = """
name: test
output: {output}
tokenizer: {data}/tokenizer.model
data:
  sequence_length: 32
  train: [{{path: {data}/train}}]
  validation: [{{path: {data}/validation}}]
stages:
  - name: small
    model: {{num_layers: 2, hidden_size: 32, ffn_hidden_size: 48, num_attention_heads: 4}}
    parallel: {{tensor: 2}}
    global_batch: 4
    tokens: 1024
    optimizer: {{lr: 3.0e-3, min_lr: 1.0e-3}}
    schedule: {{warmup_samples: 8}}
    validation: {{interval_steps: 4, samples: 6}}
"""


def make_data(folder: Path) -> Path:
    """Tokenizer and datasets `train` and `validation` of made-up prose."""
    texts = prose(40)
    tokenizer = train_tokenizer(texts, folder / "tokenizer.model", 500)
    for name, part in (("train", texts[4:]), ("validation", texts[:4])):
        build_dataset(part, tokenizer, folder / name, workers=1)
    return folder


def make_run(data: Path, output: Path, *overrides: str) -> tuple[Path, RunConfig]:
    """A run file in `output`, and what it resolves to with `overrides` (`--field value`)."""
    output.mkdir(parents=True, exist_ok=True)
    source = output / "test.yaml"
    source.write_text(RUN.format(data=data, output=output))
    run = load_run(source, overrides)
    source.write_text(dump_run(run))
    return source, run


def flm(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the command to its end in this process, which has imported torch already; ranks are processes as ever.

    What these print is not in the result.
    """
    command = list(map(str, arguments))
    with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as errors:
        status = main(command)
    return subprocess.CompletedProcess(command, status, out.getvalue(), errors.getvalue())


def flm_process(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command to its end in a process of its own."""
    command = [sys.executable, "-m", "flm_megatron.cli.main", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=240, env={**os.environ, **environment}, check=False
    )


def start_flm(*arguments: str | Path) -> subprocess.Popen[str]:
    """Start the command and leave it running."""
    command = [sys.executable, "-m", "flm_megatron.cli.main", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_step(output: Path, step: int, process: subprocess.Popen[str], timeout_s: float = 120) -> None:
    """Wait until the metrics hold a step."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if (output / FILE).exists() and any(event.step >= step for event in read_events(output, MetricsEvent)):
            return
        if process.poll() is not None:
            raise AssertionError(f"ended with {process.returncode}: {process.communicate()[1]}")
        time.sleep(0.02)
    raise TimeoutError(f"step {step} did not come within {timeout_s} s")


def losses(output: Path) -> list[tuple[Any, ...]]:
    """(stage, step, loss, gradient norm, learning rate) of every step."""
    steps = read_events(output, StepEvent)
    return [(each.stage, each.step, each.loss, each.grad_norm, each.lr) for each in steps]


def final_hash(output: Path) -> str:
    """Logical hash of the last checkpoint of the stage: weights, masters and moments."""
    path = checkpoint_store(RunConfig(output=str(output))).latest(["small"])
    assert path is not None
    return open_checkpoint(path).manifest.logical_hash
