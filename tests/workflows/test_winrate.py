"""`winrate` against a server on loopback: both orders, faults, resuming, and one line for each mistake."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.fake_endpoint import FakeEndpoint, say

import deepalign
from deepalign.errors import UserError
from deepalign.report.page import render_page

PROMPTS = ("How do I bake bread?", "Count to ten.", "Say hello.")


def prefers_the_reference(path: str, body: dict[str, Any]) -> tuple[int, Any]:
    """A judge that knows the reference's answers, wherever they stand."""
    text = body["messages"][0]["content"]
    first = text.split("answer of A>>", 1)[1].split("answer of A>>", 1)[0]
    return 200, say(f"One is clearer.\nBetter: {'A' if 'REFERENCE' in first else 'B'}")


@pytest.fixture
def settings(tmp_path: Path, tiny_model_folder: Callable[..., Path]) -> dict[str, Any]:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    answers = [{"instruction": prompt, "output": f"REFERENCE {prompt}"} for prompt in PROMPTS]
    (tmp_path / "answers.json").write_text(json.dumps(answers), encoding="utf-8")
    return {
        "model": str(tiny_model_folder("model")),
        "against": str(tmp_path / "answers.json"),
        "prompts": str(tmp_path / "prompts.txt"),
        "max_new_tokens": 4,
        "dtype": "float32",
        "device": "cpu",
        "output": tmp_path / "run",
    }


def run(settings: dict[str, Any], url: str, **changes: Any) -> deepalign.RunResult:
    return deepalign.measure_winrate(deepalign.WinrateConfig(**{**settings, "judge_url": url, **changes}))


def test_a_judge_that_looks_at_the_answers_is_believed_in_both_orders(settings: dict[str, Any]) -> None:
    with FakeEndpoint(prefers_the_reference, faults=["500", "429"]) as server:
        result = run(settings, server.url)
        found = result.metrics["win_rate"]
        assert (found["rate"], found["num_losses"], found["num_unscored"]) == (0.0, 3, 0)
        assert found["same_in_both_orders"]["rate"] == 1.0
        assert found["first_chosen"]["rate"] == 0.5
        asked = len(server.calls)
        assert run(settings, server.url).metrics["win_rate"] == found
        assert len(server.calls) == asked, "nothing is asked twice"
    page = render_page([result.metrics], [])
    assert "Pairwise win rate" in page
    assert "REFERENCE" not in page


def test_replies_without_a_verdict_are_unscored_and_told(settings: dict[str, Any]) -> None:
    with FakeEndpoint("I like both.") as server:
        found = run(settings, server.url).metrics["win_rate"]
    assert (found["rate"], found["denominator"], found["num_unscored"]) == (None, 0, 3)
    lines = (settings["output"] / "preferences.jsonl").read_text().splitlines()
    assert {json.loads(line)["reason"] for line in lines} == {"no verdict in the reply"}


def test_a_reference_model_answers_too(settings: dict[str, Any], tiny_model_folder: Callable[..., Path]) -> None:
    other = str(tiny_model_folder("other", seed=1))
    with FakeEndpoint("Better: tie") as server:
        result = run(settings, server.url, against=other)
        assert result.metrics["win_rate"]["rate"] == 0.5
        assert set(result.metrics["models"]) == {"target", "reference"}
        same = str(tiny_model_folder("same"))
        with pytest.raises(UserError, match="hold the same weights"):
            run(settings, server.url, against=same, output=settings["output"].with_name("twin"))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"against": ""}, "--against is missing"),
        ({"against": "/nowhere/answers.json"}, "does not exist"),
        ({"limit": 0}, "--limit 0 is too small"),
        ({"judge_url": ""}, "the judge has no server; give --judge-url"),
    ],
)
def test_a_mistake_is_one_line(
    settings: dict[str, Any], changes: dict[str, Any], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(UserError, match=told):
        run(settings, "http://127.0.0.1:9/v1", **changes)


def test_answers_to_other_prompts_are_counted(settings: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "few.jsonl").write_text(json.dumps({"prompt": PROMPTS[0], "answer": "x"}) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match="answers 1 of 3 prompts"):
        run(settings, "http://127.0.0.1:9/v1", against=str(tmp_path / "few.jsonl"))
    (tmp_path / "odd.jsonl").write_text(json.dumps({"p": "x"}) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match="has the columns p; it needs prompt"):
        run(settings, "http://127.0.0.1:9/v1", against=str(tmp_path / "odd.jsonl"))
