"""What is sent and what comes back: requests, replies, and what an HTTP answer means.

Owns the sorting of answers into good ones, passing faults and final ones. Knows nothing of time or of connections.
"""

from __future__ import annotations

import datetime
import email.utils
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from deepalign.endpoints.servers import Server

LONGEST_WAIT_SECONDS = 120.0
"""A server that asks for a longer pause is asked again after this."""
_PASSING = frozenset({408, 409, 425, 429})
_QUOTED = 300


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One call."""

    body: dict[str, Any]
    """The JSON to send; where it names no model, the server's is filled in."""
    path: str = "chat/completions"
    """Below the server's address; one that begins with "/" stands beside its /v1."""
    prefix: str = ""
    """What requests that begin alike share: they go to the same server, whose cache holds their beginning."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """What became of one request."""

    status: Literal["ok", "failed"]
    body: dict[str, Any] = field(default_factory=dict)
    """The JSON that came back; empty where the call failed."""
    reason: str = ""
    """Why it failed; never holds a key."""
    gave_up: bool = False
    """Whether tries ran out on passing faults: asked again later, it may well be answered."""
    tries: int = 0
    """Calls that were made."""
    seconds: float = 0.0
    """From the first call to the end, with the pauses between."""
    server: str = ""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """A call that gave nothing."""

    reason: str
    kind: Literal["passing", "busy", "request", "server"] = "passing"
    """Worth another try; not now; wrong in itself; or the server can answer nobody (no key, no model)."""
    wait: float | None = None
    """Seconds that the server asks for."""
    unreachable: bool = False
    """Whether no connection was made."""


def read_answer(
    server: Server, path: str, status: int, headers: Mapping[str, str], content: bytes
) -> dict[str, Any] | Fault:
    """The body of a good answer, or what was wrong with it."""
    if status != 200:
        return _fault(server, status, headers, content)
    try:
        body = json.loads(server.hide(content.decode("utf-8"), answer=True))
    except (ValueError, RecursionError):
        return Fault(reason="the server's answer is no JSON")
    if not isinstance(body, dict):
        return Fault(reason=f"the server's answer is no JSON object but {type(body).__name__}")
    error = body.get("error")
    if error:
        code = error.get("code") if isinstance(error, dict) else None
        told = code if isinstance(code, int) and 400 <= code < 600 else 500
        return _fault(server, told, headers, content)
    if path.rpartition("/")[2] == "completions" and not _has_choices(body):
        return Fault(reason="the server's answer holds no choices")
    return body


def _has_choices(body: Mapping[str, Any]) -> bool:
    choices = body.get("choices")
    return isinstance(choices, list) and bool(choices) and all(isinstance(choice, dict) for choice in choices)


def _fault(server: Server, status: int, headers: Mapping[str, str], content: bytes) -> Fault:
    said, code = _message(server, content)
    if status == 401:
        return Fault(reason=server.why_refused(), kind="server")
    if status == 403:
        return Fault(reason=f"HTTP 403: {server.url} does not allow this request", kind="request")
    if status == 404:
        hint = "" if server.versioned else "; does its address end with /v1?"
        return Fault(reason=f"HTTP 404: {server.url} has no such model or path{hint} {said}".strip(), kind="server")
    if status == 429 and "quota" in code:
        return Fault(reason=f"HTTP 429: {server.url} says that the quota is used up", kind="server")
    reason = f"HTTP {status}: {said}" if said else f"HTTP {status}"
    if status == 429 or (status == 503 and retry_after(headers) is not None):
        return Fault(reason=reason, kind="busy", wait=retry_after(headers))
    if status in _PASSING or status >= 500:
        return Fault(reason=reason, wait=retry_after(headers))
    return Fault(reason=reason, kind="request")


def _message(server: Server, content: bytes) -> tuple[str, str]:
    """What an error answer says, on one line and without the key, and its code."""
    # Hidden before it is cut, or half of a key would stay.
    text = server.hide(content.decode("utf-8", "replace"))
    code = ""
    try:
        body = json.loads(text)
        error = body.get("error", body) if isinstance(body, dict) else body
        if isinstance(error, dict):
            code = f"{error.get('code') or ''} {error.get('type') or ''}"
            text = str(error.get("message") or error.get("detail") or text)
        else:
            text = str(error)
    except (ValueError, RecursionError):
        pass
    return " ".join(server.hide(text).split())[:_QUOTED], code


def retry_after(headers: Mapping[str, str], now: datetime.datetime | None = None) -> float | None:
    """Seconds that a server asks to wait, bounded; None where it does not say.

    Args:
        headers: Of the answer; names in any case where the mapping allows it.
        now: The time, for tests.
    """
    if (milliseconds := _number(headers.get("retry-after-ms"))) is not None:
        return _bounded(milliseconds / 1000)
    told = headers.get("retry-after")
    if (seconds := _number(told)) is not None:
        return _bounded(seconds)
    if not told:
        return None
    try:
        moment = email.utils.parsedate_to_datetime(told)
    except ValueError:
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=datetime.UTC)
    return _bounded((moment - (now or datetime.datetime.now(datetime.UTC))).total_seconds())


def _number(text: str | None) -> float | None:
    try:
        value = float(text) if text else None
    except ValueError:
        return None
    return value if value is not None and value == value else None


def _bounded(seconds: float) -> float:
    return min(max(seconds, 0.0), LONGEST_WAIT_SECONDS)


def tokens(body: Mapping[str, Any], name: str) -> int | None:
    """A count of an answer's usage; None where the server gives none."""
    usage = body.get("usage")
    count = usage.get(name) if isinstance(usage, dict) else None
    return count if isinstance(count, int) and not isinstance(count, bool) else None
