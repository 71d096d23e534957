"""Which old layer each layer of the deeper model comes from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flm_megatron.config.schema import GrowthConfig
from flm_megatron.errors import RequestError


@dataclass(frozen=True)
class LayerSource:
    """Where one layer of the grown model comes from.

    `source` is the old layer's index, none for a layer that is drawn at random. `copy` says that the layer is new: a
    copy of its source, or drawn; else it is the old layer itself.
    """

    source: int | None
    copy: bool

    def __str__(self) -> str:
        return "random" if self.source is None else f"{self.source} (copy)" if self.copy else str(self.source)


def select_layers(
    old_layers: int, new_layers: int, growth: GrowthConfig, distances: Sequence[float] | None = None
) -> tuple[LayerSource, ...]:
    """Source of every new layer, in the order of the new model.

    Every old layer appears once as the original, in its old order. `distance` copies the layers with the smallest of
    `distances` (one number per old layer), `interleave` spreads copies evenly, `top` copies the last layers and `list`
    those of `growth.copied_layers`; each copy follows its source. `stack` puts copies of layers 0, 1, 2, ... on top,
    `middle` repeats the middle layers, as a block behind themselves. If there are more copies than old layers, copying
    starts over, so any ratio is possible. With `layers: random` the same places are filled by layers without a source,
    as are all places where there is no old layer.

    Raises:
        RequestError: distances or the list of copied layers are missing or do not fit the layers.
    """
    extra = new_layers - old_layers
    if not old_layers:
        if growth.selection == "list" and growth.copied_layers:
            raise RequestError(
                f"growth.copied_layers names layer {growth.copied_layers[0]}, but the old model has no layers: leave "
                "copied_layers out"
            )
        return (LayerSource(None, True),) * extra
    if growth.selection in ("stack", "middle"):
        sources = _repeated_block(old_layers, extra, in_the_middle=growth.selection == "middle")
    else:
        counts = _copies(old_layers, extra, growth, distances)
        sources = [LayerSource(i, k > 0) for i in range(old_layers) for k in range(1 + counts[i])]
    if growth.layers == "random":
        sources = [LayerSource(None, True) if layer.copy else layer for layer in sources]
    return tuple(sources)


def _repeated_block(old_layers: int, extra: int, in_the_middle: bool) -> list[LayerSource]:
    """The old layers, with `extra` copies behind the last of them or, of the middle ones, behind these."""
    first = max(old_layers - extra, 0) // 2 if in_the_middle else 0
    end = min(first + extra, old_layers) if in_the_middle else old_layers
    originals = [LayerSource(i, False) for i in range(old_layers)]
    copies = [LayerSource(first + i % (end - first), True) for i in range(extra)]
    return originals[:end] + copies + originals[end:]


def _copies(old_layers: int, extra: int, growth: GrowthConfig, distances: Sequence[float] | None) -> list[int]:
    """How many copies each old layer gets."""
    if extra == 0:
        return [0] * old_layers
    if growth.selection == "list":
        return _listed(old_layers, extra, growth.copied_layers)
    if growth.selection == "interleave":
        return [(i + 1) * extra // old_layers - i * extra // old_layers for i in range(old_layers)]
    top = growth.selection == "top"
    order = list(range(old_layers))[::-1] if top else _by_distance(old_layers, distances)
    counts = [extra // old_layers] * old_layers
    for i in order[: extra % old_layers]:
        counts[i] += 1
    return counts


def _by_distance(old_layers: int, distances: Sequence[float] | None) -> list[int]:
    """Old layers in order of closeness to the identity; ties go to the lower index. One layer needs no distance."""
    if old_layers < 2:
        return list(range(old_layers))
    if distances is None:
        raise RequestError(
            "growth.layer_selection is `distance`, but no layer distances were measured: measure them with "
            "`flm distance`, or choose interleave, top, stack or list"
        )
    if len(distances) != old_layers:
        raise RequestError(f"{len(distances)} layer distances were given for {old_layers} layers: give one per layer")
    return sorted(range(old_layers), key=lambda i: (distances[i], i))


def _listed(old_layers: int, extra: int, copied: list[int] | None) -> list[int]:
    """Number of mentions of each layer."""
    if copied is None or len(copied) != extra:
        raise RequestError(
            f"growth.copied_layers names {len(copied or [])} layers, but growing {old_layers} layers to "
            f"{old_layers + extra} needs {extra} copies: name {extra} (a layer may be named more than once)"
        )
    wrong = [i for i in copied if not 0 <= i < old_layers]
    if wrong:
        raise RequestError(
            f"growth.copied_layers names layer {wrong[0]}, but the old model has layers 0 to {old_layers - 1}"
        )
    return [copied.count(i) for i in range(old_layers)]
