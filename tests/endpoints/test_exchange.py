"""Addresses, keys, Retry-After and what an answer means."""

from __future__ import annotations

import datetime

import pytest

from deepalign.endpoints.exchange import Fault, read_answer, retry_after
from deepalign.endpoints.servers import Server
from deepalign.errors import UserError

NOW = datetime.datetime(2026, 11, 27, 12, 0, 0, tzinfo=datetime.UTC)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after": "-3"}, 0.0),
        ({"retry-after": "86400"}, 120.0),
        ({"retry-after": "inf"}, 120.0),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "Fri, 27 Nov 2026 12:00:30 GMT"}, 30.0),
        ({"retry-after": "Fri, 27 Nov 2026 11:00:00 GMT"}, 0.0),
        ({"retry-after": "Fri, 27 Nov 2026 12:00:30 -0000"}, 30.0),
        ({"retry-after-ms": "250", "retry-after": "9"}, 0.25),
    ],
)
def test_retry_after(headers: dict[str, str], seconds: float | None) -> None:
    assert retry_after(headers, NOW) == seconds


@pytest.mark.parametrize(
    ("url", "kept"),
    [
        ("http://127.0.0.1:8080/v1/", "http://127.0.0.1:8080/v1"),
        ("127.0.0.1:8080/v1", "http://127.0.0.1:8080/v1"),
        ("localhost:8080", "http://localhost:8080"),
        ("https://host/openai/v1/chat/completions", "https://host/openai/v1"),
        ("http://[::1]:8080/v1", "http://[::1]:8080/v1"),
    ],
)
def test_addresses_are_kept_without_what_does_not_belong(url: str, kept: str) -> None:
    assert Server(url=url).url == kept


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("", "no address|cannot be read"),
        ("ftp://host/v1", "no address"),
        ("http://host:port/v1", "cannot be read"),
        ("http://", "no address"),
        ("http://host/v1?api-key=hunter2", "behind its path"),
        ("http://user:hunter2@host/v1", "holds a user or a password"),
        ("user:hunter2@host/v1", "holds a user or a password"),
    ],
)
def test_addresses_that_cannot_be_used_are_told_without_their_secret(url: str, told: str) -> None:
    with pytest.raises(UserError, match=told) as refused:
        Server(url=url)
    assert "hunter2" not in str(refused.value)


def test_a_key_given_as_the_name_of_its_variable_is_not_repeated() -> None:
    with pytest.raises(UserError, match="give the name") as refused:
        Server(url="http://host/v1", key_env="sk-hunter2")
    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize("url", ["http://127.0.0.2/v1", "http://localhost:1", "http://[::1]:1/v1", "http://0.0.0.0:1"])
def test_this_machine(url: str) -> None:
    assert Server(url=url).loopback
    assert not Server(url="http://10.0.0.1/v1").loopback


def test_keys_become_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(url="http://host/v1", key_env="SOME_KEY")
    assert server.headers() == {}
    for key, header in [(" abc\n", "Bearer abc"), ("Basic dTpw", "Basic dTpw")]:
        monkeypatch.setenv("SOME_KEY", key)
        assert server.headers() == {"Authorization": header}
    monkeypatch.setenv("SOME_KEY", "schlüssel")
    with pytest.raises(UserError, match="key in SOME_KEY holds characters"):
        server.headers()


@pytest.mark.parametrize(
    ("status", "content", "kind"),
    [
        (200, b'{"error": {"message": "overloaded", "code": 529}}', "passing"),
        (200, b'{"error": "no idea"}', "passing"),
        (200, b'{"error": {"message": "bad", "code": 400}}', "request"),
        (200, b"[1, 2]", "passing"),
        (200, b"\xff\xfe", "passing"),
        (200, b'{"choices": "none"}', "passing"),
        (200, b"[" * 100_000, "passing"),
        (408, b"", "passing"),
        (425, b"", "passing"),
        (503, b"loading", "passing"),
        (429, b"", "busy"),
        (429, b'{"error": {"code": "insufficient_quota", "message": "pay"}}', "server"),
        (404, b'{"detail": "Not Found"}', "server"),
        (301, b"", "request"),
        (413, b"", "request"),
    ],
)
def test_what_an_answer_means(status: int, content: bytes, kind: str) -> None:
    found = read_answer(Server(url="http://host/v1"), "chat/completions", status, {}, content)
    assert isinstance(found, Fault)
    assert found.kind == kind
    assert "\n" not in found.reason


def test_a_key_is_hidden_before_the_text_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-0123456789")
    content = b'{"error": {"message": "' + b"x" * 295 + b'sk-0123456789"}}'
    found = read_answer(Server(url="http://host/v1"), "chat/completions", 500, {}, content)
    assert isinstance(found, Fault)
    assert "sk-01" not in found.reason
