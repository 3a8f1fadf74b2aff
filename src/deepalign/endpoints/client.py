"""The client: many requests to a few servers, each answered exactly once, as answers come.

Owns bounded concurrency, pauses and repeats. The caller's side is an ordinary iterator; the connections live in a
thread with an event loop of its own, so that a notebook's running loop is no hindrance. Knows no judge and no model.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import queue
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2

from deepalign.endpoints.discovery import discover, open_connections
from deepalign.endpoints.exchange import Fault, Reply, Request, read_answer, tokens
from deepalign.endpoints.routing import Place, Routes
from deepalign.endpoints.servers import Server
from deepalign.errors import UserError, first_line

_LONGEST_PAUSE_SECONDS = 30.0
_LOOK_SECONDS = 0.5


class ServersGoneError(UserError):
    """No server is left that answers; what was answered before has been yielded."""


class Client:
    """Sends requests to OpenAI-compatible servers.

    Passing faults (408, 409, 425, 429, 5xx, time-outs, cut connections, answers that are no JSON or hold no choices)
    are tried again with growing, jittered pauses, and never sooner than the server asks for. What is wrong in itself
    (400, 403, 422) comes back as a failed reply at once. A server that takes no key (401), has no such model (404) or
    fails all the time is let go and its work goes to the others.
    """

    def __init__(
        self,
        servers: Sequence[Server] | Server,
        *,
        concurrency: int = 16,
        timeout_seconds: float = 300.0,
        retries: int = 6,
        first_pause_seconds: float = 0.5,
        seed: int = 0,
    ) -> None:
        """Keep the settings; nothing is connected yet.

        Args:
            servers: Where to send; all hold the same model.
            concurrency: Calls at a time, for each server.
            timeout_seconds: Longest a call may take from first to last byte.
            retries: Further tries of a request after passing faults.
            first_pause_seconds: Before the first of them; each next one waits twice as long, to half a minute.
            seed: Of the jitter.
        """
        self.servers = [servers] if isinstance(servers, Server) else list(servers)
        if not self.servers:
            raise UserError("no server is given; give an address such as http://127.0.0.1:8080/v1")
        if concurrency < 1 or retries < 0 or not timeout_seconds > 0:
            raise UserError(
                f"concurrency={concurrency}, retries={retries}, timeout_seconds={timeout_seconds}: "
                "give at least 1, at least 0, and more than 0"
            )
        self.concurrency = concurrency
        self.timeout_seconds = timeout_seconds
        self.retries = retries
        self.first_pause_seconds = first_pause_seconds
        self.seed = seed
        self._opened: list[Server] | None = None

    def open(self) -> list[Server]:
        """The servers that are there, addresses completed and models named; asked once.

        Raises:
            UserError: None is there; one line that says why.
        """
        if self._opened is None:
            with ThreadPoolExecutor(max_workers=len(self.servers)) as pool:
                found = list(pool.map(_discovered, self.servers))
            opened = [server for server in found if isinstance(server, Server)]
            if not opened:
                raise ServersGoneError("; ".join(dict.fromkeys(str(error) for error in found)))
            self._opened = opened
        return self._opened

    def send(
        self, requests: Sequence[Request], *, keep: Callable[[int, Reply], None] | None = None
    ) -> Iterator[tuple[int, Reply]]:
        """Replies with the index of their request, as they come; each request exactly once.

        Closing the iterator early cancels what is under way.

        Args:
            requests: What to send.
            keep: Called with each reply as soon as it is there, in another thread, whether or not the iterator comes
                to it: for what must not be paid for twice.

        Raises:
            ServersGoneError: No server is left; replies that were there have been yielded.
        """
        if not requests:
            return
        sending = _Sending(self, self.open(), list(requests), keep)
        thread = threading.Thread(target=sending.run, name="deepalign-endpoints", daemon=True)
        thread.start()
        try:
            while True:
                # Woken now and then, so that Ctrl-C is heard on every system.
                with contextlib.suppress(queue.Empty):
                    found = sending.out.get(timeout=_LOOK_SECONDS)
                    if found is None:
                        return
                    if isinstance(found, BaseException):
                        raise found
                    yield found
        finally:
            sending.stop()
            thread.join(timeout=5.0)


def _discovered(server: Server) -> Server | UserError:
    try:
        server.headers()
        return discover(server)
    except UserError as error:
        return error


class _Sending:
    """One call of `send`: its loop, its queues, its connections."""

    def __init__(
        self,
        client: Client,
        servers: Sequence[Server],
        requests: list[Request],
        keep: Callable[[int, Reply], None] | None,
    ) -> None:
        self.out: queue.SimpleQueue[tuple[int, Reply] | BaseException | None] = queue.SimpleQueue()
        self._client = client
        self._servers = servers
        self._requests = requests
        self._keep = keep
        self._routes = Routes(
            [str(number) for number in range(len(servers))],
            [request.prefix for request in requests],
            concurrency=client.concurrency,
        )
        self._open = len(requests)
        self._tries = [Counter[str]() for _ in requests]
        self._started: dict[int, float] = {}
        self._random = random.Random(client.seed)
        self._changed = asyncio.Condition()
        self._loop = asyncio.new_event_loop()
        self._task = self._loop.create_task(self._main())

    def run(self) -> None:
        """The thread: everything until the last reply, an error, or `stop`."""
        try:
            self._loop.run_until_complete(self._task)
            self.out.put(None)
        except asyncio.CancelledError:
            self.out.put(None)
        except BaseExceptionGroup as errors:
            self.out.put(errors.exceptions[0])
        except BaseException as error:
            self.out.put(error)
        finally:
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.close()

    def stop(self) -> None:
        """Cancel what is under way; harmless after the end."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._task.cancel)

    async def _main(self) -> None:
        most = min(self._client.concurrency, len(self._requests))
        async with contextlib.AsyncExitStack() as stack, asyncio.TaskGroup() as group:
            for place, server in zip(self._routes.places, self._servers, strict=True):
                connections = open_connections(server, most=most, timeout_seconds=self._client.timeout_seconds)
                await stack.enter_async_context(connections)
                for _ in range(most):
                    group.create_task(self._work(place, server, connections))
        if self._open:
            pairs = zip(self._routes.places, self._servers, strict=True)
            gone = "; ".join(f"{server.url}: {place.gone}" for place, server in pairs)
            raise ServersGoneError(f"no server is left for {self._open} requests ({gone})")

    async def _work(self, place: Place, server: Server, connections: httpx2.AsyncClient) -> None:
        """One of a server's slots: take a request, try it, until nothing is left."""
        while self._open and not place.gone:
            rest = place.resting_until - time.monotonic()
            if rest > 0:
                await asyncio.sleep(rest + self._random.uniform(0, 0.1 * min(rest, 1.0)))
                continue
            async with self._changed:
                index = self._routes.take(place)
                if index is None:
                    await self._changed.wait()
                    continue
            found = await self._call(index, server, connections)
            self._tries[index][place.name] += 1
            pause = self._settle(index, place, server, found)
            if pause is not None:
                await asyncio.sleep(pause)
                self._routes.give_back(index, avoid=place)
            async with self._changed:
                self._changed.notify_all()

    async def _call(self, index: int, server: Server, connections: httpx2.AsyncClient) -> dict[str, Any] | Fault:
        request = self._requests[index]
        self._started.setdefault(index, time.monotonic())
        body = {"model": server.model, **request.body} if server.model else request.body
        # ASCII, since half of a surrogate pair in a text has no UTF-8.
        content = json.dumps(body, ensure_ascii=True).encode()
        headers = {"Content-Type": "application/json", **server.headers()}
        try:
            async with asyncio.timeout(self._client.timeout_seconds):
                answer = await connections.post(server.address(request.path), content=content, headers=headers)
            return read_answer(server, request.path, answer.status_code, answer.headers, answer.content)
        except (TimeoutError, httpx2.ReadTimeout, httpx2.WriteTimeout):
            return Fault(reason=f"no whole answer within {self._client.timeout_seconds:g} seconds")
        except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
            told = server.hide(first_line(error))
            return Fault(reason=f"{server.url} cannot be reached ({told})", unreachable=True)
        except (httpx2.RequestError, httpx2.InvalidURL) as error:
            return Fault(reason=f"the connection broke ({server.hide(first_line(error))})")

    def _settle(self, index: int, place: Place, server: Server, found: dict[str, Any] | Fault) -> float | None:
        """Deliver what is final; for a request to be tried again, the seconds to wait before."""
        if not isinstance(found, Fault):
            self._routes.succeeded(place)
            self._deliver(index, server, found, "")
            return None
        if found.kind == "request":
            self._routes.succeeded(place)
            self._deliver(index, server, None, found.reason)
            return None
        now = time.monotonic()
        if found.kind == "server":
            place.gone = place.gone or found.reason
        elif found.kind == "busy":
            place.answered = True
        else:
            self._routes.failed(place, found.reason, now, unreachable=found.unreachable)
        if place.gone:
            return 0.0
        # Tries at a server that is gone say nothing of the request.
        tries = sum(self._tries[index][other.name] for other in self._routes.alive)
        if tries > self._client.retries:
            self._deliver(index, server, None, f"gave up after {tries} tries: {found.reason}", gave_up=True)
            return None
        pause = max(self._pause(tries), found.wait or 0.0)
        if found.kind == "busy":
            # All of this server's slots rest; the request may go elsewhere at once.
            place.resting_until = max(place.resting_until, now + pause)
            return 0.0
        return pause

    def _pause(self, tries: int) -> float:
        longest: float = min(self._client.first_pause_seconds * 2.0 ** (tries - 1), _LONGEST_PAUSE_SECONDS)
        return longest * self._random.uniform(0.5, 1.0)

    def _deliver(
        self, index: int, server: Server, body: dict[str, Any] | None, reason: str, *, gave_up: bool = False
    ) -> None:
        self._open -= 1
        reply = Reply(
            status="failed" if body is None else "ok",
            reason=reason,
            gave_up=gave_up,
            tries=self._tries[index].total(),
            seconds=time.monotonic() - self._started[index],
            server=server.url,
        )
        if body is not None:
            reply = dataclasses.replace(
                reply,
                body=body,
                prompt_tokens=tokens(body, "prompt_tokens"),
                completion_tokens=tokens(body, "completion_tokens"),
            )
        if self._keep is not None:
            self._keep(index, reply)
        self.out.put((index, reply))
