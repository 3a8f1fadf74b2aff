"""Dialects: what is sent for a job, and what is read of an answer, by hand."""

from __future__ import annotations

from typing import Any

import pytest

from deepalign.batching import Job
from deepalign.engines.dialects import Chat, Completion, Completions
from deepalign.records import Message, Sampling

JOB = Job(
    ids=(5, 6, 7, 8),
    sampling=Sampling(temperature=0.7, top_p=0.9, top_k=0, max_new_tokens=3),
    seed=2**63 + 9,
    num_prefill=2,
    messages=(Message(role="user", content="Hi"),),
)


def test_every_setting_of_the_sampler_is_sent() -> None:
    """A server has defaults of its own for what is left out."""
    body = Completion().body(JOB, [2], logprobs=False)
    assert body["prompt"] == [5, 6, 7, 8]
    assert (body["n_predict"], body["temperature"], body["top_p"], body["top_k"]) == (3, 0.7, 0.9, 0)
    assert (body["min_p"], body["repeat_penalty"], body["seed"]) == (0.0, 1.0, 9)
    assert body["samplers"] == ["temperature", "top_k", "top_p"]
    assert "n_probs" not in body
    body = Completions().body(JOB, [2, 3], logprobs=True)
    assert body["prompt"] == [5, 6, 7, 8]
    assert (body["max_tokens"], body["temperature"], body["top_p"], body["top_k"]) == (3, 0.7, 0.9, -1)
    assert (body["min_p"], body["repetition_penalty"], body["seed"]) == (0.0, 1.0, 9)
    assert (body["stop_token_ids"], body["return_token_ids"], body["logprobs"]) == ([2, 3], True, 1)
    bare = Completions(extras=False).body(JOB, [2], logprobs=False)
    assert set(bare) == {
        "prompt", "stream", "max_tokens", "temperature", "top_p", "presence_penalty", "frequency_penalty", "seed",
    }  # fmt: skip


def test_a_chat_is_continued_only_where_there_is_a_prefill() -> None:
    chat = Chat(decode=lambda ids: "+".join(map(str, ids)))
    body = chat.body(JOB, [2], logprobs=False)
    assert body["messages"] == [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "7+8"}]
    assert (body["continue_final_message"], body["add_generation_prompt"]) == (True, False)
    plain = Job(ids=JOB.ids, sampling=JOB.sampling, seed=1, messages=JOB.messages)
    body = chat.body(plain, [2], logprobs=False)
    assert body["messages"] == [{"role": "user", "content": "Hi"}]
    assert (body["continue_final_message"], body["add_generation_prompt"]) == (False, True)
    assert "continue_final_message" not in Chat(decode=str, extras=False).body(plain, [2], logprobs=False)


def test_what_llama_cpp_says() -> None:
    told = Completion().read(
        {
            "content": "a b",
            "tokens": [4, 9, 2],
            "stop_type": "eos",
            "tokens_evaluated": 4,
            "tokens_predicted": 3,
            "completion_probabilities": [{"logprob": -1.5}, {"logprob": -0.5}, {"logprob": -0.1}],
        }
    )
    assert (told.text, told.token_ids, told.finish) == ("a b", (4, 9, 2), "stop")
    assert (told.num_prompt, told.num_written, told.logprobs) == (4, 3, (-1.5, -0.5, -0.1))
    assert Completion().read({"content": "", "tokens": [], "stop_type": "limit", "truncated": True}).finish == ""


def test_what_vllm_says() -> None:
    choice: dict[str, Any] = {
        "text": "a b",
        "finish_reason": "length",
        "token_ids": [4, 9],
        "prompt_token_ids": [5, 6, 7, 8],
        "logprobs": {"token_logprobs": [-1.0, -2.0]},
    }
    body = {"choices": [choice], "usage": {"prompt_tokens": 4, "completion_tokens": 2}}
    told = Completions().read(body)
    assert (told.token_ids, told.prompt_ids, told.finish) == ((4, 9), (5, 6, 7, 8), "length")
    assert (told.num_prompt, told.num_written, told.logprobs) == (4, 2, (-1.0, -2.0))
    chatted = Chat(decode=str).read(
        {"choices": [{"message": {"content": "a"}, "finish_reason": "stop"}], "prompt_token_ids": [5]}
    )
    assert (chatted.text, chatted.token_ids, chatted.prompt_ids, chatted.finish) == ("a", None, (5,), "stop")
    assert chatted.num_prompt is None


@pytest.mark.parametrize("reason", ["content_filter", "abort", "", None, "tool_calls"])
def test_an_end_of_another_kind_is_neither_stop_nor_length(reason: str | None) -> None:
    told = Completions().read({"choices": [{"text": "a", "finish_reason": reason}]})
    assert told.finish == ""
    assert told.ended == (reason or "")


@pytest.mark.parametrize(
    ("dialect", "body"),
    [
        (Completion(), {"content": "a"}),
        (Completion(), {"content": "a", "tokens": ["4"]}),
        (Completion(), {"tokens": [4]}),
        (Completions(), {"choices": [{}]}),
        (Completions(), {"choices": [{"text": None}]}),
        (Chat(decode=str), {"choices": [{"text": "a"}]}),
        (Chat(decode=str), {"choices": [{"message": {"content": ["a"]}}]}),
    ],
)
def test_an_answer_of_another_form_cannot_be_read(dialect: Any, body: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="it holds no"):
        dialect.read(body)


def test_thoughts_that_a_server_took_out_make_its_text_no_answer() -> None:
    message = {"content": "a", "reasoning_content": "b"}
    with pytest.raises(ValueError, match="without a reasoning parser"):
        Chat(decode=str).read({"choices": [{"message": message, "finish_reason": "stop"}]})
