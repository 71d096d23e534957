"""What a new run file is made from."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from flm_megatron.api.new_run.shapes import parse_size
from flm_megatron.config.presets import load_preset, preset_names
from flm_megatron.errors import RequestError

TEXT = (".txt", ".jsonl", ".md")


@dataclass(frozen=True)
class NewRun:
    """Hardware, budget, model and data of a new run.

    `gpu` is none for processors, whose processes `gpus` counts. One of `tokens` and `hours` may be given; without both
    a model is given the tokens of its preset, or 20 for each parameter.
    """

    model: str
    """A preset, a size such as 125M or 7B, or a Hugging Face folder."""
    data: str
    """Prefix of an indexed dataset, or text to make one of: a folder, or a .txt, .md or .jsonl file."""
    tokenizer: str | None = None
    gpu: str | None = None
    gpus: int = 1
    tokens: float | None = None
    hours: float | None = None
    grow: bool = False
    name: str = "run"

    @property
    def is_text(self) -> bool:
        """Whether the data have still to be made of text."""
        return os.path.isdir(self.data) or Path(self.data).suffix in TEXT

    @property
    def is_preset(self) -> bool:
        """Whether the model is a preset."""
        return self.model in model_presets()

    @property
    def is_folder(self) -> bool:
        """Whether the model is a Hugging Face folder."""
        return not self.is_preset and os.path.isfile(os.path.join(self.model, "config.json"))

    @property
    def output(self) -> str:
        """The run's output folder."""
        return f"runs/{self.name}"


def model_presets() -> list[str]:
    """Presets that train a model from nothing on text."""
    return [name for name in preset_names() if "model" in load_preset(name) and not name.endswith("-sft")]


def check_request(asked: NewRun) -> None:
    """Check what can be seen before anything is computed. Raises RequestError in one line."""
    if not (asked.is_preset or asked.is_folder or parse_size(asked.model)):
        raise RequestError(
            f"model {asked.model!r} is no preset ({', '.join(model_presets())}), no size such as 125M or 7B, and no "
            "Hugging Face folder with a config.json"
        )
    if asked.tokens is not None and asked.hours is not None:
        raise RequestError("tokens and hours: give one of them, for each says how long to train")
    if asked.hours is not None and asked.gpu is None:
        raise RequestError("hours: the speed of this machine's processors is not known, so give tokens, or a gpu")
    if asked.is_folder and asked.grow:
        raise RequestError(f"grow: {asked.model} is trained already; grow it by `flm grow`, and start from that")
    if not asked.data:
        raise RequestError("data: give the prefix of an indexed dataset, or text to make one of")
    if asked.tokenizer is None and not asked.is_text and not asked.is_folder:
        raise RequestError(f"tokenizer is not given: name the one that {asked.data} was encoded with")
