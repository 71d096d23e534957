"""Which names that a checkpoint gives for its own files are opened: those of files in its own folder."""

from __future__ import annotations

LONGEST = 255  # bytes, of a name on any file system in use


def is_file_name(name: object) -> bool:
    """Whether `name` is text that names an entry of a folder: no path, not the folder itself or the one above."""
    if not isinstance(name, str) or name in ("", ".", "..") or any(c in name for c in "/\\\0"):
        return False
    return len(name.encode("utf-8", "replace")) <= LONGEST and not any("\ud800" <= c <= "\udfff" for c in name)
