"""What is wrong with a run file, a line per mistake: full path, offending value, what is expected."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from flm_megatron.config.fields import all_fields, resolve_field, section_of, type_words


def explain(error: ValidationError, of: tuple[str, ...] = ()) -> list[str]:
    """One line for every mistake; unknown keys come first, for they are often the cause of what is missing.

    `of` is where in the run file the validated data stands.
    """
    mistakes = sorted(error.errors(include_url=False), key=lambda mistake: not _is_unknown(mistake))
    # A value that fits none of several types is a mistake for each of them, in the same words.
    return list(dict.fromkeys(_explain_one({**mistake, "loc": (*of, *mistake["loc"])}) for mistake in mistakes))


def _is_unknown(mistake: ErrorDetails) -> bool:
    return mistake["type"] in ("unexpected_keyword_argument", "extra_forbidden")


def _explain_one(mistake: ErrorDetails) -> str:
    location: tuple[str | int, ...] = mistake["loc"]
    if _is_unknown(mistake):
        return f"{dotted(location)}: unknown key, {_nearest_key(location)}"
    path, annotation = resolve_field(location)
    words = type_words(annotation)
    if mistake["type"] == "missing" and dotted(location) == path:
        return f"{path}: missing, expected {words}"
    if mistake["type"] == "finite_number":
        words = "finite number"
    place = path if mistake["type"] == "missing" else dotted(location)
    value = mistake["input"]
    return f"{place}: {_shown(value)} does not fit, expected {words}{_hint(value, words)}"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _hint(value: object, words: str) -> str:
    if words.startswith("text") and isinstance(value, int | float | bool):
        return " (put it in quotes)"
    if words.endswith("null") and value == "none":
        return " (write null)"
    return ""


def dotted(location: Iterable[str | int]) -> str:
    """A place in the run file as it is written on the command line."""
    return ".".join(map(str, location))


def _nearest_key(location: Sequence[str | int]) -> str:
    """Nearest known key of the same section, or where a key of this name lives."""
    key = str(location[-1])
    _, annotation = resolve_field(location[:-1])
    section = section_of(annotation)
    assert section is not None, f"{location} is not in a section"
    known = [*section.__pydantic_fields__]  # type: ignore[attr-defined]
    close = get_close_matches(key, known, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    elsewhere = [field.path for field in all_fields() if field.path.split(".")[-1] == key]
    if elsewhere:
        return f"but there is {', '.join(elsewhere)}"
    return f"known here: {', '.join(known)}"


def nearest(name: str, known: Iterable[str]) -> str:
    """Text that names the known word nearest to `name`, or all of them."""
    names = sorted(known)
    close = get_close_matches(name, names, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"
