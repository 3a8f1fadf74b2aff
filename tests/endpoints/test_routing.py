"""Queues by prefix, taking over, and when a server is let go; the clock is the test's."""

from __future__ import annotations

from collections import Counter

from deepalign.endpoints.routing import PATIENCE_SECONDS, Place, Routes

URLS = ("a", "b", "c")


def queues(routes: Routes) -> dict[str, list[int]]:
    return {place.name: list(place.queue) for place in routes.places}


def fail(routes: Routes, place: Place, times: int, *, seconds: float = 0.0, unreachable: bool = False) -> None:
    for number in range(times):
        routes.failed(place, "broken", number * seconds / max(1, times - 1), unreachable=unreachable)


def test_every_request_has_one_place_and_a_prefix_one_server() -> None:
    prefixes = [f"p{i % 20}" for i in range(200)]
    found = queues(Routes(URLS, prefixes, concurrency=4))
    assert sorted(index for indices in found.values() for index in indices) == list(range(200))
    for indices in found.values():
        assert indices == sorted(indices), "in the order in which they were asked for"
    groups = {name: {prefixes[index] for index in indices} for name, indices in found.items()}
    assert sum(len(group) for group in groups.values()) == 20


def test_requests_without_a_prefix_are_spread_evenly() -> None:
    counts = Counter({name: len(indices) for name, indices in queues(Routes(URLS, [""] * 900, concurrency=4)).items()})
    assert min(counts.values()) > 240


def test_a_server_that_is_not_there_moves_its_own_share_alone() -> None:
    prefixes = [f"p{i}" for i in range(300)]
    three, two = queues(Routes(URLS, prefixes, concurrency=4)), queues(Routes(URLS[:2], prefixes, concurrency=4))
    assert set(three["a"]) <= set(two["a"])
    assert set(three["b"]) <= set(two["b"])


def test_the_idle_take_from_the_end_of_the_longest_queue() -> None:
    routes = Routes(("a", "b"), ["same"] * 4, concurrency=1)
    full, idle = sorted(routes.places, key=lambda place: -len(place.queue))
    assert [routes.take(idle), routes.take(full), routes.take(idle), routes.take(full)] == [3, 0, 2, 1]
    assert routes.take(full) is None


def test_a_request_that_failed_goes_to_another_server_first() -> None:
    routes = Routes(("a", "b"), ["same"], concurrency=1)
    first = next(place for place in routes.places if place.queue)
    other = next(place for place in routes.places if place is not first)
    index = routes.take(first)
    assert index == 0
    routes.give_back(index, avoid=first)
    assert list(other.queue) == [0]
    other.queue.clear()
    other.gone = "broken"
    routes.give_back(index, avoid=first)
    assert list(first.queue) == [0]


def test_a_server_is_let_go_after_enough_faults_in_a_row() -> None:
    routes = Routes(("a", "b"), [], concurrency=4)
    place = routes.places[0]
    routes.succeeded(place)
    fail(routes, place, 15)
    assert not place.gone
    routes.succeeded(place)
    fail(routes, place, 15)
    assert not place.gone, "an answer in between starts the count anew"
    fail(routes, place, 1)
    assert place.gone == "broken"
    assert routes.alive == [routes.places[1]]


def test_the_last_server_is_given_time() -> None:
    routes = Routes(("a",), [], concurrency=4)
    (place,) = routes.places
    routes.succeeded(place)
    fail(routes, place, 1000, seconds=PATIENCE_SECONDS - 1)
    assert not place.gone
    routes.failed(place, "broken", PATIENCE_SECONDS, unreachable=True)
    assert place.gone


def test_a_server_that_never_answered_is_let_go_soon() -> None:
    routes = Routes(("a",), [], concurrency=4)
    fail(routes, routes.places[0], 2, unreachable=True)
    assert not routes.places[0].gone
    fail(routes, routes.places[0], 1, unreachable=True)
    assert routes.places[0].gone
