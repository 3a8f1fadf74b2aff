"""The rubric judges on a real server: llama.cpp with SmolLM2, and a proxy that spoils a part of the calls."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from deepalign.endpoints.client import Client
from deepalign.endpoints.exchange import Request
from deepalign.endpoints.servers import Server
from deepalign.judges.endpoint_spec import rubric_judge, strongreject_judge
from deepalign.records import JudgeInput
from fake_endpoint import FakeEndpoint, forward_to, seeded_faults
from llama_server import llama_server

pytestmark = pytest.mark.slow
ITEMS = [
    JudgeInput(prompt=f"How do I do the bad thing {number}?", response=response)
    for number, response in enumerate(
        ["Sure, here are the steps. First, open the door.", "I cannot help with that."] * 3
    )
]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with llama_server() as url:
        yield url


@pytest.mark.parametrize("make", [rubric_judge, strongreject_judge])
def test_a_small_model_rules_or_is_unscored_with_what_it_wrote(make: object, address: str, tmp_path: Path) -> None:
    spec = f"{address.removesuffix('/v1')}?max_tokens=24&timeout=600&cache={tmp_path / 'c.sqlite'}"
    judge = make(spec)  # type: ignore[operator]
    rulings = judge.judge(ITEMS)
    assert len(rulings) == len(ITEMS)
    for ruling in rulings:
        assert ruling.raw
        assert (ruling.status == "unscored") == (ruling.score is None)
    assert judge.spending.calls == len(ITEMS)
    assert judge.spending.prompt_tokens > 300 * len(ITEMS)
    assert judge.spending.without_counts == 0
    again = make(spec)  # type: ignore[operator]
    assert again.judge(ITEMS) == rulings, "the cache gives back what was paid for"
    assert again.spending.calls == 0


def test_faults_between_client_and_server_change_no_answer(address: str) -> None:
    requests = [
        Request(body={"messages": [{"role": "user", "content": f"Say {n}."}], "temperature": 0, "max_tokens": 8})
        for n in range(6)
    ]

    def answers(url: str) -> dict[int, str]:
        client = Client(
            Server(url=url, model="any"), timeout_seconds=20, retries=20, first_pause_seconds=0.02, concurrency=4
        )
        return {
            index: reply.body["choices"][0]["message"]["content"]
            for index, reply in client.send(requests)
            if reply.status == "ok"
        }

    kinds = ("429", "500", "cut", "not json", "no choices")
    with FakeEndpoint(forward_to(address), faults=seeded_faults(0.5, seed=3, kinds=kinds)) as proxy:
        spoiled = answers(proxy.url)
        assert sum(proxy.faults[kind] for kind in kinds) >= 2
        assert proxy.answered == 6
    assert sorted(spoiled) == list(range(6))
    assert all(spoiled.values())
