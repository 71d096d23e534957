"""How the logical tensors lie in a family's: bands of rows, the same in every layer.

A logical tensor is cut into bands of whole rows, each of which is a band of rows of one Hugging Face tensor, or of
columns where the family stores matrices transposed: the query-key-value matrix has, per query group, the rows of its
queries, its key and its value; the first feed-forward matrix has all gate rows, then all up rows; everything else is
one band. The order of the channels of a head is the same on both sides, because both rotate the two halves of a head
against each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from flm_megatron.checkpoint.hugging_face.families.family import Family
from flm_megatron.checkpoint.logical import Region
from flm_megatron.config.schema import ModelConfig
from flm_megatron.errors import RequestError
from flm_megatron.model.parameters import Axis, ParameterSpec, parameter_specs
from flm_megatron.model.parameters.axis import BandName
from flm_megatron.model.parameters.spec import Place


@dataclass(frozen=True)
class Band:
    """Rows `row` to `row + rows` of a logical tensor (of one layer, if stacked) are the rows of `target`, columns if it
    is `transposed`, from `target_row` on; `target` has `{layer}` in its name if the logical tensor is stacked."""

    target: str
    target_row: int
    row: int
    rows: int
    transposed: bool = False


@dataclass(frozen=True)
class RegionPair:
    """A region of a logical tensor, and the region of the Hugging Face tensor `target` with the same values, whose axes
    have changed places if it is `transposed`."""

    target: str
    target_region: Region
    region: Region
    transposed: bool


@dataclass(frozen=True)
class TargetTensor:
    """A Hugging Face tensor: its logical shape (rows first), the logical tensor it is part of, and the layer (none if
    not stacked).

    Files may hold padding rows after those of a `padded` one.
    """

    logical_shape: tuple[int, ...]
    source: str
    layer: int | None
    bands: tuple[Band, ...]
    padded: bool

    @property
    def transposed(self) -> bool:
        """Whether it is stored with its columns first."""
        return self.bands[0].transposed

    @property
    def shape(self) -> tuple[int, ...]:
        """The stored shape."""
        return self.logical_shape[::-1] if self.transposed else self.logical_shape

    def sources(self, first: int, rows: int) -> Iterator[tuple[int, Region]]:
        """Regions of the logical tensor that are rows `first` to `first + rows`, each with its first row."""
        for band in self.bands:
            start, end = max(first, band.target_row), min(first + rows, band.target_row + band.rows)
            if start < end:
                row = band.row + start - band.target_row
                trailing = self.logical_shape[1:]
                offsets, sizes = (row, *(0 for _ in trailing)), (end - start, *trailing)
                if self.layer is not None:
                    offsets, sizes = (self.layer, *offsets), (1, *sizes)
                yield start, Region(offsets, sizes)


def bands_of(model: ModelConfig, family: Family) -> dict[str, tuple[Band, ...]]:
    """The bands of every logical tensor of `model`, by its name, in a family's modules.

    Raises RequestError for a tensor that is in none of them.
    """
    return {name: tuple(_bands(spec, family)) for name, spec in parameter_specs(model).items()}


def target_tensors(model: ModelConfig, family: Family) -> dict[str, TargetTensor]:
    """Every Hugging Face tensor of `model` by name, in the order of execution."""
    bands, specs = bands_of(model, family), parameter_specs(model).values()
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
                there = (band.target_row + start - band.row, *other_offsets)
                turn = slice(None, None, -1 if band.transposed else 1)
                yield RegionPair(
                    band.target.format(layer=layer),
                    Region(there[turn], sizes[turn]),
                    Region((*lead, start, *other_offsets), (*(1 for _ in lead), *sizes)),
                    band.transposed,
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


def _bands(spec: ParameterSpec, family: Family) -> Iterator[Band]:
    """The bands of the axis of rows, each after those before it in the Hugging Face tensor it belongs to."""
    axis = spec.axes[1 if spec.stacked else 0]
    if spec.module not in family.modules:
        raise RequestError(f"{spec.name} has no Hugging Face form here: use `flm checkpoint reshard` instead")
    targets, row = family.modules[spec.module], 0
    starts = _starts(axis, targets, family.bands_by_kind)
    transposed = family.transposed and spec.kind == "matrix"
    for group in range(axis.groups):
        for number, band in enumerate(axis.bands):
            target = f"{targets[band.name]}.{spec.value}"
            yield Band(target, starts[group, number], row, band.size, transposed)
            row += band.size


def _starts(axis: Axis, targets: Mapping[BandName, str], by_kind: bool) -> dict[tuple[int, int], int]:
    """Where each band begins in the module that holds it, by its group and its number in the group."""
    order = [(group, number) for group in range(axis.groups) for number in range(len(axis.bands))]
    starts: dict[tuple[int, int], int] = {}
    filled = dict.fromkeys(targets.values(), 0)
    for group, number in sorted(order, key=lambda at: at[1]) if by_kind else order:
        band = axis.bands[number]
        starts[group, number] = filled[targets[band.name]]
        filled[targets[band.name]] += band.size
    return starts
