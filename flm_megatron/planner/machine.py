"""What a plan assumes about a machine: links, efficiencies, power and price, beside the accelerator's data sheet.

Peaks, memory and memory bandwidth come from `device.hardware`. Link bandwidths are the makers' data sheets.
Efficiencies are one set per kind of accelerator, set by a few published iteration times (`benchmarks/planner`
says which) or by `flm bench --calibrate`. Power and price are assumptions. A YAML file overrides any field.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from flm_megatron.config.yaml_text import parse_yaml, read_yaml
from flm_megatron.device.hardware import Hardware, find_hardware, known_hardware
from flm_megatron.errors import RequestError
from flm_megatron.json_text import Json, JsonObject
from flm_megatron.planner.layout import CUDA, Implementation

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

D = TypeVar("D", bound="DataclassInstance")


@dataclass(frozen=True)
class Efficiency:
    """Fractions of the data sheet's rates that real kernels reach."""

    matmul: float = 0.76
    """Matrix multiplications with a long inner sum on an accelerator of average speed, as a fraction of the dense
    peak."""
    tile_overhead: float = 128.0
    """Start and end of a tile of a multiplication, in terms of the inner sum that take as long."""
    attention: float = 0.55
    """Flash attention, as a fraction of the dense peak, over the keys that causality leaves."""
    memory: float = 0.75
    """Memory-bound kernels, as a fraction of the memory bandwidth."""
    intra: float = 0.75
    """Collectives inside a node, as a fraction of the link."""
    inter: float = 0.75
    """Collectives and transfers between nodes, as a fraction of the link."""


@dataclass(frozen=True)
class Machine:
    """A cluster of equal nodes. Bandwidths are per accelerator and direction, in 1e9 bytes per second."""

    hardware: Hardware
    node_size: int
    """Accelerators in a node."""
    intra_gb_per_s: float
    """Link to the other accelerators of the node."""
    inter_gb_per_s: float
    """Share of the node's network."""
    multiprocessors: int
    """Units that work on one tile of a matrix multiplication each."""
    power_w: float
    """Drawn per accelerator while training, with its share of the host and cooling."""
    price_per_hour: float
    """Per accelerator, in `currency`."""
    currency: str = "USD"
    latency_s: float = 1.2e-5
    """Start-up time of a collective or transfer."""
    kernel_s: float = 4e-6
    """Duration of the shortest kernel."""
    spread: float = 0.03
    """Standard deviation of the speed of equal accelerators, relative; the slowest of a run sets its pace."""
    context_gib: float = 2.0
    """Memory of the driver, the communication library and loaded kernels."""
    fragmentation: float = 0.06
    """Allowance for fragmentation, as a fraction of activations and working memory."""
    storage_gb_per_s: float = 50.0
    """Write rate of the checkpoints' file system, for all accelerators together."""
    host_gb_per_s: float = 20.0
    """Copy from one accelerator to the memory of its host."""
    restart_s: float = 600.0
    """From a failure to the next step: detection, finding hosts, starting ranks and loading."""
    efficiency: Efficiency = Efficiency()
    software: Implementation = CUDA
    """What kernels store and move."""
    source: str = "table"
    """Where the efficiencies come from."""

    @property
    def name(self) -> str:
        """Short name of the accelerator."""
        return self.hardware.name


@dataclass(frozen=True)
class _Row:
    intra: float
    inter: float
    multiprocessors: int
    power: float
    price: float
    efficiency: Efficiency | None = None
    node_size: int = 8


# Set by benchmarks/planner/fit.py, as the machine's `spread`; the other efficiencies are assumed.
AMPERE = Efficiency(matmul=0.99, tile_overhead=576)
HOPPER = Efficiency(matmul=0.77, tile_overhead=192)

# NVLink (or the like) and network of the usual server: DGX A100 has eight 200 Gb/s ports, DGX H100 eight of
# 400 Gb/s; PCIe cards reach each other and, four together, one 200 Gb/s port. Power is the server's rated power
# divided by its accelerators, price a round figure for rented machines; both are assumptions.
TABLE: dict[str, _Row] = {
    "v100-16gb": _Row(150, 12.5, 80, 600, 0.6),
    "v100": _Row(150, 12.5, 80, 600, 0.8),
    "a100-40gb": _Row(300, 25, 108, 810, 1.2, AMPERE),
    "a100-pcie": _Row(32, 6.25, 108, 500, 1.2, AMPERE),
    "a100": _Row(300, 25, 108, 810, 1.5, AMPERE),
    "a800": _Row(200, 25, 108, 810, 1.5, AMPERE),
    "a40": _Row(32, 6.25, 84, 500, 0.6),
    "a10": _Row(32, 6.25, 72, 350, 0.5),
    "gh200": _Row(450, 50, 132, 1000, 3.0, HOPPER),
    "h100-pcie": _Row(64, 12.5, 114, 650, 2.0, HOPPER),
    "h100-nvl": _Row(300, 12.5, 132, 700, 2.2, HOPPER),
    "h100": _Row(450, 50, 132, 1275, 2.5, HOPPER),
    "h800-pcie": _Row(64, 12.5, 114, 650, 2.0, HOPPER),
    "h800": _Row(200, 50, 132, 1275, 2.5, HOPPER),
    "h200": _Row(450, 50, 132, 1275, 3.0, HOPPER),
    "h20": _Row(450, 50, 78, 900, 1.5, HOPPER),
    "gb200": _Row(900, 50, 148, 1900, 5.0),
    "b200": _Row(900, 50, 148, 1790, 4.0),
    "l40s": _Row(32, 6.25, 142, 550, 1.0),
    "l40": _Row(32, 6.25, 142, 500, 0.8),
    "l4": _Row(32, 6.25, 58, 200, 0.5),
    "rtx-3090": _Row(32, 1.25, 82, 500, 0.3),
    "rtx-4090": _Row(32, 1.25, 128, 600, 0.5),
    "rtx-5090": _Row(64, 1.25, 170, 750, 0.8),
    "mi250x": _Row(50, 12.5, 110, 500, 0.8),
    "mi300x": _Row(448, 50, 304, 1200, 2.5),
    "mi325x": _Row(448, 50, 304, 1400, 3.0),
}


ABOVE_ZERO = (
    *("node_size", "multiprocessors", "intra_gb_per_s", "inter_gb_per_s", "memory_gib", "bandwidth_gb_per_s"),
    *("storage_gb_per_s", "host_gb_per_s"),
    *("bf16", "fp32", "matmul", "attention", "memory", "intra", "inter"),
)


def find_machine(gpu: str, node_size: int | None = None, overrides: Path | None = None) -> Machine:
    """Machine with accelerators named `gpu`, changed by a YAML file and by `node_size`.

    Raises:
        RequestError: the name is unknown (the message lists the known ones), or the file does not fit.
    """
    hardware = find_hardware(gpu)
    if hardware is None:
        names = ", ".join(known.name for known in known_hardware())
        raise RequestError(f"unknown GPU {gpu!r}; known are {names}")
    row = TABLE[hardware.name]
    machine = Machine(
        hardware=hardware,
        node_size=row.node_size,
        intra_gb_per_s=row.intra,
        inter_gb_per_s=row.inter,
        multiprocessors=row.multiprocessors,
        power_w=row.power,
        price_per_hour=row.price,
        efficiency=row.efficiency or Efficiency(),
        source="published iteration times" if row.efficiency else "not calibrated: general defaults",
    )
    if overrides is not None:
        machine = override(machine, overrides)
    return machine if node_size is None else dataclasses.replace(machine, node_size=node_size)


def override(machine: Machine, path: Path) -> Machine:
    """`machine` with the fields of a hardware YAML file.

    The file has fields of `Machine`, and `hardware:`, `efficiency:` and `software:` with fields of theirs.

    Raises:
        RequestError: the file cannot be read, or has an unknown field or a value of the wrong kind.
    """
    try:
        text = read_yaml(path)
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"cannot read hardware file {path}: {' '.join(str(error).split())}") from None
    values = parse_yaml(text, f"cannot read hardware file {path}")
    if not isinstance(values, dict):
        raise RequestError(f"hardware file {path} has to be a mapping of fields, such as 'intra_gb_per_s: 300'")
    return dataclasses.replace(_replace(machine, values, str(path)), source=str(path))


def _replace(thing: D, values: JsonObject, where: str) -> D:
    fields = {field.name: field for field in dataclasses.fields(thing)}
    changes: dict[str, object] = {}
    for name, value in values.items():
        if name not in fields:
            raise RequestError(f"{where}: unknown field {name!r}; known are {', '.join(fields)}")
        old = getattr(thing, name)
        if dataclasses.is_dataclass(old) and not isinstance(old, type):
            if not isinstance(value, dict):
                raise RequestError(f"{where}: {name} has to be a mapping of fields, not {value!r}")
            changes[name] = _replace(old, value, f"{where}: {name}")
        else:
            changes[name] = _checked(name, str(fields[name].type), value, where)
    return dataclasses.replace(thing, **changes)


def _checked(name: str, kind: str, value: Json, where: str) -> str | bool | float:
    if kind == "str":
        return str(value)
    if kind == "bool":
        if not isinstance(value, bool):
            raise RequestError(f"{where}: {name} has to be true or false, not {value!r}")
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
        raise RequestError(f"{where}: {name} has to be a number of at least 0, not {value!r}")
    if value == 0 and name in ABOVE_ZERO:
        raise RequestError(f"{where}: {name} has to be above 0")
    if kind == "int" and value != int(value):
        raise RequestError(f"{where}: {name} has to be a whole number, not {value!r}")
    return int(value) if kind == "int" else float(value)
