"""CPU time of encoding the same text: flm data build, Megatron-LM's preprocess_data.py, datatrove's DocumentTokenizer.

Each runs in one encoding process over a short text and a long one; the difference is what text costs, without what
starting costs. The CPU time of the process and its children is counted, so that other work on the machine matters
little.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from statistics import median

from flm_megatron.data.corpus.standard_library import standard_library_documents

SHORT, LONG = 500_000, 8_000_000
DATATROVE = """
import sys
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer
text, tokenizer, out = sys.argv[1:]
encoder = DocumentTokenizer(out, tokenizer_name_or_path=tokenizer, eos_token="<|endoftext|>", shuffle_documents=False)
LocalPipelineExecutor([JsonlReader(text), encoder], tasks=1, logging_dir=out + "/logs").run()
"""
MEGATRON = """
import runpy, sys, typing, typing_extensions
typing.override = typing_extensions.override  # Megatron-LM's newest commits ask for Python 3.12
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
FLM = [sys.executable, "-m", "flm_megatron.cli.main", "data"]


def commands(args: argparse.Namespace, text: Path, out: Path) -> dict[str, list[str]]:
    """The command of each program for a text; `out` is a new folder."""
    tokenizer, sentencepiece = args.folder / "tokenizer.json", args.folder / "tokenizer.model"
    megatron = [sys.executable, "-c", MEGATRON, args.megatron / "tools/preprocess_data.py", "--input", text]
    megatron += ["--append-eod", "--workers", "1", "--output-prefix", out / "set", "--tokenizer-type"]
    ours = [*FLM, "build", text, "--out", out / "set", "--workers", "1", "--tokenizer"]
    found: dict[str, list[object]] = {
        "flm, tokenizer.json": [*ours, tokenizer],
        "Megatron-LM, tokenizer.json": [*megatron, "HuggingFaceTokenizer", "--tokenizer-model", args.folder / "hf"],
        "datatrove, tokenizer.json": [args.datatrove, "-c", DATATROVE, text, tokenizer, out],
        "flm, SentencePiece": [*ours, sentencepiece],
        "Megatron-LM, SentencePiece": [*megatron, "GPTSentencePieceTokenizer", "--tokenizer-model", sentencepiece],
    }
    return {name: [str(part) for part in command] for name, command in found.items()}


def prepare(folder: Path) -> list[Path]:
    """Texts and tokenizers in `folder`; gives the short text and the long one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    texts = standard_library_documents(2 * LONG)[0]
    paths = []
    for size in (SHORT, LONG):
        paths.append(folder / f"text_{size}.jsonl")
        used, lines = 0, []
        for text in texts:
            if used + len(text.encode()) <= size:
                used += len(text.encode())
                lines.append(json.dumps({"text": text}, ensure_ascii=False) + "\n")
        paths[-1].write_text("".join(lines))
    model = Tokenizer(models.BPE())
    model.pre_tokenizer, model.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>"]
    model.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=32000, special_tokens=special, initial_alphabet=alphabet)
    )
    model.save(str(folder / "tokenizer.json"))
    PreTrainedTokenizerFast(tokenizer_object=model, eos_token=special[0]).save_pretrained(folder / "hf")
    if not (folder / "tokenizer.model").exists():
        make = ["tokenizer", str(paths[1]), "--out", str(folder / "tokenizer.model"), "--vocab-size", "32000"]
        subprocess.run([*FLM, *make], check=True)
    return paths


def cpu_seconds(command: list[str], megatron: Path) -> float:
    """CPU time of a command and its children."""
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(megatron) if MEGATRON in command else os.getcwd()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{command} failed: {done.stderr[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="for texts, tokenizers and what is written")
    parser.add_argument("--megatron", type=Path, required=True, help="a checkout of Megatron-LM")
    parser.add_argument("--datatrove", required=True, help="Python of an environment with datatrove[processing]")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each, of which the median counts")
    args = parser.parse_args()
    texts = prepare(args.folder)
    sizes = [sum(len(json.loads(line)["text"].encode()) for line in text.open()) for text in texts]
    seconds: dict[str, list[list[float]]] = {}
    for repeat in range(args.repeats):
        for which, text in enumerate(texts):
            names = commands(args, text, Path())
            for number, name in enumerate(names):
                out = args.folder / f"out_{repeat}_{which}_{number}"
                out.mkdir()
                took = cpu_seconds(commands(args, text, out)[name], args.megatron)
                seconds.setdefault(name, [[], []])[which].append(took)
    print("| program | CPU s, short text | CPU s, long text | MB of text in a CPU second |\n|---|---|---|---|")
    for name, (short, long) in seconds.items():
        rate = (sizes[1] - sizes[0]) / 1e6 / (median(long) - median(short))
        print(f"| {name} | {median(short):.2f} | {median(long):.2f} | {rate:.2f} |")


if __name__ == "__main__":
    main()
