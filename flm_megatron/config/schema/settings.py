"""What all dataclasses of the run file have in common."""

from __future__ import annotations

from pydantic import ConfigDict

SETTINGS = ConfigDict(extra="forbid", use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False)
