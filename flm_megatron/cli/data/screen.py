"""Choose few good conversations out of many, and write what was dropped and why."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from flm_megatron.cli.options.parser import count, path, positive, real, seed, template
from flm_megatron.errors import RequestError
from flm_megatron.paths import require_folder

if TYPE_CHECKING:
    from collections.abc import Mapping

    from flm_megatron.data.conversations.screening import Limits, Score, Screening


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `flm data screen`."""
    from flm_megatron.cli.options.model import add_model_options

    parser.add_argument("pool", nargs="+", type=path, metavar="JSONL", help="files of conversations")
    parser.add_argument("--out", required=True, type=path, metavar="FOLDER", help="folder to write: kept.jsonl, ...")
    parser.add_argument("--keep", type=positive, metavar="K", help="conversations to choose; all that are left")
    parser.add_argument("--seed", type=seed, default=1234, help="seed of hashes, clusters and ties (default 1234)")
    parser.add_argument(
        "--similarity",
        type=real(0.0, 1.0, above=True),
        metavar="SHARE",
        help="drop near duplicates of at least this Jaccard similarity",
    )
    parser.add_argument("--min-characters", type=count, default=0, help="least characters of all text (default 0)")
    parser.add_argument("--max-characters", type=positive, help="most characters of all text")
    parser.add_argument("--min-answer-characters", type=positive, default=1, help="of the shortest answer (default 1)")
    parser.add_argument("--languages", nargs="+", default=[], metavar="CODE", help="languages to keep, such as en zh")
    parser.add_argument("--quota", nargs="+", default=[], metavar="CATEGORY=SHARE", help="shares of what is chosen")
    parser.add_argument("--checkpoint", type=path, metavar="CKPT", help="score conversations with this checkpoint")
    parser.add_argument("--min-loss", type=real(0.0), default=0.0, help="least mean loss of answers, nats per token")
    parser.add_argument("--max-loss", type=real(0.0, above=True), help="largest mean loss of answers, nats per token")
    parser.add_argument(
        "--max-difficulty", type=real(0.0, above=True), help="largest perplexity of answers over that without question"
    )
    parser.add_argument("--clusters", type=positive, help="choose from this many clusters of hidden states in turn")
    parser.add_argument(
        "--template",
        type=template,
        default="tele-flm",
        help="tele-flm (default), tokenizer (the one beside it), or a Jinja file",
    )
    parser.add_argument(
        "--window", type=positive, help="longest conversation in tokens; the checkpoint's sequence length"
    )
    parser.add_argument("--batch", type=positive, default=8, help="conversations in one forward pass (default 8)")
    add_model_options(parser)
    parser.set_defaults(run_data=run)


def run(args: argparse.Namespace) -> int:
    """Screen, write kept.jsonl, dropped.jsonl and report.json, and print the counts; returns 0."""
    from flm_megatron.data.conversations.conversation import read_conversations
    from flm_megatron.data.conversations.screening import Screening, clusters

    if args.out.exists():
        raise RequestError(f"{args.out} exists: choose another folder, or remove it first")
    require_folder(args.out, "--out")
    if args.checkpoint:
        _check_checkpoint(args)
    limits, quotas = _limits(args), _quotas(args.quota)
    screening = Screening([c for path in args.pool for c in read_conversations(path)], args.seed)
    screening.filter_texts(limits)
    scores = _scores(args, screening.left) if args.checkpoint else {}
    groups: dict[int, int] = {}
    if args.checkpoint:
        screening.filter_scores(scores, limits)
        if args.clusters:
            groups = clusters({index: scores[index].hidden for index in screening.left}, args.clusters, args.seed)
    screening.choose(args.keep or len(screening.left), quotas, scores, groups)
    _write(args.out, screening, scores, groups)
    return 0


def _limits(args: argparse.Namespace) -> Limits:
    from flm_megatron.data.conversations.screening import Limits

    asked = [name for name in ("max_loss", "max_difficulty", "clusters") if getattr(args, name) is not None]
    if (asked or args.min_loss) and not args.checkpoint:
        name = (asked or ["min_loss"])[0].replace("_", "-")
        raise RequestError(f"--{name} needs a model to measure by: give --checkpoint")
    if args.max_characters is not None and args.min_characters > args.max_characters:
        raise RequestError(f"--min-characters {args.min_characters} is above --max-characters {args.max_characters}")
    return Limits(
        similarity=args.similarity,
        min_characters=args.min_characters,
        max_characters=args.max_characters,
        min_answer_characters=args.min_answer_characters,
        languages=args.languages,
        min_loss=args.min_loss,
        max_loss=args.max_loss,
        max_difficulty=args.max_difficulty,
    )


def _quotas(given: list[str]) -> dict[str, float]:
    quotas = {}
    for text in given:
        name, _, share = text.rpartition("=")
        try:
            quotas[name] = real(0.0, 1.0)(share)
        except argparse.ArgumentTypeError as error:
            form = "is not of the form CATEGORY=SHARE, such as maths=0.4"
            raise RequestError(f"--quota {text!r} {form}: {error}") from None
    return quotas


def _check_checkpoint(args: argparse.Namespace) -> None:
    """Open what scores need, before the pool is read. Raises RequestError or DamagedError if it cannot be had."""
    from flm_megatron.checkpoint.sharding.layout import check_layout
    from flm_megatron.cli.options.model import layout_of
    from flm_megatron.data.conversations.template import ChatTemplate
    from flm_megatron.evaluation.evaluated import open_evaluated

    parallel = layout_of(args)
    if (parallel.data or 1) > 1:
        raise RequestError(f"--data is {parallel.data}: screening runs on one copy of the model, leave it out")
    evaluated = open_evaluated(args.checkpoint, args.tokenizer, args.vocab_size)
    check_layout(evaluated.model, parallel)
    ChatTemplate(args.template, evaluated.tokenizer)


def _scores(args: argparse.Namespace, indices: list[int]) -> dict[int, Score]:
    """Scores of some of the pool by the checkpoint, in processes of its layout."""
    import tempfile

    from flm_megatron.cli.options.model import layout_of
    from flm_megatron.distributed.under_layout import run_under
    from flm_megatron.evaluation.conversation_scores import ScoreRequest, read_scores, score

    parallel = layout_of(args)
    with tempfile.TemporaryDirectory() as folder:
        request = ScoreRequest(
            pool=args.pool,
            indices=indices,
            checkpoint=args.checkpoint,
            out=Path(folder) / "scores.json",
            template=args.template,
            window=args.window,
            batch=args.batch,
            tokenizer=args.tokenizer,
            precision=args.precision,
            vocab_size=args.vocab_size,
            parallel=parallel,
        )
        run_under(parallel, score, request)
        return read_scores(request.out)


def _write(folder: Path, screening: Screening, scores: Mapping[int, Score], groups: Mapping[int, int]) -> None:
    """Make the folder, whole or not at all, and say what is in it."""
    from flm_megatron.checkpoint.files.destination import destination, write_errors
    from flm_megatron.distributed.processes import Processes

    with destination(folder, Processes(), 0) as partial, write_errors(folder):
        _write_files(partial, screening, scores, groups)
    report = screening.report()
    for name, number in report["dropped"].items():
        print(f"dropped {number:,}: {name}")
    print(f"kept {report['kept']:,} of {report['pool']:,} in {folder / 'kept.jsonl'}")


def _write_files(folder: Path, screening: Screening, scores: Mapping[int, Score], groups: Mapping[int, int]) -> None:
    import json

    with (folder / "kept.jsonl").open("w", encoding="utf-8") as kept:
        for index in screening.left:
            print(json.dumps(screening.pool[index].record, ensure_ascii=False), file=kept)
    with (folder / "dropped.jsonl").open("w", encoding="utf-8") as dropped:
        for index, (name, reason) in sorted(screening.dropped.items()):
            where = {"path": screening.pool[index].path, "line": screening.pool[index].line}
            print(json.dumps({**where, "filter": name, "reason": reason}, ensure_ascii=False), file=dropped)
    with (folder / "scores.jsonl").open("w", encoding="utf-8") as written:
        for index, score in sorted(scores.items()):
            where = {"path": screening.pool[index].path, "line": screening.pool[index].line}
            values = {"loss": score.loss, "difficulty": score.difficulty, "cluster": groups.get(index)}
            print(json.dumps({**where, **values}), file=written)
    (folder / "report.json").write_text(json.dumps(screening.report(), indent=1) + "\n")
