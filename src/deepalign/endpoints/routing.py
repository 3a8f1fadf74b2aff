"""Which server answers what: queues by prefix, spilling to the idle, and letting go of a server that keeps failing.

Knows no HTTP. Requests that share a prefix wait for one server (rendezvous hashing, so that a server that goes moves
only its own share); an idle server takes from the longest queue's end.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

_LEAST_FAULTS = 12
_FAULTS_OF_A_STRANGER = 3
PATIENCE_SECONDS = 30.0
"""How long the last server may fail before it is given up: a restart should be outlived."""


@dataclass(kw_only=True, slots=True)
class Place:
    """One server's queue and how it has been doing."""

    name: str
    queue: deque[int] = field(default_factory=deque)
    faults: int = 0
    """Calls in a row that failed."""
    failing_since: float = 0.0
    answered: bool = False
    """Whether it has ever given an answer, if only that it is busy."""
    gone: str = ""
    """Why it is used no more; "" while it is."""
    resting_until: float = 0.0
    """When it may be asked again, where it asked for a pause."""


class Routes:
    """Queues of indices, one for each server."""

    def __init__(self, names: Sequence[str], prefixes: Sequence[str], *, concurrency: int) -> None:
        """Put every request in the queue of its server.

        Args:
            names: The servers.
            prefixes: One for each request; "" belongs to no group and is spread evenly.
            concurrency: Calls at a time for each server.
        """
        self.places = [Place(name=name) for name in names]
        self._groups = [prefix or f"\0{index}" for index, prefix in enumerate(prefixes)]
        self._most_faults = _LEAST_FAULTS + concurrency
        for index in range(len(prefixes)):
            self.preferred(index, self.places).queue.append(index)

    @property
    def alive(self) -> list[Place]:
        """Servers still in use."""
        return [place for place in self.places if not place.gone]

    def preferred(self, index: int, among: Sequence[Place]) -> Place:
        """The server among some for a request; the same for the same prefix."""
        group = self._groups[index]
        return max(among, key=lambda place: hashlib.sha256(f"{place.name}\0{group}".encode(errors="replace")).digest())

    def take(self, place: Place) -> int | None:
        """The next request for a server: its own first, then the end of the longest queue."""
        if place.queue:
            return place.queue.popleft()
        longest = max(self.places, key=lambda other: len(other.queue))
        return longest.queue.pop() if longest.queue else None

    def give_back(self, index: int, avoid: Place) -> None:
        """Queue a request again, at the front, with another server where there is one."""
        others = [place for place in self.alive if place is not avoid]
        if others or not avoid.gone:
            self.preferred(index, others or [avoid]).queue.appendleft(index)
        else:
            avoid.queue.appendleft(index)

    def succeeded(self, place: Place) -> None:
        """Note that a server answered."""
        place.faults, place.answered = 0, True

    def failed(self, place: Place, reason: str, now: float, *, unreachable: bool) -> None:
        """Note that a server failed, and let it go where it did nothing else for long enough."""
        if not place.faults:
            place.failing_since = now
        place.faults += 1
        place.answered = place.answered or not unreachable
        if not place.answered:
            enough = place.faults >= _FAULTS_OF_A_STRANGER
        else:
            patience = PATIENCE_SECONDS if len(self.alive) == 1 else 0.0
            enough = place.faults >= self._most_faults and now - place.failing_since >= patience
        if enough and not place.gone:
            place.gone = reason
