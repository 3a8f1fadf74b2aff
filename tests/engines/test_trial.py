"""The trial of a server: every kind is recognised, every vice refused or told, and what is then written is `hf`'s."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from deepalign import UserError
from deepalign.batching import Job
from deepalign.chat import answer_ids, conversation, render
from deepalign.endpoints.client import Client
from deepalign.endpoints.servers import Server
from deepalign.engines.found import Found
from deepalign.engines.in_process import HfEngine
from deepalign.engines.served import ServedEngine
from deepalign.engines.trial import open_engine
from deepalign.models import LoadedModel, from_objects
from deepalign.records import Sampling
from fake_endpoint import FakeEndpoint
from fake_engine import FakeEngine

GREEDY = Sampling(temperature=0.0, max_new_tokens=10)
ANSWER = "Sure, here are the steps. First, open the door; second, turn on the light."


@pytest.fixture
def loaded(tiny_llama: Callable[..., Any], tiny_tokenizer: Any) -> LoadedModel:
    return from_objects(tiny_llama(), tiny_tokenizer, name="tiny")


@contextmanager
def served(loaded: LoadedModel, kind: str, vice: str = "", **settings: Any) -> Iterator[ServedEngine]:
    settings = {"prefills": True, **settings}
    with FakeEndpoint(FakeEngine(loaded.model, loaded.tokenizer, kind=kind, vice=vice)) as endpoint:
        yield open_engine(Client(Server(url=endpoint.url), concurrency=3), loaded, **settings)


def found(engine: ServedEngine) -> dict[str, Any]:
    (one,) = engine.facts["servers"]
    assert Found(**one).told.count("\n") == 0
    return dict(one)


def some_jobs(loaded: LoadedModel) -> list[Job]:
    """Three prompts with four numbers of forced tokens, shuffled."""
    jobs = []
    forced = answer_ids(loaded.tokenizer, ANSWER)
    for number in range(3):
        messages = conversation(f"How do I do the bad thing {number}?", None)
        for k in (0, 1, 5, 20):
            ids = render(loaded.tokenizer, loaded.template, messages, forced[:k]).ids
            jobs.append(Job(ids=ids, sampling=GREEDY, seed=number, num_prefill=k, messages=messages))
    random.Random(0).shuffle(jobs)
    return jobs


@pytest.mark.parametrize(
    ("kind", "way", "written_ids", "read_ids", "left_out"),
    [
        ("vllm", "completions", "returned", "echoed", ""),
        ("llama.cpp", "completion", "returned", "counted", ""),
        ("plain", "completions", "from text", "counted", "top-k, stop ids"),
        ("chat", "chat", "from text", "counted", ""),
    ],
)
def test_each_kind_is_recognised_and_writes_what_this_process_writes(
    loaded: LoadedModel, kind: str, way: str, written_ids: str, read_ids: str, left_out: str
) -> None:
    jobs, stops = some_jobs(loaded), [loaded.tokenizer.eos_token_id]
    mine = {made.index: made for made in HfEngine(loaded.model).complete(jobs, stop_ids=stops)}
    with served(loaded, kind) as engine:
        one = found(engine)
        theirs = {made.index: made for made in engine.complete(jobs, stop_ids=stops)}
    assert (one["way"], one["written_ids"], one["read_ids"], one["left_out"]) == (way, written_ids, read_ids, left_out)
    assert (one["seeds"], one["greedy_repeats"]) == (True, True)
    assert one["tokenizer"] == ("agrees" if kind in ("vllm", "llama.cpp") else "untold")
    kept, _, tried = one["prefill"].partition(" of ")
    assert int(kept) * 2 > int(tried) >= 3
    assert engine.identity == {"engine": "openai", "served_model": "fake", "served_by": way}
    assert theirs.keys() == mine.keys() == set(range(len(jobs)))
    if written_ids == "returned":
        assert theirs == mine
    else:
        decode = loaded.tokenizer.decode
        for index, made in theirs.items():
            # Random ids do not come back from their text; the text does.
            assert made.status == "ok"
            assert decode(made.token_ids) == decode(answer_ids(loaded.tokenizer, decode(mine[index].token_ids)))
            assert made.note or len(made.token_ids) == len(mine[index].token_ids)


@pytest.mark.parametrize(
    ("kind", "vice", "told"),
    [
        ("vllm", "bos", "adds a token, likely a BOS, to the ids that it is sent"),
        ("llama.cpp", "bos", "adds a token, likely a BOS, to the ids that it is sent"),
        ("plain", "bos", "adds a token, likely a BOS, to the ids that it is sent"),
        ("llama.cpp", "template", "changes, as by a template of its own, the ids that it is sent"),
        ("plain", "anew", "begins its answer anew after"),
        ("vllm", "foreign", "has other tokens than"),
        ("chat", "no continue", "does not go on after an assistant's message"),
        ("chat", "other template", "has another chat template than"),
    ],
)
def test_a_server_that_does_something_else_is_refused(loaded: LoadedModel, kind: str, vice: str, told: str) -> None:
    with pytest.raises(UserError, match=told) as caught, served(loaded, kind, vice):
        pass
    assert "\n" not in str(caught.value)
    assert "http://127.0.0.1" in str(caught.value)


def test_a_server_without_prefills_will_do_where_none_are_needed(loaded: LoadedModel) -> None:
    with served(loaded, "chat", "no continue", prefills=False) as engine:
        assert found(engine)["prefill"] == ""
        (made,) = engine.complete([next(job for job in some_jobs(loaded) if not job.num_prefill)], stop_ids=[])
    assert made.status == "ok"


def test_a_prefill_that_the_text_repeats_is_taken_off(loaded: LoadedModel) -> None:
    jobs = [job for job in some_jobs(loaded) if job.num_prefill == 5]
    with served(loaded, "chat") as engine:
        plain = {made.index: made for made in engine.complete(jobs, stop_ids=[])}
    with served(loaded, "chat", "repeats") as engine:
        assert {made.index: made for made in engine.complete(jobs, stop_ids=[])} == plain


def test_what_only_makes_a_run_less_exact_is_told(loaded: LoadedModel) -> None:
    with served(loaded, "vllm", "no seed") as engine:
        one = found(engine)
    assert one["seeds"] is False
    assert "draws do not repeat" in Found(**one).told
    with served(loaded, "plain", "no usage") as engine:
        assert found(engine)["read_ids"] == "untold"


def test_a_row_that_is_read_otherwise_fails_with_its_reason(loaded: LoadedModel) -> None:
    """The trial is one thing; each answer is checked again."""
    answer = FakeEngine(loaded.model, loaded.tokenizer, kind="llama.cpp")
    with FakeEndpoint(answer) as endpoint:
        engine = open_engine(Client(Server(url=endpoint.url)), loaded, prefills=True)
        answer.vice = "bos"
        job = some_jobs(loaded)[0]
        (made,) = engine.complete([job], stop_ids=[])
    size = len(job.ids)
    assert (made.status, made.token_ids) == ("failed", ())
    assert made.reason == f"the server read {size + 1} tokens where there are {size} to go on from"


def test_a_row_that_is_too_long_fails_alone(loaded: LoadedModel) -> None:
    jobs = some_jobs(loaded)[:2]
    jobs.insert(1, Job(ids=tuple(range(5, 10)) * 120, sampling=GREEDY, seed=0))
    with served(loaded, "vllm") as engine:
        made = sorted(engine.complete(jobs, stop_ids=[]), key=lambda one: one.index)
    assert [one.status for one in made] == ["ok", "failed", "ok"]
    assert "maximum context length" in made[1].reason


def test_servers_of_one_run_must_be_alike(loaded: LoadedModel, tiny_llama: Callable[..., Any]) -> None:
    same, other = (FakeEngine(model, loaded.tokenizer) for model in (loaded.model, tiny_llama(seed=5)))
    with FakeEndpoint(same) as one, FakeEndpoint(other) as two, FakeEndpoint(same, models=("else",)) as three:
        with pytest.raises(UserError, match="must hold the same weights"):
            open_engine(Client([Server(url=one.url), Server(url=two.url)]), loaded, prefills=False)
        with pytest.raises(UserError, match="must be alike"):
            open_engine(Client([Server(url=one.url), Server(url=three.url)]), loaded, prefills=False)


def test_a_server_that_is_not_there_is_told_and_left_out(loaded: LoadedModel, caplog: pytest.LogCaptureFixture) -> None:
    with FakeEndpoint(FakeEngine(loaded.model, loaded.tokenizer)) as endpoint:
        gone = "http://127.0.0.1:9/v1"
        with caplog.at_level("INFO", logger="deepalign"):
            engine = open_engine(Client([Server(url=gone), Server(url=endpoint.url)]), loaded, prefills=False)
    assert len(engine.facts["servers"]) == 1
    assert caplog.records[0].getMessage() == f"{gone} is not there; going on without"


def test_a_server_that_can_neither_is_refused(loaded: LoadedModel) -> None:
    with (
        FakeEndpoint(lambda path, body: (404, {"error": {"message": "no such path"}})) as endpoint,
        pytest.raises(UserError, match="neither takes token ids nor chats"),
    ):
        open_engine(Client(Server(url=endpoint.url)), loaded, prefills=True)
