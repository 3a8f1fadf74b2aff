"""Recorded steps: the same completions as steps that grow, whatever ends when; the recording itself needs a GPU."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from deepalign import graphs
from deepalign.batching import Continuation, Job, with_hosts
from deepalign.decoding import Decoding, writes_alike
from deepalign.generation import generate
from deepalign.graphs import GraphedDecoding, can_record
from deepalign.records import Sampling
from deepalign.sharing import NotShared

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma3_text", "phi3", "gpt_neox", "olmo2", "granite")
DRAW = random.Random(5)
PROMPTS = [tuple(DRAW.choices(range(3, 97), k=length)) for length in (9, 14, 21)]


def jobs(num_new: int, temperature: float) -> list[Job]:
    """Rows of three prompts, several prefixes each, that end in different places."""
    return [
        Job(
            ids=(*prompt, *tuple(random.Random(k).choices(range(3, 97), k=k))),
            sampling=Sampling(temperature=temperature, top_p=0.9, max_new_tokens=num_new - 5 * number),
            seed=17 * k + number,
        )
        for number, prompt in enumerate(PROMPTS)
        for k in (0, 3, 8)
    ]


def replayed(work: Callable[[], None]) -> Callable[[], None]:
    """A recording where nothing can be recorded: the work itself."""
    return work


def written(decoding: Decoding) -> Iterator[Continuation]:
    while decoding.unfinished:
        yield from decoding.step()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_completions_are_those_of_growing_steps(
    random_model: Callable[..., Any], family: str, temperature: float
) -> None:
    """More tokens than the first room holds, stops at several tokens, rows that end and are laid out anew."""
    model = random_model(family)
    asked = jobs(graphs._ROOM + 20, temperature)
    rows = with_hosts(asked, range(len(asked)))
    stops = frozenset(range(3, 6))
    plain = Decoding(model, rows, stop_ids=stops, shared=False)
    recorded = GraphedDecoding(model, rows, stop_ids=stops, record=replayed)
    expected = sorted(written(plain), key=lambda one: one.index)
    found = sorted(written(recorded), key=lambda one: one.index)
    assert found == expected
    assert len({len(one.token_ids) for one in expected}) > 2


def test_lanes_are_kept_until_many_have_ended(random_model: Callable[..., Any]) -> None:
    model = random_model("llama")
    asked = jobs(20, 0.0)
    rows = with_hosts(asked, range(9))
    decoding = GraphedDecoding(model, rows, stop_ids=frozenset(), record=replayed)
    with torch.inference_mode():
        first = decoding.logits()
        decoding.retain([0, 1, 2, 3, 4, 6, 7, 8], [1] * 8)
        assert decoding._ids_B1.shape[0] == 9
        assert decoding._ids_B1[5].item() == rows[5].job.ids[-1], "the lane of the row that ended is not fed"
        second = decoding.logits()
        assert first.shape[0] == 9
        assert second.shape[0] == 8
        decoding.retain([0, 2, 4], [1] * 3)
        assert decoding._ids_B1.shape[0] == 3
        assert decoding._cache.layers[0].keys.shape[0] == 3


def test_a_step_is_recorded_once_for_each_layout(random_model: Callable[..., Any]) -> None:
    model = random_model("llama")
    num_recorded = 0

    def record(work: Callable[[], None]) -> Callable[[], None]:
        nonlocal num_recorded
        num_recorded += 1
        return work

    asked = [Job(ids=PROMPTS[0], sampling=Sampling(max_new_tokens=graphs._ROOM * 2), seed=seed) for seed in range(4)]
    decoding = GraphedDecoding(model, with_hosts(asked, range(4)), stop_ids=frozenset(), record=record)
    assert len(list(written(decoding))) == 4
    assert num_recorded == 2, "one for each room"


def test_what_cannot_be_recorded_goes_on_without(
    random_model: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    def record(work: Callable[[], None]) -> Callable[[], None]:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    model = random_model("llama")
    asked = jobs(30, 0.0)
    rows = with_hosts(asked, range(len(asked)))
    with caplog.at_level(logging.WARNING, logger="deepalign"):
        found = list(written(GraphedDecoding(model, rows, stop_ids=frozenset(), record=record)))
    expected = list(generate(model, asked, stop_ids=()))
    assert sorted(found, key=lambda one: one.index) == sorted(expected, key=lambda one: one.index)
    assert [one.message for one in caplog.records if "recorded" in one.message] == [
        "a step cannot be recorded (operation not permitted when stream is capturing); going on without"
    ]


def test_a_batch_that_shares_nothing_is_refused(random_model: Callable[..., Any]) -> None:
    rows = with_hosts([Job(ids=(5,), sampling=Sampling(), seed=0)] * 2, range(2))
    with pytest.raises(NotShared):
        GraphedDecoding(random_model("llama"), rows, stop_ids=frozenset(), record=replayed)


def test_a_model_that_writes_otherwise_is_found_out(random_model: Callable[..., Any]) -> None:
    """The trial compares with the model's own steps; here every second step reads a stale id."""
    model = random_model("llama")
    right = writes_alike(
        model, PROMPTS[2], lambda rows: GraphedDecoding(model, rows, stop_ids=frozenset(), record=replayed)
    )

    class Stale(GraphedDecoding):
        def feed(self, tokens: list[int]) -> None:
            if self._used % 2:
                super().feed(tokens)

    wrong = writes_alike(model, PROMPTS[2], lambda rows: Stale(model, rows, stop_ids=frozenset(), record=replayed))
    assert (right, wrong) == (True, False)


def test_nothing_is_recorded_on_a_cpu(random_model: Callable[..., Any]) -> None:
    assert not can_record(random_model("llama"), PROMPTS[2])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("family", FAMILIES)
def test_recordings_write_the_same_on_a_gpu(random_model: Callable[..., Any], family: str) -> None:
    model = random_model(family).to("cuda")
    asked = jobs(graphs._ROOM + 20, 0.9)
    rows = with_hosts(asked, range(len(asked)))
    stops = frozenset(range(3, 6))
    assert can_record(model, PROMPTS[2])
    expected = sorted(written(Decoding(model, rows, stop_ids=stops, shared=True)), key=lambda one: one.index)
    found = sorted(written(GraphedDecoding(model, rows, stop_ids=stops)), key=lambda one: one.index)
    assert found == expected
