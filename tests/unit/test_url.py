"""URLs are told from paths, and shown without what may be secret."""

from __future__ import annotations

import sys
from unittest.mock import patch

import pytest

from flm_megatron.errors import RequestError
from flm_megatron.storage.store import require_url
from flm_megatron.url import is_url, join, name_of, redacted, shown


def test_urls_and_paths_are_told_apart() -> None:
    assert [is_url(path) for path in ("s3://b/k", "memory://x", "/a/b", "a", "C:/x", "a//b")] == [True] * 2 + [
        False
    ] * 4
    assert join("s3://b/k/", "a", "b") == "s3://b/k/a/b"
    assert [name_of(path) for path in ("s3://b/k/", "/a/b", "s3://b")] == ["k", "b", "b"]


@pytest.mark.parametrize(
    ("url", "seen"),
    [
        ("s3://bucket/key with space", "s3://bucket/key with space"),
        ("s3://AKIA:canary@bucket/key", "s3://***@bucket/key"),
        ("https://h/x?X-Amz-Signature=canary&b=1", "https://h/x?***"),
        ("https://canary@h/x", "https://***@h/x"),
        ("https://h/x#canary", "https://h/x?***"),
        ("abfs://container@account.dfs.core.windows.net/x", "abfs://container@account.dfs.core.windows.net/x"),
        ("/a/b?c", "/a/b?c"),
    ],
)
def test_what_may_be_secret_is_left_out(url: str, seen: str) -> None:
    assert (
        shown(url) == seen
        and redacted(f"see '{url.replace(' ', '_')}', twice") == f"see '{seen.replace(' ', '_')}', twice"
    )


def test_secrets_of_the_environment_are_left_out_of_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary/1+2=")
    monkeypatch.setenv("WANDB_API_KEY", "canary/1+2=longer")
    assert redacted("signed by canary/1+2=longer and canary/1+2=, by me") == "signed by *** and ***, by me"


@pytest.mark.parametrize(
    ("url", "line"),
    [
        ("s3://AKIA:canary@bucket/key", r"output s3://\*\*\*@bucket/key holds a user, password.*AWS_PROFILE"),
        ("https://h/x?sig=canary", r"output https://h/x\?\*\*\* holds a user, password"),
        ("s3:///key", "names no bucket"),
        ("tape://bucket/key", "tape:// is no kind of store"),
    ],
)
def test_bad_urls_are_refused_in_one_line(url: str, line: str) -> None:
    with pytest.raises(RequestError, match=line) as refusal:
        require_url(url, "output")
    assert "canary" not in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_missing_package_is_named() -> None:
    with patch.dict(sys.modules, {"gcsfs": None}), pytest.raises(RequestError, match="pip install gcsfs"):
        require_url("gs://bucket/key", "output")


@pytest.mark.parametrize(
    "name", ["DB_PASS", "DEPLOY_PRIVATE_KEY", "SSH_PASSPHRASE", "GITHUB_PAT", "MY_BEARER", "HF_TOKEN"]
)
def test_variables_that_are_secrets_by_their_names_are_hidden(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "correct-horse")
    monkeypatch.setenv("MODEL_PATH", "battery-staple")
    assert redacted("correct-horse battery-staple") == "*** battery-staple"
