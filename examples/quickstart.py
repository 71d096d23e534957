"""Train a small Tele-FLM on this machine with real tensor, pipeline and data parallelism: `make quickstart`.

On a terminal the run is shown as `flm status --watch` shows it, elsewhere as plain lines. The text is the Python
standard library's own sources, so nothing is downloaded. Run again, it goes on where it stands; remove
`runs/quickstart` to start anew.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from flm_megatron.cli.main import main as flm
from flm_megatron.evaluation.stages import last_checkpoints

RUN_FILE = "examples/quickstart.yaml"
RUN = Path("runs/quickstart")
DATA = RUN / "data"


def main() -> int:
    """Make the data, train what is left of the run, and draw the loss."""
    if not DATA.exists():
        print("Making a tokenizer and datasets from the Python standard library ...", flush=True)
        status = flm(["data", "stdlib", "--out", str(DATA), "--vocab-size", "2048", "--workers", "2"])
        if status:
            return status
    status = flm(["train", RUN_FILE, "--watch"]) or summarize()
    return status or flm(["report", str(RUN)]) or suggest()


def summarize() -> int:
    """Print the last validation loss beside the unigram entropy; fails if the model has not learnt more than that."""
    from flm_megatron.data.corpus.statistics import unigram_entropy
    from flm_megatron.training.metrics.events import ValidationEvent, read_events
    from flm_megatron.training.metrics.plot import plot_loss

    unigram = unigram_entropy(DATA / "train", DATA / "validation").nats_per_token
    losses = [event.loss for event in read_events(RUN, ValidationEvent)]
    picture = plot_loss(RUN, ("unigram entropy", unigram))
    print(f"validation loss {losses[-1]:.3f} nats per token; unigram entropy of the same text {unigram:.3f}")
    print(f"loss curve: {picture}")
    return 0 if losses[-1] < unigram else 1


def suggest() -> int:
    """Print commands to try next, which work as they stand."""
    print("next, try:", *(f"  {command}" for command in next_commands()), sep="\n")
    return 0


def next_commands() -> list[str]:
    """How the run stands, text of its last model, and what the run would take on accelerators."""
    program = os.path.relpath(Path(sys.executable).with_name("flm"))
    last = last_checkpoints(RUN)[-1]
    return [
        f"{program} status {RUN}",
        f"{program} generate {last} --prompt 'def read(' --max-new-tokens 60",
        f"{program} plan {RUN_FILE} --gpu h100 --gpus 4",
    ]


if __name__ == "__main__":
    sys.exit(main())
