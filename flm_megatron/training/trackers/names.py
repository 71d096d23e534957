"""Trackers by the names that the run file gives."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

from flm_megatron.config.messages import nearest
from flm_megatron.errors import RequestError
from flm_megatron.training.trackers.tracker import Tracker
from flm_megatron.training.trackers.trial import FIELD, require_own
from flm_megatron.training.user_class import user_class

HERE = __name__.rpartition(".")[0]
KNOWN = {
    "wandb": ("wandb", f"{HERE}.wandb_run.WandbTracker"),
    "mlflow": ("mlflow", f"{HERE}.mlflow_run.MlflowTracker"),
}
"""The library that each needs, and its class."""


def load_tracker(name: str) -> type[Tracker]:
    """The class of a tracker, whose library is imported; for the tracker's own process.

    Raises:
        RequestError: it is not installed, or the user's class cannot be used.
    """
    if name not in KNOWN:
        return user_class(name, Tracker, FIELD)
    require_tracker(name)
    module, _, found = KNOWN[name][1].rpartition(".")
    tracker: type[Tracker] = getattr(import_module(module), found)
    return tracker


def require_tracker(name: str) -> None:
    """Check that a tracker is there, without importing its library; the user's class is tried in another process.

    Raises:
        RequestError: no tracker has this name, its library is not installed, or the user's class cannot be used.
    """
    if name not in KNOWN:
        if "." not in name:
            raise RequestError(
                f"{FIELD}: no tracker is called {name!r}, {nearest(name, KNOWN)}; or give PACKAGE.MODULE.CLASS of yours"
            )
        require_own(name)
    elif find_spec(KNOWN[name][0]) is None:
        raise RequestError(f"{FIELD}: {name} is not installed: pip install 'flm_megatron[trackers]'")
