"""Less is more, on a laptop: 200 screened samples against ten times as many random ones, from the quickstart's model.

The task comes out of the Python standard library: given a function's name and signature, say the first line of its
docstring. `make quickstart` first; then `python examples/sft/screened_or_random.py`. Fine-tunings are judged by the
loss of the answers on functions of held-out files, and by exact matches of the whole line and of its first word under
greedy decoding. The screened samples are gone through as often as the random ones, and again as many times more often
as there are fewer of them, so that both have seen as many.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from flm_megatron.checkpoint.store import CheckpointStore
from flm_megatron.cli.main import main as flm
from flm_megatron.data.corpus.standard_library import standard_library_documents

RUN_FILE = "examples/sft/docstrings.yaml"
EPOCHS = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the task, screen, fine-tune twice, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, help="checkpoint to fine-tune (default: the quickstart's last)")
    parser.add_argument("--out", type=Path, default=Path("runs/docstrings"), help="folder for everything written")
    parser.add_argument("--random", type=int, default=2000, help="random samples (default 2000)")
    parser.add_argument("--screened", type=int, default=200, help="screened samples (default 200)")
    parser.add_argument("--held-out", type=int, default=200, help="samples to judge by (default 200)")
    args = parser.parse_args(arguments)
    base = args.base or CheckpointStore(Path("runs/quickstart/checkpoints")).latest(["small", "medium", "large"])
    if base is None:
        print("there is no quickstart's model: run `make quickstart` first, or give --base", file=sys.stderr)
        return 2
    make_task(args.out, args.random, args.held_out)
    files = {"screened": args.out / "screened/kept.jsonl", "random": args.out / "random.jsonl"}
    if not files["screened"].exists() and screen(args.out, base, args.screened):
        return 1
    more = max(1, args.random // args.screened)
    plan = [("screened", "screened", 1), (f"screened x {more}", "screened", more), ("random", "random", 1)]
    rows = [("before", 0, judge(base, args.out))]
    for name, kind, times in plan:
        output = args.out / f"{kind}-{times}"
        words = ["--output", str(output), "--checkpoint.initial", str(base)]
        words += ["--data.train", f"[{{path: {files[kind]}}}]", "--data.chat.epochs", str(EPOCHS * times)]
        if flm(["sft", RUN_FILE, *words]):
            return 1
        tuned = CheckpointStore(output / "checkpoints").latest(["tuned"])
        assert tuned is not None
        rows.append((name, len(files[kind].read_text().splitlines()), judge(tuned, args.out)))
    print(f"{'':14} {'samples':>8} {'held-out loss':>14} {'exact match':>12} {'first word':>11}")
    for name, samples, found in rows:
        print(f"{name:14} {samples:8,} {found['loss']:14.4f} {found['exact_match']:12.1%} {found['first_word']:11.1%}")
    return 0


def make_task(folder: Path, samples: int, held_out: int) -> None:
    """Write random.jsonl, which is the pool to be screened too, and held_out.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(1)
    for name, texts, count in zip(
        ("random", "held_out"), standard_library_documents(), (samples, held_out), strict=True
    ):
        found = [sample for text in texts for sample in functions(text)]
        chosen = draw.sample(found, min(count, len(found)))
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in chosen))


def functions(text: str) -> Iterator[dict[str, str]]:
    """A sample of every function of a source file that has a docstring."""
    try:
        tree = ast.parse(text)
    except SyntaxError:  # prose, or code of another Python
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and (doc := ast.get_docstring(node)):
            yield {
                "prompt": f"def {node.name}({ast.unparse(node.args)}):",
                "response": doc.splitlines()[0].strip() or ".",
            }


def screen(folder: Path, base: Path, keep: int) -> int:
    """Choose `keep` samples of the pool: no near copies, sentences only, none whose question does not help, varied."""
    command = ["data", "screen", str(folder / "random.jsonl"), "--out", str(folder / "screened"), "--keep", str(keep)]
    command += ["--similarity", "0.7", "--min-answer-characters", "15", "--max-characters", "250"]
    command += ["--max-difficulty", "1", "--clusters", "10", "--checkpoint", str(base)]
    return flm(command)


def judge(checkpoint: Path, folder: Path) -> dict[str, float]:
    """Loss in nats per token and shares of exact matches over the held-out samples."""
    from flm_megatron.config.schema import ParallelConfig
    from flm_megatron.distributed.under_layout import run_under

    out = folder / "judged.json"
    run_under(ParallelConfig(), partial(_judge, checkpoint, folder / "held_out.jsonl", out))
    return json.loads(out.read_text())


def _judge(checkpoint: Path, file: Path, out: Path) -> int:
    from flm_megatron.config.schema import ParallelConfig
    from flm_megatron.data.conversations.conversation import read_conversations
    from flm_megatron.data.conversations.template import ChatTemplate
    from flm_megatron.evaluation.evaluated import open_evaluated
    from flm_megatron.evaluation.model import load_model
    from flm_megatron.evaluation.perplexity.scoring import ScoringRequest
    from flm_megatron.evaluation.session import Session

    evaluated = open_evaluated(checkpoint)
    template = ChatTemplate("tele-flm", evaluated.tokenizer)
    whole: list[Any] = []
    words: list[Any] = []
    for index, item in enumerate(read_conversations(file)):
        (question, _), (answer, _) = template.pieces(item.messages, item.where)
        whole.append(ScoringRequest(index, [*question, *answer], len(question)))
        words.append(replace(whole[-1], ids=[*question, *answer[: first_word(evaluated.tokenizer, answer)]]))
    session = Session([load_model(evaluated, ParallelConfig())], evaluated.tokenizer, batch=8)
    found = session.score(whole)
    values = {
        "loss": -sum(one.log_likelihood for one in found) / sum(len(one.ids) - one.start for one in whole),
        "exact_match": sum(one.greedy for one in found) / len(found),
        "first_word": sum(one.greedy for one in session.score(words)) / len(words),
    }
    out.write_text(json.dumps(values))
    return 0


def first_word(tokenizer: Any, answer: Sequence[int]) -> int:
    """How many ids hold the first word of an answer."""
    return next((n for n in range(1, len(answer)) if " " in tokenizer.decode(answer[: n + 1]).strip()), len(answer))


if __name__ == "__main__":
    sys.exit(main())
