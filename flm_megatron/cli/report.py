"""Show a run, or several compared, as one self-contained HTML page: loss, growth and what it saved, speed, restarts."""

from __future__ import annotations

import argparse
from pathlib import Path

from flm_megatron.cli.options.parser import path, place, whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `flm report`."""
    parser.add_argument("runs", nargs="+", type=place, metavar="RUN_DIR", help="output folder of a run, or its URL")
    beside = parser.add_mutually_exclusive_group()
    beside.add_argument(
        "--scratch",
        nargs="+",
        type=place,
        default=[],
        metavar="RUN_DIR",
        help="runs of the last stage's model from scratch, beside which the FLOPs that growth saved are measured; of "
        "several the ends (default: runs of one stage among RUN_DIR that have its shape)",
    )
    beside.add_argument(
        "--laws",
        type=path,
        metavar="FILE",
        help="YAML of loss laws by stage, as for `flm plan`, in place of such a run",
    )
    parser.add_argument("--out", type=path, metavar="FILE", help="page to write; report.html in the first folder")
    parser.add_argument("--serve", action="store_true", help="serve the page, which follows the run, until Ctrl-C")
    parser.add_argument("--address", help="address to serve on (127.0.0.1); others can read what is reached by others")
    parser.add_argument("--port", type=whole(0, 65535), help="port to serve on; 0, the default, takes a free one")


def run(args: argparse.Namespace) -> int:
    """Write the page and say where it is, or serve it; returns 0.

    Without --out the page of a run at a URL is written into this folder.
    """
    from flm_megatron.errors import RequestError
    from flm_megatron.evaluation.report.page import write_report
    from flm_megatron.launch.mirror.reading import run_at_hand
    from flm_megatron.paths import require_file
    from flm_megatron.url import is_url

    if args.serve:
        return _serve(args)
    if args.address is not None or args.port is not None:
        raise RequestError("--address and --port are of the server: add --serve")
    out = args.out or (Path() if is_url(args.runs[0]) else Path(args.runs[0])) / "report.html"
    if args.out or is_url(args.runs[0]):
        require_file(out, "--out")
    runs, scratch = ([run_at_hand(run) for run in given] for given in (args.runs, args.scratch))
    write_report(runs, out, scratch, args.laws)
    print(f"report: {out}")
    return 0


def _serve(args: argparse.Namespace) -> int:
    """Serve until interrupted."""
    from flm_megatron.errors import RequestError
    from flm_megatron.evaluation.report.serving import LivePage, report_server
    from flm_megatron.url import is_url

    if args.out:
        raise RequestError("--serve writes no file: leave out --out, or --serve")
    if urls := [run for run in (*args.runs, *args.scratch) if is_url(run)]:
        raise RequestError(f"--serve follows folders of this machine: write the page of {urls[0]} without it")
    live = LivePage([Path(run) for run in args.runs], [Path(run) for run in args.scratch], args.laws)
    with report_server(live, args.address or "127.0.0.1", args.port or 0) as server:
        host, port = server.server_address[:2]
        shown = f"[{host!s}]" if ":" in str(host) else str(host)
        print(f"report: http://{shown}:{port}/ (Ctrl-C ends it)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("report: ended")
    return 0
