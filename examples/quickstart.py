"""Train a small Tele-FLM on this machine with real tensor, pipeline and data parallelism: `make quickstart`.

The text is the Python standard library's own sources, so nothing is downloaded. Run again, it goes on where it
stands; remove `runs/quickstart` to start anew.
"""

from __future__ import annotations

import sys
from pathlib import Path

from flm_megatron.cli.main import main as flm

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
    status = flm(["train", RUN_FILE])
    return status or summarize()


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


if __name__ == "__main__":
    sys.exit(main())
