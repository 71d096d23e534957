"""Let a checkpoint write: one prompt, a file of prompts, or a chat in the terminal."""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

from flm_megatron.cli.options.model import add_model_options, layout_of
from flm_megatron.cli.options.parser import count, location, path, positive, real, seed, template, whole
from flm_megatron.errors import RequestError
from flm_megatron.paths import require_file

if TYPE_CHECKING:
    from flm_megatron.evaluation.generation.run import GenerateRequest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `flm generate`."""
    parser.add_argument("checkpoint", type=location, metavar="CKPT", help="checkpoint of any format")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", help="text to go on from")
    what.add_argument("--prompts", type=path, metavar="FILE", help="a prompt in each line, or in `prompt` of .jsonl")
    what.add_argument("--chat", action="store_true", help="talk: each line is a turn")
    parser.add_argument("--system", help="chat: the system text")
    parser.add_argument(
        "--template",
        type=template,
        default="tele-flm",
        help="chat: tele-flm (default), tokenizer (the one beside it), or a Jinja file",
    )
    parser.add_argument("--max-new-tokens", type=whole(1, 10**9), default=256, help="longest completion (default 256)")
    parser.add_argument("--temperature", type=real(0.0), default=0.0, help="0 is greedy (default)")
    parser.add_argument(
        "--top-k", type=count, default=0, help="sample from the k likeliest tokens; 0 from all (default)"
    )
    parser.add_argument(
        "--top-p",
        type=real(0.0, 1.0, above=True),
        default=1.0,
        help="sample from the likeliest tokens of this probability",
    )
    parser.add_argument(
        "--repetition-penalty", type=real(0.0, above=True), default=1.0, help="above 1 discourages tokens seen before"
    )
    parser.add_argument("--seed", type=seed, default=0, help="seed of sampling (default 0)")
    parser.add_argument("--stop", nargs="+", default=[], metavar="TEXT", help="strings that end a completion")
    parser.add_argument("--batch", type=positive, default=1, help="prompts in one forward pass (default 1)")
    parser.add_argument("--no-stream", action="store_true", help="show a completion when it is whole")
    parser.add_argument("--json", action="store_true", help="a JSON object for each prompt")
    parser.add_argument("--out", type=path, metavar="FILE", help="write completions here")
    add_model_options(parser)


def run(args: argparse.Namespace) -> int:
    """Check the request, then generate on every process; returns 0."""
    from flm_megatron.checkpoint.sharding.layout import check_layout
    from flm_megatron.data.conversations.template import ChatTemplate
    from flm_megatron.distributed.under_layout import run_under
    from flm_megatron.distributed.world import launched
    from flm_megatron.evaluation.evaluated import open_evaluated
    from flm_megatron.evaluation.generation.run import run_generation
    from flm_megatron.evaluation.generation.terminal import relayed_lines

    if args.out:
        require_file(args.out, "--out")
    request = _request(args)
    evaluated = open_evaluated(args.checkpoint, args.tokenizer, args.vocab_size)
    check_layout(evaluated.model, request.parallel)
    ChatTemplate(request.template, evaluated.tokenizer)  # a file that is no template is refused here
    started_here = not launched() and request.parallel.processes > 1
    with relayed_lines() if args.chat and started_here else nullcontext() as lines:
        return run_under(request.parallel, run_generation, replace(request, lines=lines))


def _request(args: argparse.Namespace) -> GenerateRequest:
    from flm_megatron.evaluation.generation.run import GenerateRequest, read_prompts
    from flm_megatron.evaluation.generation.sampling import SamplingSettings

    if "" in args.stop:
        raise RequestError("--stop has an empty text, which every completion begins with: leave it out")
    if args.system is not None and not args.chat:
        raise RequestError("--system is for --chat")
    prompts = read_prompts(args.prompts) if args.prompts else [args.prompt] * (args.prompt is not None)
    return GenerateRequest(
        checkpoint=args.checkpoint,
        prompts=prompts,
        sampling=SamplingSettings(args.temperature, args.top_k, args.top_p, args.repetition_penalty, args.seed),
        max_new_tokens=args.max_new_tokens,
        stop=tuple(args.stop),
        batch=args.batch,
        stream=not args.no_stream,
        out=args.out,
        as_json=args.json,
        system=args.system,
        template=args.template,
        tokenizer=args.tokenizer,
        precision=args.precision,
        vocab_size=args.vocab_size,
        parallel=layout_of(args),
    )
