"""Which names that a checkpoint gives for its own files are opened: those of files in its own folder."""

from __future__ import annotations


def is_file_name(name: object) -> bool:
    """Whether `name` is text that names an entry of a folder: no path, not the folder itself or the one above."""
    return isinstance(name, str) and name not in ("", ".", "..") and not any(c in name for c in "/\\\0")
