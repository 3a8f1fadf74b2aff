"""Audits on servers: the same records as in process, no weights loaded here, and servers that die or fail."""

from __future__ import annotations

import functools
import json
import multiprocessing
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import deepalign
from deepalign import AuditConfig, MergeConfig, UserError
from deepalign.endpoints import routing
from deepalign.endpoints.client import Client
from deepalign.models import LoadedModel, load_model
from deepalign.records import Completion, read_jsonl
from deepalign.workflows import models as held
from deepalign.workflows import serving
from fake_endpoint import FakeEndpoint
from fake_engine import FakeEngine


@pytest.fixture
def greedy(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings under which an engine has no draws to make of its own."""
    small = {"limit": 3, "max_new_tokens": 10, "any_depth_every": 10}
    return {**settings, "base": None, "temperature": 0.0, **small}


@pytest.fixture
def target(settings: dict[str, Any]) -> LoadedModel:
    return load_model(settings["model"], dtype="float32", device="cpu")


@contextmanager
def endpoint(loaded: LoadedModel, kind: str = "vllm", vice: str = "", **settings: Any) -> Iterator[FakeEndpoint]:
    with FakeEndpoint(FakeEngine(loaded.model, loaded.tokenizer, kind=kind, vice=vice), **settings) as one:
        yield one


def completions(run: Path) -> dict[Any, Completion]:
    found = list(read_jsonl(run / "completions.jsonl", Completion))
    by_key = {one.key: one for one in found}
    assert len(by_key) == len(found), "nothing is written twice"
    return by_key


def no_weights(*_: object, **__: object) -> None:
    raise AssertionError("weights are loaded")


def test_an_audit_on_a_server_is_the_one_in_process(
    greedy: dict[str, Any], target: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probes = ("prefill", "jailbreaks", "over-refusal", "any-depth")
    here = deepalign.audit(AuditConfig(**greedy, probes=probes, output=tmp_path / "hf"))
    monkeypatch.setattr(held, "load_model", no_weights)
    with endpoint(target) as one:
        settings = {**greedy, "engine": f"openai:{one.url}", "probes": probes}
        there = deepalign.audit(AuditConfig(**settings, output=tmp_path / "served"))
    assert completions(there.run) == completions(here.run)
    assert there.metrics["prefill"] == here.metrics["prefill"]
    assert [row["asr"] for row in there.metrics["prefill"]] == [0.0, 1.0, 1.0, 1.0]
    manifest = json.loads((there.run / "manifest.json").read_text(encoding="utf-8"))
    config = manifest["config"]
    assert (config["engine"], config["served_model"], config["served_by"]) == ("openai", "fake", "completions")
    assert config["model_fingerprint"] is config["loaded_dtype"] is None
    (found,) = manifest["engine"]["servers"]
    assert (found["read_ids"], found["written_ids"]) == ("echoed", "returned")
    (told,) = there.metrics["run_card"]["engine"]
    assert told.startswith(f"fake at {one.url} (completions): token ids in (echoed), ids out returned")
    assert here.metrics["run_card"]["engine"] == "hf: in this process"
    assert "127.0.0.1" not in json.dumps(config), "where a server is does not bind a run"


def test_suites_leave_out_what_needs_weights_and_name_what_brings_it(
    greedy: dict[str, Any], target: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(held, "load_model", no_weights)
    with endpoint(target) as one:
        result = deepalign.audit(
            AuditConfig(**{**greedy, "depths": (0, 5)}, engine=f"openai:{one.url}", output=tmp_path / "run")
        )
    reasons = result.metrics["not_run"]
    for section in ("refusal_onset", "harmful_rank", "rap"):
        assert reasons[section] == (
            "needs weights, which --engine openai leaves on the servers; --white-box beside loads them here too"
        )
    assert reasons["kl"] == "needs --base"
    assert result.metrics["prefill"] is not None
    assert result.metrics["decoding"] is not None
    assert result.report.exists()


@pytest.mark.parametrize("how", [{"probes": ("prefill", "onset")}, {"suite": "quick", "white_box": "beside"}])
def test_probes_that_need_weights_run_beside_where_they_are_asked_for(
    greedy: dict[str, Any], target: LoadedModel, tmp_path: Path, how: dict[str, Any]
) -> None:
    with endpoint(target) as one:
        settings = {**greedy, "engine": f"openai:{one.url}", "depths": (0,), **how}
        result = deepalign.audit(AuditConfig(**settings, output=tmp_path / "run"))
    assert result.metrics["refusal_onset"] is not None
    manifest = json.loads((result.run / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["config"]["model_fingerprint"] == target.fingerprint
    assert one.answered > 0


def test_the_base_answers_in_process_beside_a_served_target(
    settings: dict[str, Any], target: LoadedModel, tmp_path: Path
) -> None:
    probes = ("prefill", "refusal-prefix")
    with endpoint(target, "llama.cpp") as one:
        changes = {"engine": f"openai:{one.url}", "probes": probes, "depths": (0, 5), "max_new_tokens": 4}
        result = deepalign.audit(AuditConfig(**{**settings, **changes}, output=tmp_path / "run"))
    assert result.metrics["run_card"]["swap_check"]["target_refused"] == 6
    assert result.metrics["refusal_prefix"] is not None
    assert result.metrics["models"]["base"]["fingerprint"]


def test_a_run_goes_on_at_another_address_but_not_with_other_weights_or_another_engine(
    greedy: dict[str, Any], target: LoadedModel, tiny_llama: Callable[..., Any], tmp_path: Path
) -> None:
    def audited(**changes: Any) -> deepalign.AuditResult:
        wanted = {**greedy, "probes": ("prefill",), "depths": (0,), "output": tmp_path / "run", **changes}
        return deepalign.audit(AuditConfig(**wanted))

    with endpoint(target) as one:
        before = completions(audited(engine=f"openai:{one.url}").run)
    with endpoint(target) as two:
        assert completions(audited(engine=f"openai:{two.url}").run) == before
    other = FakeEngine(tiny_llama(seed=5), target.tokenizer)
    with FakeEndpoint(other) as three, pytest.raises(UserError, match="it holds other weights"):
        audited(engine=f"openai:{three.url}")
    with endpoint(target, models=("another",)) as four, pytest.raises(UserError, match="served_model='fake'"):
        audited(engine=f"openai:{four.url}")
    with pytest.raises(UserError, match="engine='openai', not 'hf'"):
        audited()


def serve(loaded: LoadedModel, ready: Any, settings: dict[str, Any]) -> None:
    """A server in a process of its own; tells its address, and serves until it is killed."""
    torch.set_num_threads(1)
    with endpoint(loaded, **settings) as one:
        ready.put(one.url)
        threading.Event().wait()


@contextmanager
def processes(loaded: LoadedModel, *settings: dict[str, Any]) -> Iterator[list[tuple[Any, str]]]:
    """Servers, each in a process of its own that is forked from this one, with their addresses."""
    context = multiprocessing.get_context("fork")
    started: list[tuple[Any, str]] = []
    try:
        for each in settings:
            ready = context.Queue()
            process = context.Process(target=serve, args=(loaded, ready, each), daemon=True)
            process.start()
            started.append((process, ready.get(timeout=30)))
        yield started
    finally:
        for process, _ in started:
            process.kill()
            process.join(timeout=10)


def test_of_three_servers_one_is_killed_and_one_fails_and_nothing_is_lost_or_doubled(
    greedy: dict[str, Any], target: LoadedModel, tmp_path: Path
) -> None:
    greedy = {**greedy, "probes": ("prefill", "decoding", "over-refusal"), "max_new_tokens": 5}
    # The second answers its trial, and then every call with 500; the third is killed in the middle of the run.
    failing = {"faults": lambda number: "500" if number >= 30 else ""}
    with processes(target, {}, failing, {"seconds": 0.05}) as servers:
        victim = servers[2][0]

        def kill_in_the_middle() -> None:
            records = tmp_path / "served" / "completions.jsonl"
            while not records.exists() or records.read_bytes().count(b"\n") < 12:
                time.sleep(0.01)
            victim.kill()

        killer = threading.Thread(target=kill_in_the_middle, daemon=True)
        killer.start()
        engine = f"openai:{','.join(url for _, url in servers)}"
        settings = {**greedy, "engine": engine, "engine_concurrency": 4}
        there = deepalign.audit(AuditConfig(**settings, output=tmp_path / "served"))
        killer.join(timeout=10)
        victim.join(timeout=10)
        assert victim.exitcode == -signal.SIGKILL, "it was killed while the run went on"
    here = deepalign.audit(AuditConfig(**greedy, output=tmp_path / "hf"))
    mine, theirs = completions(here.run), completions(there.run)
    assert mine.keys() == theirs.keys()
    assert {one.status for one in theirs.values()} == {"ok"}
    drawn = {key for key in mine if key.attack == "decoding" and key.variant != "greedy"}
    assert {key: one for key, one in theirs.items() if key not in drawn} == {
        key: one for key, one in mine.items() if key not in drawn
    }


def test_when_the_last_server_dies_what_it_owes_stays_open(
    greedy: dict[str, Any], target: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that it gave no answer to are no failures of the model: the same command asks them again."""
    monkeypatch.setattr(routing, "PATIENCE_SECONDS", 2.0)
    monkeypatch.setattr(serving, "Client", functools.partial(Client, first_pause_seconds=0.02, retries=2))
    greedy = {**greedy, "probes": ("prefill",), "max_new_tokens": 5, "output": tmp_path / "run"}
    with processes(target, {"seconds": 0.05}) as ((victim, url),):

        def kill_in_the_middle() -> None:
            records = tmp_path / "run" / "completions.jsonl"
            while not records.exists() or records.read_bytes().count(b"\n") < 3:
                time.sleep(0.005)
            victim.kill()

        killer = threading.Thread(target=kill_in_the_middle, daemon=True)
        killer.start()
        with pytest.raises(UserError, match="no server is left") as caught:
            deepalign.audit(AuditConfig(**greedy, engine=f"openai:{url}", engine_concurrency=2))
        killer.join(timeout=10)
    assert "\n" not in str(caught.value)
    kept = completions(tmp_path / "run")
    assert 3 <= len(kept) < 12
    assert {one.status for one in kept.values()} == {"ok"}
    with endpoint(target) as one:
        finished = completions(deepalign.audit(AuditConfig(**greedy, engine=f"openai:{one.url}")).run)
    assert len(finished) == 12
    assert {key: finished[key] for key in kept} == kept
    assert {one.status for one in finished.values()} == {"ok"}


def test_mistakes_get_one_line(
    greedy: dict[str, Any], target: LoadedModel, pair: Any, mistake: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)

    def told(engine: str, *more: str) -> str:
        return mistake("audit", pair.target, "--prompts", pair.prompts, "--engine", engine, *more)

    assert "cannot be reached" in told("openai:http://127.0.0.1:9/v1")
    with endpoint(target, models=("one", "two")) as two:
        assert "serves 2 models (one, two)" in told(f"openai:{two.url}")
    with endpoint(target, faults=lambda number: "404") as wrong:
        assert "no such model or path" in told(f"openai:{wrong.url}", "--engine-model", "nothing")
    with endpoint(target, faults=lambda number: "401") as closed:
        assert "wants a key, and OPENAI_API_KEY is not set" in told(f"openai:{closed.url}")
    with endpoint(target, "chat", "no continue") as chat:
        assert "does not go on after an assistant's message" in told(f"openai:{chat.url}")
    skipped = told("openai:http://127.0.0.1:9/v1", "--white-box", "skip", "--probes", "onset", "ranks")
    assert skipped.startswith("--probes onset ranks cannot run: onset needs weights")


def test_shards_on_servers_merge_into_the_whole(
    greedy: dict[str, Any], target: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each shard at an address of its own; where a server was does not keep shards apart."""
    monkeypatch.setattr(held, "load_model", no_weights)
    greedy = {**greedy, "probes": ("prefill",), "depths": (0, 5), "max_new_tokens": 4}
    for shard in ("1/2", "2/2"):
        with endpoint(target) as one:
            changes = {"engine": f"openai:{one.url}", "shard": shard, "output": tmp_path / "run"}
            deepalign.audit(AuditConfig(**{**greedy, **changes}))
    shards = tuple(sorted(tmp_path.glob("run-shard-*")))
    merged = deepalign.merge_shards(MergeConfig(shards=shards, output=tmp_path / "run"))
    with endpoint(target) as one:
        whole = deepalign.audit(AuditConfig(**greedy, engine=f"openai:{one.url}", output=tmp_path / "whole"))
    assert completions(merged.run) == completions(whole.run)
    assert merged.metrics["prefill"] == whole.metrics["prefill"]
