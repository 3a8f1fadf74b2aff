"""Batch files in OpenAI's format: requests written out, results read back, both keyed by content.

Owns the lines and the limits of a file. What a result means for the run is its reader's business.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from deepalign.endpoints.cache import key_of
from deepalign.endpoints.exchange import Fault, Request, read_answer
from deepalign.endpoints.servers import Server
from deepalign.errors import UserError
from deepalign.runs import clear_disk_errors, write_atomically

MOST_REQUESTS, MOST_BYTES = 50_000, 190_000_000
"""OpenAI takes 50,000 requests and 200 MB in one file."""
_COMES_LATER = frozenset({"batch_expired", "batch_cancelled", "batch_canceled"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """One line of a results file."""

    key: str
    status: Literal["ok", "failed", "open"]
    """Answered; wrong in itself; or not done yet, so that asking again is worth it."""
    body: dict[str, Any]
    reason: str = ""


def write_batch(path: Path, requests: Iterable[Request]) -> list[Path]:
    """Write requests, each once; more than one file takes go to FILE-2, FILE-3, ...

    Returns:
        The files.
    """
    parts: list[list[str]] = [[]]
    size, seen = 0, set()
    for request in requests:
        key = key_of(request)
        if key in seen:
            continue
        seen.add(key)
        row = {"custom_id": key, "method": "POST", "url": f"/v1/{request.path}", "body": request.body}
        line = json.dumps(row, ensure_ascii=True, separators=(",", ":")) + "\n"
        if len(parts[-1]) >= MOST_REQUESTS or size + len(line) > MOST_BYTES:
            parts.append([])
            size = 0
        parts[-1].append(line)
        size += len(line)
    paths = [path.with_stem(f"{path.stem}-{number}") if number > 1 else path for number in range(1, len(parts) + 1)]
    for place, lines in zip(paths, parts, strict=True):
        with clear_disk_errors(place):
            place.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(place, "".join(lines))
    return paths


def read_results(path: Path, server: Server) -> Iterator[Result]:
    """The results in a file, in its order; lines that are none are passed over.

    Args:
        path: OpenAI's output file, or its error file, or both in one.
        server: Whose key must not be kept.

    Raises:
        UserError: The file cannot be read, or holds no result at all.
    """
    found = False
    try:
        with path.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                result = _read_line(line, server)
                if result is not None:
                    found = True
                    yield result
    except OSError as error:
        raise UserError(f"{path}, batch results: cannot be read ({error.strerror or error})") from error
    if not found:
        raise UserError(f"{path} holds no results of a batch; give the output file that the batch API made")


def _read_line(line: str, server: Server) -> Result | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or not isinstance(row.get("custom_id"), str):
        return None
    key, response, error = row["custom_id"], row.get("response"), row.get("error")
    if not isinstance(response, dict):
        if not isinstance(error, dict):
            # A line of the requests, say: it has a name and no result.
            return None
        code = str(error.get("code") or "")
        reason = server.hide(str(error.get("message") or code or "no reason given"))[:300]
        return Result(key=key, status="open" if code in _COMES_LATER else "failed", body={}, reason=reason)
    status = response.get("status_code")
    content = json.dumps(response.get("body")).encode()
    answer = read_answer(server, "chat/completions", status if isinstance(status, int) else 500, {}, content)
    if isinstance(answer, Fault):
        final = answer.kind == "request"
        return Result(key=key, status="failed" if final else "open", body={}, reason=answer.reason)
    return Result(key=key, status="ok", body=answer)
