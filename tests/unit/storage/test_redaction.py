"""Secrets are taken out of text."""

from __future__ import annotations

import pytest

from flm_megatron.url import redacted


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("GET https://key@host/x failed", "GET https://***@host/x failed"),
        ("abfs://container@account/x", "abfs://container@account/x"),
    ],
)
def test_a_user_of_the_web_is_a_secret_and_a_container_is_none(text: str, left: str) -> None:
    assert redacted(text) == left


def test_headers_of_exporters_are_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "authorization=0123456789")
    assert redacted("sent authorization=0123456789") == "sent ***"
