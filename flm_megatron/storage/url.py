"""What a URL of a store is, and how it is shown: without whatever in it may be a secret."""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path

from flm_megatron.paths import FilePath

SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
IN_TEXT = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>`]+")
HIDDEN = "***"


def is_url(path: FilePath) -> bool:
    """Whether `path` is SCHEME://…, and no path of this machine."""
    return isinstance(path, str) and SCHEME.match(path) is not None


def join(root: str, *names: str) -> str:
    """The URL of an object below another."""
    return "/".join([root.rstrip("/"), *names])


def name_of(path: FilePath) -> str:
    """The last part of a URL or a path."""
    return posixpath.basename(str(path).rstrip("/")) if is_url(path) else Path(path).name


def shown(url: FilePath) -> str:
    """A path as it is, and a URL for logs, errors and files: user, password, query and fragment are left out."""
    text = os.fspath(url)
    if not is_url(text):
        return text
    start, _, rest = text.partition("://")
    rest, hidden = re.split(r"[?#]", rest, maxsplit=1)[0], re.search(r"[?#]", rest) is not None
    host, slash, path = rest.partition("/")
    kept = _host(host, web=start.lower() in ("http", "https"))
    return f"{start}://{kept}{slash}{path}" + (f"?{HIDDEN}" if hidden else "")


def _host(host: str, web: bool) -> str:
    """CONTAINER@ACCOUNT of abfs:// is a name; what has a password, or stands before a host of the web, is none."""
    user, at, name = host.rpartition("@")
    return f"{HIDDEN}@{name}" if at and (web or ":" in user) else host


def redacted(text: str) -> str:
    """`text` with every URL in it `shown`, and without the values of this process's secret variables."""
    text = IN_TEXT.sub(lambda found: shown(found[0]), text)
    for secret in _secrets():
        text = text.replace(secret, HIDDEN)
    return text


SECRET_NAME = re.compile(
    r"SECRET|PASSWORD|PASSWD|TOKEN|API_?KEY|ACCOUNT_KEY|CONNECTION_STRING|SAS|OTLP\w*HEADERS", re.IGNORECASE
)
SHORTEST_SECRET = 8


def _secrets() -> list[str]:
    """Values of the environment that are secrets by their names, the longest first."""
    values = (value for name, value in os.environ.items() if SECRET_NAME.search(name))
    return sorted({value for value in values if len(value) >= SHORTEST_SECRET}, key=len, reverse=True)
