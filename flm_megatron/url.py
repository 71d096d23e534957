"""What a URL of a store is, and how it is shown: without whatever in it may be a secret."""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path
from urllib.parse import urlsplit

from flm_megatron.errors import RequestError

SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
FilePath = str | os.PathLike[str]
"""How a function of the program is told of a file or a folder, or of an object by its URL."""
IN_TEXT = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>`]+")
HIDDEN = "***"
CONTAINERS = ("az", "abfs", "abfss", "wasb", "wasbs")
"""Schemes whose CONTAINER@ACCOUNT is a name."""
PLACES = (
    "keep keys in the environment or the files of the store's own library "
    "(AWS_PROFILE, ~/.aws, GOOGLE_APPLICATION_CREDENTIALS, AZURE_STORAGE_*)"
)


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
    user, at, name = host.rpartition("@")
    if at and (":" in user or start.lower() not in CONTAINERS):
        host = f"{HIDDEN}@{name}"
    return f"{start}://{host}{slash}{path}" + (f"?{HIDDEN}" if hidden else "")


def redacted(text: str) -> str:
    """`text` with every URL in it `shown`, and without the values of this process's secret variables."""
    text = IN_TEXT.sub(lambda found: shown(found[0]), text)
    for secret in _secrets():
        text = text.replace(secret, HIDDEN)
    return text


SECRET_NAME = re.compile(
    r"SECRET|PASSW(OR)?D|PASSPHRASE|_PASS$|_PAT$|BEARER|TOKEN(?!IZ)|API_?KEY|ACCOUNT_KEY|PRIVATE_KEY|CONNECTION_STRING"
    r"|_SAS|OTLP\w*HEADERS",
    re.IGNORECASE,
)
SHORTEST_SECRET = 8


def _secrets() -> list[str]:
    """Values of the environment that are secrets by their names, the longest first."""
    values = (value for name, value in os.environ.items() if SECRET_NAME.search(name))
    return sorted({value for value in values if len(value) >= SHORTEST_SECRET}, key=len, reverse=True)


def refuse_secret(url: str, what: str) -> None:
    """Check that `url` names something in a store and holds no secret; `what` names its field or option in errors.

    Raises:
        RequestError: it holds a user, a password or a query, or names no bucket.
    """
    if url != shown(url):
        raise RequestError(
            f"{what} {shown(url)} holds a user, password, key or query, which would be saved with the run: {PLACES}"
        )
    if not urlsplit(url).netloc and not url.startswith(("file://", "memory://")):
        raise RequestError(f"{what} {url} names no bucket: give {url.partition('://')[0]}://BUCKET/PATH")
