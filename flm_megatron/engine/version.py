"""Which versions of megatron-core this program works with; looked up without importing it."""

from __future__ import annotations

import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version

from flm_megatron.errors import RequestError

SUPPORTED = {"0.16": "0.16.1", "0.19": "0.19.2"}
"""Series that the tests run with, and the release of each that they ran with last."""
NEWEST_NEEDS = (3, 12)
"""Python that the newest series needs."""


def preferred() -> str:
    """The release to install under this Python."""
    return SUPPORTED["0.19" if sys.version_info >= NEWEST_NEEDS else "0.16"]


def require_engine() -> str:
    """The installed version, such as `0.16.1`.

    Raises:
        RequestError: it is not one of a supported series, or megatron-core is not there.
    """
    fix = f"install it with: pip install megatron-core=={preferred()}"
    try:
        installed = version("megatron-core")
    except PackageNotFoundError:
        raise RequestError(f"megatron-core is not installed; {fix}") from None
    if _series(installed) not in SUPPORTED:
        known = " or ".join(f"{series}.x" for series in SUPPORTED)
        raise RequestError(f"megatron-core {installed} is installed, but {known} is needed; {fix}")
    return installed


@cache
def since(major: int, minor: int) -> bool:
    """Whether the installed engine is of this series or a later one."""
    found = tuple(int(part) for part in _series(require_engine()).split("."))
    return found >= (major, minor)


def _series(installed: str) -> str:
    return ".".join(installed.split(".")[:2])
