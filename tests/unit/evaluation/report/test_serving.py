"""The served page: what it answers, what it refuses, and that it follows a run."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import pytest

from flm_megatron.cli.main import main
from flm_megatron.evaluation.report.serving import LivePage, report_server
from tests.unit.evaluation.report.drawn import drawn
from tests.unit.evaluation.report.test_report import make_run, step


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run's output folder."""
    return make_run(tmp_path / "run")


@pytest.fixture
def port(run_folder: Path) -> Iterator[int]:
    """Port of a server over it."""
    with report_server(LivePage([run_folder]), "127.0.0.1", 0) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield int(server.server_address[1])
        server.shutdown()
        thread.join()


def ask(port: int, path: str, method: str = "GET", **headers: str) -> tuple[int, str, str]:
    """Status, text and entity tag of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, text, answer.headers.get("ETag", "")


def test_the_page_follows_the_run(run_folder: Path, port: int) -> None:
    status, whole, _ = ask(port, "/")
    assert status == 200 and "If-None-Match" in whole and whole.startswith("<!doctype html>")
    status, before, version = ask(port, "/main")
    assert status == 200 and "<script>" not in before and before in whole
    assert ask(port, "/main", If_None_Match=version) == (304, "", version)
    with (run_folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(step("grown", 11, 31, 1.25)) + "\n" + '{"stage": "gro')
    status, after, newer = ask(port, "/main", If_None_Match=version)
    assert status == 200 and newer != version
    assert drawn(after)[0]["series"][0]["columns"][-1][-1] == 1.25


def test_a_run_that_cannot_be_read_for_a_while_is_said(run_folder: Path, port: int) -> None:
    metrics = (run_folder / "metrics.jsonl").read_text()
    (run_folder / "metrics.jsonl").unlink()
    status, text, _ = ask(port, "/main")
    assert status == 503 and "has no step" in text
    (run_folder / "metrics.jsonl").write_text(metrics)
    assert ask(port, "/main")[0] == 200


@pytest.mark.parametrize("path", ["/run.yaml", "/../run/run.yaml", "/main/../run.yaml", "/%2e%2e/run.yaml"])
def test_no_path_names_a_file(port: int, path: str) -> None:
    assert ask(port, path)[:2] == (404, "no such page\n")


def test_only_reading_is_answered(port: int) -> None:
    assert ask(port, "/", method="HEAD")[:2] == (200, "")
    assert ask(port, "/", method="POST")[0] == ask(port, "/", method="PUT")[0] == 501


@pytest.mark.parametrize(
    ("host", "status"),
    [("evil.example", 403), ("localhost.evil.example:80", 403), ("", 403), ("localhost:80", 200), ("[::1]:9", 200)],
)
def test_names_that_others_made_lead_here_are_refused(port: int, host: str, status: int) -> None:
    assert ask(port, "/main", Host=host)[0] == status


def test_what_does_not_fit_is_refused(run_folder: Path, port: int, capsys: pytest.CaptureFixture[str]) -> None:
    for given, words in (
        (["--port", "80"], "add --serve"),
        (["--address", "localhost"], "add --serve"),
        (["--serve", "--out", "x.html"], "leave out --out, or --serve"),
        (["--serve", "--port", str(port)], f"cannot listen on 127.0.0.1, port {port}"),
        (["--serve", "--address", "no.such.host.invalid"], "cannot listen on no.such.host.invalid"),
        (["--serve", "--port", "65536"], "65536"),
    ):
        assert main(["report", str(run_folder), *given]) == 2, given
        said = capsys.readouterr().err
        assert words in said and said.count("\n") == 1, said
