"""How the logical tensors lie in a family's: bands of rows, the same in every layer.

A logical tensor is cut into bands of whole rows, each of which is a band of rows of one Hugging Face tensor: the
query-key-value matrix has, per query group, the rows of its queries, its key and its value; the first feed-forward
matrix has all gate rows, then all up rows; everything else is one band. The order of the channels of a head is the
same on both sides, because both rotate the two halves of a head against each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from flm_megatron.checkpoint.hugging_face.families.family import Modules
from flm_megatron.checkpoint.logical import Region
from flm_megatron.config.schema import ModelConfig
from flm_megatron.errors import RequestError
from flm_megatron.model.parameters import ParameterSpec, parameter_specs
from flm_megatron.model.parameters.spec import Place


@dataclass(frozen=True)
class Band:
    """Rows `row` to `row + rows` of a logical tensor (of one layer, if stacked) are the rows of `target` from
    `target_row` on; `target` has `{layer}` in its name if the logical tensor is stacked."""

    target: str
    target_row: int
    row: int
    rows: int


@dataclass(frozen=True)
class RegionPair:
    """A region of a logical tensor, and the region of the Hugging Face tensor `target` with the same values."""

    target: str
    target_region: Region
    region: Region


@dataclass(frozen=True)
class TargetTensor:
    """A Hugging Face tensor: its shape, the logical tensor it is part of, and the layer (none if not stacked).

    Files may hold padding rows after those of a `padded` one.
    """

    shape: tuple[int, ...]
    source: str
    layer: int | None
    bands: tuple[Band, ...]
    padded: bool

    def sources(self, first: int, rows: int) -> Iterator[tuple[int, Region]]:
        """Regions of the logical tensor that are rows `first` to `first + rows`, each with its first row."""
        for band in self.bands:
            start, end = max(first, band.target_row), min(first + rows, band.target_row + band.rows)
            if start < end:
                row = band.row + start - band.target_row
                offsets, sizes = (row, *(0 for _ in self.shape[1:])), (end - start, *self.shape[1:])
                if self.layer is not None:
                    offsets, sizes = (self.layer, *offsets), (1, *sizes)
                yield start, Region(offsets, sizes)


def bands_of(model: ModelConfig, modules: Modules) -> dict[str, tuple[Band, ...]]:
    """The bands of every logical tensor of `model`, by its name, in a family's `modules`.

    Raises RequestError for a tensor that is in none of them.
    """
    return {name: tuple(_bands(spec, modules)) for name, spec in parameter_specs(model).items()}


def target_tensors(model: ModelConfig, modules: Modules) -> dict[str, TargetTensor]:
    """Every Hugging Face tensor of `model` by name, in the order of execution."""
    bands, specs = bands_of(model, modules), parameter_specs(model).values()
    numbers: dict[Place, Sequence[int | None]] = {"first": [None], "layers": range(model.num_layers), "last": [None]}
    return {
        name: target
        for place, layers in numbers.items()
        for layer in layers
        for spec in specs
        if spec.place == place
        for name, target in _targets(spec, bands, layer).items()
    }


def region_pairs(bands: tuple[Band, ...], stacked: bool, region: Region) -> Iterator[RegionPair]:
    """The regions of Hugging Face tensors that make up `region` of a logical tensor with these bands."""
    layers = range(region.offsets[0], region.offsets[0] + region.sizes[0]) if stacked else [None]
    row_axis = 1 if stacked else 0
    first, count = region.offsets[row_axis], region.sizes[row_axis]
    other_offsets, other_sizes = region.offsets[row_axis + 1 :], region.sizes[row_axis + 1 :]
    for layer in layers:
        lead = () if layer is None else (layer,)
        for band in bands:
            start, end = max(first, band.row), min(first + count, band.row + band.rows)
            if start < end:
                sizes = (end - start, *other_sizes)
                yield RegionPair(
                    band.target.format(layer=layer),
                    Region((band.target_row + start - band.row, *other_offsets), sizes),
                    Region((*lead, start, *other_offsets), (*(1 for _ in lead), *sizes)),
                )


def _targets(spec: ParameterSpec, bands: dict[str, tuple[Band, ...]], layer: int | None) -> dict[str, TargetTensor]:
    by_target: dict[str, list[Band]] = {}
    for band in bands[spec.name]:
        by_target.setdefault(band.target.format(layer=layer), []).append(band)
    trailing = spec.shape[2:] if spec.stacked else spec.shape[1:]
    return {
        target: TargetTensor((sum(band.rows for band in parts), *trailing), spec.name, layer, tuple(parts), spec.padded)
        for target, parts in by_target.items()
    }


def _bands(spec: ParameterSpec, modules: Modules) -> Iterator[Band]:
    """The bands of the axis of rows, each after those before it in the Hugging Face tensor it belongs to."""
    axis = spec.axes[1 if spec.stacked else 0]
    if spec.module not in modules:
        raise RequestError(f"{spec.name} has no Hugging Face form here: use `flm checkpoint reshard` instead")
    targets, row = modules[spec.module], 0
    filled = dict.fromkeys(targets.values(), 0)
    for _ in range(axis.groups):
        for band in axis.bands:
            module = targets[band.name]
            yield Band(f"{module}.{spec.value}", filled[module], row, band.size)
            row, filled[module] = row + band.size, filled[module] + band.size
