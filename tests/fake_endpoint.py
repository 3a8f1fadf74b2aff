"""An OpenAI-compatible server on loopback, and a proxy before a real one: both can be told to misbehave.

Faults: "429" (with Retry-After), "500", "hang" (no answer), "cut" (the connection closes half way), "not json",
"no choices", "slow" (a byte at a time, without end), "401 echo" (repeats the key that it was sent).
"""

from __future__ import annotations

import http.client
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

FAULTS = ("429", "500", "hang", "cut", "not json", "no choices", "slow")
Answer = Callable[[str, dict[str, Any]], tuple[int, Any]]
"""(path, body) -> (status, JSON value)."""


def say(text: str, *, prompt_tokens: int = 10, completion_tokens: int = 2, finish: str = "stop") -> dict[str, Any]:
    """A chat completion."""
    return {
        "object": "chat.completion",
        "model": "fake",
        "choices": [{"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text}}],
        "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens},
    }


def forward_to(url: str) -> Answer:
    """Answers of a real server."""
    parts = urlsplit(url)

    def answer(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=600)
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        found = connection.getresponse()
        return found.status, json.loads(found.read())

    return answer


def seeded_faults(rate: float, seed: int = 0, kinds: Sequence[str] = FAULTS) -> Callable[[int], str]:
    """A share of calls goes wrong, drawn anew for each."""
    rng = random.Random(seed)
    return lambda number: rng.choice(kinds) if rng.random() < rate else ""


class FakeEndpoint:
    """The server; use as a context manager. `calls` are the bodies that it answered or spoiled, in order."""

    def __init__(
        self,
        answer: Answer | str = "fine",
        *,
        faults: Callable[[int], str] | Sequence[str] = (),
        models: Sequence[str] = ("fake",),
        root: str = "/v1",
        retry_after: str = "0.05",
        hang_seconds: float = 3.0,
        seconds: float = 0.0,
    ) -> None:
        self._answer: Answer = answer if not isinstance(answer, str) else lambda path, body: (200, say(str(answer)))
        listed = list(faults) if not callable(faults) else []
        self._faults = faults if callable(faults) else lambda number: listed[number] if number < len(listed) else ""
        self.models, self.root = tuple(models), root
        self.retry_after, self.hang_seconds, self.seconds = retry_after, hang_seconds, seconds
        self.calls: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.headers: list[dict[str, str]] = []
        self.answered = 0
        self.faults: Counter[str] = Counter()
        self.most_at_once = 0
        self._at_once = 0
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_GET(self) -> None:
                fake._get(self)

            def do_POST(self) -> None:
                fake._post(self)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # a client that went away

        self._server = Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    @property
    def host(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def url(self) -> str:
        return self.host + self.root

    def __enter__(self) -> FakeEndpoint:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop listening; connections that come later are refused."""
        self._stopping.set()
        self._server.shutdown()
        self._server.server_close()

    def _get(self, handler: BaseHTTPRequestHandler) -> None:
        if handler.path == f"{self.root}/models":
            _send(handler, 200, {"object": "list", "data": [{"id": name, "object": "model"} for name in self.models]})
        else:
            _send(handler, 404, {"error": {"message": f"no {handler.path}", "code": 404}})

    def _post(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self._lock:
            number = len(self.calls)
            self.calls.append(body)
            self.times.append(time.monotonic())
            self.headers.append(dict(handler.headers))
            fault = self._faults(number)
            self.faults[fault or "none"] += 1
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            if fault:
                self._spoil(handler, fault)
            else:
                time.sleep(self.seconds)
                status, value = self._answer(handler.path, body)
                with self._lock:
                    self.answered += 1
                _send(handler, status, value)
        finally:
            with self._lock:
                self._at_once -= 1

    def _spoil(self, handler: BaseHTTPRequestHandler, fault: str) -> None:
        key = handler.headers.get("Authorization", "")
        if fault == "429":
            _send(handler, 429, {"error": {"message": "slow down"}}, {"Retry-After": self.retry_after})
        elif fault == "500":
            _send(handler, 500, {"error": {"message": f"out of memory while serving {key}"}})
        elif fault == "401 echo":
            _send(handler, 401, {"error": {"message": f"Incorrect API key provided: {key}"}})
        elif fault == "hang":
            self._stopping.wait(self.hang_seconds)
            handler.close_connection = True
        elif fault == "cut":
            handler.wfile.write(b'HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{"choices": [')
            handler.close_connection = True
        elif fault == "not json":
            _send_bytes(handler, 200, b"<html>Bad gateway</html>")
        elif fault == "no choices":
            _send(handler, 200, {"object": "chat.completion", "choices": []})
        elif fault == "slow":
            handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
            while not self._stopping.wait(0.05):
                handler.wfile.write(b" ")
        elif fault.isdigit():
            _send(handler, int(fault), {"error": {"message": f"told to answer {fault}"}})
        else:
            raise ValueError(f"unknown fault {fault!r}")


def _send(handler: BaseHTTPRequestHandler, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
    _send_bytes(handler, status, json.dumps(value).encode(), headers)


def _send_bytes(
    handler: BaseHTTPRequestHandler, status: int, data: bytes, headers: dict[str, str] | None = None
) -> None:
    handler.send_response(status)
    for name, value in {
        "Content-Type": "application/json",
        "Content-Length": str(len(data)),
        **(headers or {}),
    }.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(data)
