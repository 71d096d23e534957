"""What `nvidia-smi` says of the GPUs of a host: settings and faults that slow a run down or end it."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from flm_megatron.launch.doctor.findings import Finding, Level

ANSWER_S = 20.0
FIELDS = (
    *("index", "name", "pci.bus_id", "driver_version", "persistence_mode", "compute_mode", "mig.mode.current"),
    *("power.limit", "power.default_limit", "ecc.errors.uncorrected.volatile.total"),
)
REASONS = ("hw_slowdown", "hw_thermal_slowdown", "hw_power_brake_slowdown", "sw_thermal_slowdown")
"""Why clocks are lower than asked for, of which none is normal under load or without it."""
PREFIXES = ("clocks_event_reasons", "clocks_throttle_reasons")
"""What drivers call the reasons: today, and before 535."""
ESCAPE = re.compile(r"\x1b\[\d*m")
WATTS = 1.0


class Silent(Exception):
    """`nvidia-smi` gave no answer, or an error: the message says which."""


@dataclass(frozen=True)
class Gpu:
    """A GPU by the names of the queried fields."""

    values: dict[str, str]

    @property
    def index(self) -> str:
        """Its number on this host."""
        return self.values["index"]

    def number(self, field: str) -> float | None:
        """A field as a number; none where the GPU has no such thing."""
        try:
            return float(self.values[field])
        except (KeyError, ValueError):
            return None


def ask(*words: str) -> str:
    """The output of `nvidia-smi`, which hangs where the driver does.

    Raises:
        Silent: it failed, or did not answer within `ANSWER_S`.
    """
    process = subprocess.Popen(
        ["nvidia-smi", *words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        text, _ = process.communicate(timeout=ANSWER_S)
    except subprocess.TimeoutExpired:
        process.kill()  # without waiting: a process in the driver does not end
        raise Silent(f"nvidia-smi did not answer within {ANSWER_S:g} s: the driver hangs; reboot the host") from None
    if process.returncode:
        said = " ".join(text.split())[:160] or "nothing"
        raise Silent(f"nvidia-smi ended with {process.returncode} and said: {said}")
    return text


def query(fields: tuple[str, ...], what: str = "gpu") -> list[dict[str, str]]:
    """A value for each field, of every GPU (`what` is the part of `--query-...`).

    Raises:
        Silent: no answer, or a field that this driver does not know.
    """
    text = ask(f"--query-{what}={','.join(fields)}", "--format=csv,noheader,nounits")
    rows = [[cell.strip() for cell in line.split(",")] for line in text.splitlines() if line.strip()]
    return [dict(zip(fields, row, strict=True)) for row in rows if len(row) == len(fields)]


def gpus() -> list[Gpu]:
    """The GPUs of this host, with `REASONS` as fields of their own names; none without `nvidia-smi`.

    Raises:
        Silent: no answer.
    """
    if shutil.which("nvidia-smi") is None:
        return []
    found = query(FIELDS)
    for prefix in PREFIXES:
        try:
            reasons = query(tuple(f"{prefix}.{reason}" for reason in REASONS))
        except Silent:
            continue  # the other name, or a driver that does not say
        for values, told in zip(found, reasons, strict=False):
            values.update({name.removeprefix(f"{prefix}."): value for name, value in told.items()})
        break
    return [Gpu(values) for values in found]


def settings(found: list[Gpu]) -> Iterator[Finding]:
    """What is wrong with GPUs, one finding a kind of trouble; one that all is well."""
    troubles: list[tuple[Level, str, Callable[[Gpu], bool]]] = [
        (
            "warn",
            "persistence mode is off, so every start waits for the driver: nvidia-smi -pm 1",
            lambda gpu: gpu.values["persistence_mode"] == "Disabled",
        ),
        (
            "stop",
            "compute mode is prohibited: nvidia-smi -c 0",
            lambda gpu: gpu.values["compute_mode"] == "Prohibited",
        ),
        (
            "warn",
            "MIG is on, so a rank gets a part of the GPU: nvidia-smi -mig 0",
            lambda gpu: gpu.values["mig.mode.current"] == "Enabled",
        ),
        (
            "warn",
            "memory errors that ECC could not correct: reset the GPU, and replace it if they come back",
            lambda gpu: bool(gpu.number("ecc.errors.uncorrected.volatile.total")),
        ),
        ("warn", "power limit below the default: raise it with nvidia-smi -pl", _is_held_back),
        *(
            ("warn", f"clocks are held down ({reason}): look at cooling and power", partial(_is_active, reason))
            for reason in REASONS
        ),
    ]
    wrong = []
    for level, text, is_so in troubles:
        which = [gpu.index for gpu in found if is_so(gpu)]
        if which:
            wrong.append(Finding(level, "GPUs", f"{text} (GPU {', '.join(which)})"))
    names = sorted({each.values["name"] for each in found})
    if len(names) > 1:
        wrong.append(Finding("warn", "GPUs", f"{' and '.join(names)} on one host: the slowest sets the pace"))
    yield from wrong
    if not wrong:
        driver = found[0].values["driver_version"]
        yield Finding("ok", "GPUs", f"driver {driver}, persistence on, no fault, no limit below the default")


def _is_active(reason: str, gpu: Gpu) -> bool:
    return gpu.values.get(reason) == "Active"


def _is_held_back(gpu: Gpu) -> bool:
    limit, default = gpu.number("power.limit"), gpu.number("power.default_limit")
    return limit is not None and default is not None and limit < default - WATTS


def remapped_rows() -> Iterator[Finding]:
    """Rows of memory that were replaced: a reset is due, or there are no spare ones left. Nothing of older GPUs."""
    fields = ("gpu_bus_id", "remapped_rows.pending", "remapped_rows.failure")
    try:
        rows = query(fields, "remapped-rows")
    except Silent:
        return
    troubles: tuple[tuple[str, Level, str], ...] = (
        ("remapped_rows.pending", "warn", "a memory row is to be replaced: reset the GPU"),
        ("remapped_rows.failure", "stop", "a memory row could not be replaced: replace the GPU"),
    )
    for field, level, text in troubles:
        which = [row["gpu_bus_id"] for row in rows if row[field].lower() in ("1", "yes")]
        if which:
            yield Finding(level, "GPUs", f"{text} ({', '.join(which)})")


@dataclass(frozen=True)
class Topology:
    """How the devices of a host are joined, as `nvidia-smi topo -m` shows it.

    `links` has the way between two devices (`NV18`, `PIX`, `PXB`, `PHB`, `NODE` or `SYS`) by their names, `GPU0` or
    `mlx5_0`.
    """

    links: dict[tuple[str, str], str]

    @property
    def adapters(self) -> list[str]:
        """Network adapters."""
        return list(dict.fromkeys(there for _, there in self.links if not there.startswith("GPU")))

    def nearest(self, gpu: str) -> str | None:
        """The way from a GPU to the network adapter nearest to it; none without adapters."""
        order = ["PIX", "PXB", "PHB", "NODE", "SYS"]
        ways = [self.links[gpu, each] for each in self.adapters if (gpu, each) in self.links]
        return min((way for way in ways if way in order), key=order.index, default=None)


def read_topology(text: str) -> Topology:
    """The table of `nvidia-smi topo -m`, of any of its versions; empty if there is none in the text."""
    lines = [[cell.strip() for cell in ESCAPE.sub("", line).split("\t")] for line in text.splitlines()]
    header = next((cells for cells in lines if "GPU0" in cells[1:]), None)
    if header is None:
        return Topology({})
    names = dict(re.findall(r"^\s*(NIC\d+):\s*(\S+)", text, re.MULTILINE))
    columns = [
        (place, names.get(name, name)) for place, name in enumerate(header) if re.match(r"GPU\d|NIC\d|mlx|bnxt", name)
    ]
    links = {
        (cells[0], name): cells[place]
        for cells in lines
        if re.fullmatch(r"GPU\d+", cells[0])
        for place, name in columns
        if place < len(cells) and cells[place] != "X"
    }
    return Topology(links)
