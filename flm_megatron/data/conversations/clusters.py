"""Groups of samples that a model sees alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy

from flm_megatron.errors import RequestError


def clusters(hidden: Mapping[int, Sequence[float]], count: int, seed: int) -> dict[int, int]:
    """Cluster of each sample by k-means over its hidden state, scaled to length 1; at most `count` clusters.

    Raises:
        RequestError: `count` is below 1, or scikit-learn is not installed.
    """
    if count < 1:
        raise RequestError(f"{count} clusters: give at least 1")
    try:
        from sklearn.cluster import KMeans
    except ImportError:
        raise RequestError("clusters are made by scikit-learn, which is not installed: install it") from None
    if not hidden:
        return {}
    rows = numpy.array(list(hidden.values()), dtype=numpy.float64)
    rows /= numpy.maximum(numpy.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    labels = KMeans(min(count, len(rows)), n_init=4, random_state=seed).fit_predict(rows)
    return {index: int(label) for index, label in zip(hidden, labels, strict=True)}
