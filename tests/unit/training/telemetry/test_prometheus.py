"""The endpoint: what Prometheus' own parser reads of it, and what happens where it cannot be."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from flm_megatron import http_server
from flm_megatron.config.schema import PrometheusConfig, RunConfig
from flm_megatron.errors import RequestError
from flm_megatron.training.metrics.events import SaveEvent, ValidationEvent
from flm_megatron.training.metrics.goodput import Meter, read_goodput
from flm_megatron.training.metrics.log import MetricsLog
from flm_megatron.training.telemetry import Observer, Observers, require_telemetry, telemetry
from flm_megatron.training.telemetry.opening import require_ports
from tests.support import REPOSITORY
from tests.support.trackers import free_port, steps, tracked_run

Found = dict[tuple[str, str], float]


@pytest.fixture
def run(tmp_path: Path) -> RunConfig:
    """A run that is asked to answer Prometheus."""
    asked = tracked_run(tmp_path)
    asked.logging.prometheus = PrometheusConfig(port=free_port())
    return asked


def scraped(port: int) -> Found:
    """Values by name, and by the label that is neither run nor rank."""
    parser = pytest.importorskip("prometheus_client.parser")
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    samples = [sample for family in parser.text_string_to_metric_families(text) for sample in family.samples]
    return {(each.name, own_label(each.labels)): each.value for each in samples}


def own_label(labels: Mapping[str, str]) -> str:
    """The value of the label that not all samples have."""
    return "".join(value for name, value in labels.items() if name not in ("run", "rank"))


@pytest.fixture
def trained(run: RunConfig) -> Iterator[Found]:
    """What is scraped after two steps of the grown stage."""
    assert run.logging.prometheus
    with telemetry(run, 0, 4, lambda: 1.5) as observers:
        meter, log = Meter(Path(run.output), observers), metrics_log(run, observers)
        meter.begin(1, "large", 0)
        for event in steps("large", [1, 2], 512):
            meter.step(event.step or 0, 0.5, 0.25, applied=True)
            log.write(event)
        meter.step(3, 0.5, 0.0, applied=False)
        with meter.stall("save"):
            time.sleep(0.01)
        log.write(SaveEvent("large", 2, 768, "checkpoints/large/step_00000002"))
        log.write(ValidationEvent("large", 2, 768, 6.5, {"held out": 6.5}))
        yield scraped(run.logging.prometheus.port)
        meter.close()
        log.close()


def metrics_log(run: RunConfig, observers: Observers) -> MetricsLog:
    """The log of the main rank."""
    return MetricsLog(Path(run.output), False, ["small", "large"], "large", 0, observers)


def test_the_newest_numbers_are_there(trained: Found, tmp_path: Path) -> None:
    expected = {
        "flm_step": 3, "flm_stage": 1, "flm_growths": 1, "flm_tokens": 768, "flm_loss": 8, "flm_grad_norm": 0.5,
        "flm_learning_rate": 1e-3, "flm_tokens_per_second": 4e3, "flm_peak_memory_bytes": 1.5 * 2**30,
        "flm_train_seconds_total": 1.5, "flm_data_wait_seconds_total": 0.5, "flm_refused_steps_total": 1,
        "flm_checkpoint_step": 2, "flm_step_seconds": 0.5,
    }  # fmt: skip
    assert {name: trained[name, ""] for name in expected} == expected
    assert trained["flm_stage_info", "large"] == 1 and trained["flm_validation_loss", "held out"] == 6.5
    assert trained["flm_stall_seconds_total", "save"] >= 0.01 and ("flm_mfu_ratio", "") not in trained
    assert 0 <= trained["flm_checkpoint_age_seconds", ""] < 60 and 0 <= trained["flm_step_age_seconds", ""] < 60
    goodput = read_goodput(tmp_path)
    assert goodput and trained["flm_goodput_ratio", ""] == pytest.approx(goodput.share)


def test_the_dashboard_asks_for_what_is_there(trained: Found) -> None:
    board = (REPOSITORY / "examples" / "monitoring" / "grafana.json").read_text()
    names = {name for panel in json.loads(board)["panels"] for name in re.findall(r"flm_\w+", str(panel["targets"]))}
    assert len(names) > 12 and names - {"flm_mfu_ratio"} <= {name for name, _ in trained}
    page = (REPOSITORY / "docs" / "trackers.md").read_text()
    assert {name for name, _ in trained if f"`{name}" not in page} == set()


def test_goodput_counts_what_earlier_processes_did(run: RunConfig, tmp_path: Path) -> None:
    meter = Meter(tmp_path)
    meter.begin(0, "small", 0)
    meter.step(1, 0.001, 0.0, applied=True)
    meter.close()
    assert run.logging.prometheus
    with telemetry(run, 0, 1, lambda: 0.0):
        found = scraped(run.logging.prometheus.port)
    goodput = read_goodput(tmp_path)
    assert goodput and found["flm_goodput_ratio", ""] == pytest.approx(goodput.share) and goodput.share > 0


def test_other_ranks_answer_if_asked_each_at_a_port(run: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert run.logging.prometheus
    with telemetry(run, 1, 2, lambda: 0.0) as none:
        assert not none
    run.logging.prometheus = PrometheusConfig(port=free_port() - 1, per_rank=True)
    with telemetry(run, 1, 2, lambda: 0.0) as observers:
        Meter(None, observers).step(7, 0.5, 0.0, applied=True)
        found = scraped(run.logging.prometheus.port + 1)
    assert found["flm_train_seconds_total", ""] == 0.5 and ("flm_goodput_ratio", "") not in found


def test_a_port_that_is_taken_is_refused_before_and_one_warning_later(
    run: RunConfig, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run.logging.prometheus
    port = run.logging.prometheus.port
    require_ports(run.logging.prometheus, 8)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        with pytest.raises(RequestError, match=rf"cannot listen at 127.0.0.1 port {port} .*: choose another port"):
            require_ports(run.logging.prometheus, 1)
        with telemetry(run, 0, 1, lambda: 0.0) as observers:
            assert not observers
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"WARNING: logging.prometheus: rank 0 cannot listen at port {port} (")
    with pytest.raises(RequestError, match=r"cannot listen at nowhere\.invalid port"):
        require_ports(PrometheusConfig(address="nowhere.invalid"), 1)


def test_a_library_that_is_missing_is_named(run: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    require_telemetry(run)
    monkeypatch.setattr("flm_megatron.training.telemetry.opening.find_spec", lambda name: None)
    with pytest.raises(RequestError, match=r"prometheus: prometheus_client is not installed: pip install"):
        require_telemetry(run)


def test_an_observer_that_raises_is_left_out_with_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    class Broken(Observer):
        def time(self, line: object) -> None:
            raise ZeroDivisionError("of https://me:secret@host")

    meter = Meter(tmp_path, observers := Observers([Broken()]))
    meter.begin(0, "small", 0)
    meter.step(1, 0.5, 0.0, applied=True)
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("WARNING: Broken: ZeroDivisionError: of https://***@host") and not observers


def test_nothing_is_imported_for_a_run_that_asks_for_nothing() -> None:
    code = (
        "import sys; from flm_megatron.config.schema import RunConfig\n"
        "from flm_megatron.launch.tracking import tracked\n"
        "from flm_megatron.training.telemetry import telemetry\n"
        "with tracked(RunConfig()), telemetry(RunConfig(), 0, 1, float) as observers: assert not observers\n"
        "assert not {'wandb', 'mlflow', 'prometheus_client', 'opentelemetry'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_another_sites_page_and_slow_clients_reach_nothing(run: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "MOST_CLIENTS", 2)
    assert run.logging.prometheus
    port, before = run.logging.prometheus.port, threading.active_count()
    with telemetry(run, 0, 1, lambda: 0.0):
        request = urllib.request.Request(f"http://127.0.0.1:{port}/metrics", headers={"Host": "evil.example"})
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(request, timeout=10)
        slow = [socket.create_connection(("127.0.0.1", port)) for _ in range(20)]
        for client in slow[2:]:
            client.settimeout(10)
            assert client.recv(1) == b""
        assert threading.active_count() <= before + 3
        for client in slow:
            client.close()
