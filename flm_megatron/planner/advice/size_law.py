"""One loss law of all sizes, fitted to runs of at least three."""

from __future__ import annotations

import numpy as np

from flm_megatron.errors import RequestError
from flm_megatron.planner.loss_law import SizeLaw

COARSE = np.arange(0.05, 1.0001, 0.025)
FINE = 0.0025
"""Steps of the exponents: of the grid, and of the one around its best."""


def fit_size_law(parameters: np.ndarray, tokens: np.ndarray, losses: np.ndarray) -> SizeLaw:
    """Least squares over floor and both scales, none below 0, for each pair of exponents of a grid.

    All are [points]: parameters of the run's model, its tokens so far, its loss there in nats.

    Raises:
        RequestError: the losses do not fall with both.
    """
    best = _best(parameters, tokens, losses, COARSE, COARSE)
    around = np.arange(-10, 11) * FINE
    return _best(parameters, tokens, losses, best.size_exponent + around, best.exponent + around)


def _best(
    parameters: np.ndarray, tokens: np.ndarray, losses: np.ndarray, of_size: np.ndarray, of_tokens: np.ndarray
) -> SizeLaw:
    smallest, fewest = parameters.min(), tokens.min()  # in units of which the columns are of order 1
    by_size = (parameters / smallest) ** -of_size[:, None]
    by_tokens = (tokens / fewest) ** -of_tokens[:, None]
    pairs = np.broadcast_shapes((len(of_size), 1, len(tokens)), (1, len(of_tokens), len(tokens)))
    columns = np.stack(
        [np.ones(pairs), np.broadcast_to(by_size[:, None], pairs), np.broadcast_to(by_tokens[None], pairs)], axis=-1
    )
    normal, right = columns.swapaxes(-1, -2) @ columns, columns.swapaxes(-1, -2) @ losses
    solved = (np.linalg.pinv(normal, hermitian=True) @ right[..., None])[..., 0]
    errors = (((columns @ solved[..., None])[..., 0] - losses) ** 2).sum(-1)
    usable = (solved[..., 0] >= 0) & (solved[..., 1:] > 0).all(-1) & (of_size > 0)[:, None] & (of_tokens > 0)
    if not usable.any():
        raise RequestError("the pilots' losses do not fall with size and tokens as a loss law does; train them longer")
    row, column = np.unravel_index(np.where(usable, errors, np.inf).argmin(), errors.shape)
    floor, size_scale, scale = (float(value) for value in solved[row, column])
    a, b = float(of_size[row]), float(of_tokens[column])
    return SizeLaw(floor, size_scale * float(smallest) ** a, a, scale * float(fewest) ** b, b)
