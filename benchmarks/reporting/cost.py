"""What a step's report costs the first rank: its own files, and whoever watches besides.

python -m benchmarks.reporting.cost
"""

from __future__ import annotations

import tempfile
import time
import urllib.request
from pathlib import Path
from statistics import median

from flm_megatron.config.schema import OpenTelemetryConfig, PrometheusConfig, RunConfig, StageConfig
from flm_megatron.training.metrics.events import StepEvent
from flm_megatron.training.metrics.goodput import Meter
from flm_megatron.training.metrics.log import MetricsLog
from flm_megatron.training.telemetry import telemetry

STEPS, ROUNDS, PORT = 2000, 5, 9437
COLLECTOR = "http://127.0.0.1:9/v1/traces"
CASES = {
    "nothing": (None, None),
    "Prometheus": (PrometheusConfig(port=PORT), None),
    "OpenTelemetry, every 100th step": (None, OpenTelemetryConfig(endpoint=COLLECTOR)),
    "OpenTelemetry, every step": (None, OpenTelemetryConfig(endpoint=COLLECTOR, step_interval=1)),
}


def report_us(prometheus: PrometheusConfig | None, spans: OpenTelemetryConfig | None) -> float:
    """Microseconds of a step's lines in goodput.jsonl and metrics.jsonl, with whoever is told of them."""
    with tempfile.TemporaryDirectory() as folder:
        run = RunConfig(output=folder, stages=[StageConfig(name="a")])
        run.logging.prometheus, run.logging.opentelemetry = prometheus, spans
        with telemetry(run, 0, 1, float) as observers:
            meter, log = Meter(Path(folder), observers), MetricsLog(Path(folder), False, ["a"], "a", 0, observers)
            meter.begin(0, "a", 0)
            began = time.perf_counter()
            for step in range(1, STEPS + 1):
                meter.step(step, 0.1, 0.01, applied=True)
                log.write(StepEvent("a", step, 128 * step, 5.0, 0.5, 1e-3, 0.1, 1e3, 0.2, 0.4, 1.5, 9.0))
            taken = time.perf_counter() - began
            meter.close()
            log.close()
    return 1e6 * taken / STEPS


def scrape_ms() -> float:
    """Milliseconds of one answer to Prometheus, during which the rank's Python may have to wait."""
    with tempfile.TemporaryDirectory() as folder:
        run = RunConfig(output=folder, stages=[StageConfig(name="a")])
        run.logging.prometheus = PrometheusConfig(port=PORT)
        with telemetry(run, 0, 1, float) as observers:
            Meter(None, observers).begin(0, "a", 0)
            times = []
            for _ in range(50):
                began = time.perf_counter()
                with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/metrics") as answer:
                    answer.read()
                times.append(time.perf_counter() - began)
    return 1e3 * median(times)


def main() -> None:
    """Print a row for each case, cases in turn."""
    taken: dict[str, list[float]] = {name: [] for name in CASES}
    for _ in range(ROUNDS):
        for name, watching in CASES.items():
            taken[name].append(report_us(*watching))
    for name, values in taken.items():
        print(f"{name:34s} {median(values):6.1f} us per step")
    print(f"{'one answer to Prometheus':34s} {scrape_ms():6.1f} ms")


if __name__ == "__main__":
    main()
