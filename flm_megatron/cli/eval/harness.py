"""Tasks of lm-evaluation-harness on checkpoints; nothing is fetched unless the network is allowed."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from flm_megatron.cli.options.model import add_model_options, checkpoints_of, layout_of
from flm_megatron.cli.options.parser import count, location, path, positive, template
from flm_megatron.errors import RequestError
from flm_megatron.paths import require_file

if TYPE_CHECKING:
    from flm_megatron.evaluation.harness.run import HarnessRequest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `flm eval harness`."""
    parser.add_argument("checkpoints", nargs="*", type=location, metavar="CKPT", help="checkpoints of any format")
    parser.add_argument("--all-stages", type=path, metavar="RUN_DIR", help="the last checkpoint of each stage of a run")
    parser.add_argument("--tasks", nargs="+", required=True, metavar="NAME", help="tasks to run")
    parser.add_argument(
        "--include-path", type=path, metavar="DIR", help="folder of task YAML files; their relative paths start here"
    )
    parser.add_argument("--network", action="store_true", help="allow tasks to fetch their data")
    parser.add_argument(
        "--fewshot", type=count, metavar="N", help="examples before each question; the task's own number"
    )
    parser.add_argument("--limit", type=positive, metavar="N", help="only the first N questions of each task")
    parser.add_argument(
        "--template",
        type=template,
        help="put questions into a chat template: tele-flm, tokenizer (the one beside it), or a Jinja file",
    )
    parser.add_argument("--context", type=positive, help="longest context; the sequence length of the training")
    parser.add_argument("--batch", type=positive, default=8, help="requests in one forward pass (default 8)")
    parser.add_argument("--json", type=path, metavar="FILE", help="also write the result here; - prints it instead")
    parser.add_argument("--samples", type=path, metavar="FILE", help="write every question and answer as JSON lines")
    add_model_options(parser)


def run(args: argparse.Namespace) -> int:
    """Check the request, then evaluate on every process; returns 0."""
    from flm_megatron.distributed.under_layout import run_under
    from flm_megatron.evaluation.harness.run import check_request, evaluate

    for option, file in (("--json", args.json), ("--samples", args.samples)):
        if file and file != Path("-"):
            require_file(file, option)
    if args.include_path is not None and not args.include_path.is_dir():
        raise RequestError(f"--include-path {args.include_path} is not a folder: give the one with the task files")
    request = _request(args)
    check_request(request)
    return run_under(request.parallel, evaluate, request)


def _request(args: argparse.Namespace) -> HarnessRequest:
    from flm_megatron.data.conversations.template import NAMED
    from flm_megatron.evaluation.harness.run import HarnessRequest

    return HarnessRequest(
        checkpoints=checkpoints_of(args),
        tasks=args.tasks,
        tasks_folder=args.include_path and args.include_path.resolve(),
        network=args.network,
        fewshot=args.fewshot,
        limit=args.limit,
        template=args.template if args.template in (None, *NAMED) else str(Path(args.template).resolve()),
        context=args.context,
        batch=args.batch,
        json=args.json,
        samples=args.samples,
        tokenizer=args.tokenizer,
        precision=args.precision,
        vocab_size=args.vocab_size,
        parallel=layout_of(args),
    )
