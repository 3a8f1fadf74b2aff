"""Finding out what a server is: whether its address lacks /v1, and which model it serves."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import httpx2

from deepalign.endpoints.servers import Server
from deepalign.errors import UserError, first_line

_TRIES = 3
_NAMED = 5


def open_connections(server: Server, *, most: int, timeout_seconds: float) -> httpx2.AsyncClient:
    """A client of one server; proxies of the environment are kept away from this machine's own addresses."""
    try:
        return httpx2.AsyncClient(
            trust_env=not server.loopback,
            timeout=httpx2.Timeout(timeout_seconds, connect=min(timeout_seconds, 15.0), pool=None),
            limits=httpx2.Limits(max_connections=most, max_keepalive_connections=most),
        )
    except (ImportError, ValueError, httpx2.InvalidURL) as error:
        raise UserError(f"no client for {server.url}: {first_line(error)}; see the proxy variables") from error


def discover(server: Server, *, timeout_seconds: float = 15.0) -> Server:
    """The server with its address completed and its model named.

    Raises:
        UserError: It is not there, wants another key, or serves several models and none was named.
    """
    if server.versioned and server.model:
        return server
    addresses = [server.url] if server.versioned else [f"{server.url}/v1", server.url]
    told = ""
    for address in addresses:
        candidate = dataclasses.replace(server, url=address)
        status, names = _models(candidate, timeout_seconds)
        if status == 200 and names is not None:
            return dataclasses.replace(candidate, model=server.model or _only(candidate, names))
        if status == 401:
            raise UserError(candidate.why_refused())
        told = f"answers {status}" if status != 200 else "gives no list of models"
    if server.model:
        # Some servers list nothing; whether the address is right shows with the first request.
        return server
    raise UserError(
        f"{addresses[-1]}/models {told}; give the address as http://HOST:PORT/v1, and the model's name as MODEL@URL"
    )


def _only(server: Server, names: list[str]) -> str:
    if len(names) == 1:
        return names[0]
    shown = ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")
    raise UserError(f"{server.url} serves {len(names)} models ({shown}); name one, as MODEL@URL")


def _models(server: Server, timeout_seconds: float) -> tuple[int, list[str] | None]:
    """Status of the list of models, and their names where it is one."""
    for attempt in range(_TRIES):
        try:
            with httpx2.Client(trust_env=not server.loopback, timeout=timeout_seconds) as client:
                answer = client.get(server.address("models"), headers=server.headers())
            break
        except (httpx2.TransportError, httpx2.InvalidURL, ImportError, ValueError) as error:
            if attempt + 1 == _TRIES or not isinstance(error, httpx2.TransportError):
                told = server.hide(first_line(error))
                raise UserError(f"{server.url} cannot be reached ({told}); is the server running?") from error
    try:
        listed: Any = json.loads(answer.content)
        return answer.status_code, [str(model["id"]) for model in listed["data"]]
    except (ValueError, LookupError, TypeError, RecursionError):
        return answer.status_code, None
