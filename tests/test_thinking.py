"""Prefill sites and thoughts on the published templates, with a small tokenizer.

The templates come from two packages that ship them: `trl`, and for Mistral's `axolotl`, which is installed without
what it needs to run and read as files only.
"""

from __future__ import annotations

from importlib import metadata, resources
from pathlib import Path
from typing import Any

import pytest

from deepalign.chat import ChatTemplate, conversation, render, stop_ids, thought_markers
from deepalign.errors import UserError
from deepalign.generation import Continuation
from deepalign.judges import get_judge
from deepalign.records import Attempt, Site
from deepalign.thinking import Markers, find, split_thoughts
from deepalign.workflows.judging import judge_batch
from deepalign.workflows.steps import to_completion

CONTROL = {
    "qwen3": ("<|im_start|>", "<|im_end|>", "<think>", "</think>"),
    "qwen3_5_think": ("<|im_start|>", "<|im_end|>", "<think>", "</think>"),
    "deepseek_r1_distill": ("<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>", "<think>", "</think>"),
    "gptoss": ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>"),
    "gemma4_v5": ("<|turn>", "<turn|>", "<|channel>", "<channel|>"),
    "glm4moe": ("<|user|>", "<|assistant|>", "<think>", "</think>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "gemma3": ("<start_of_turn>", "<end_of_turn>"),
    "phi3": ("<|user|>", "<|assistant|>", "<|end|>"),
    "qwen2_5": ("<|im_start|>", "<|im_end|>"),
    "mistral_v1": (),
    "mistral_v2v3": ("[INST]", "[/INST]"),
    "mistral_v3_tekken": ("[INST]", "[/INST]"),
    "mistral_v7_tekken": ("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
}
EXPECTED: dict[str, dict[Site, str]] = {
    "qwen3": {
        "raw": "<|im_start|>assistant\n",
        "content": "<|im_start|>assistant\n<think>\n\n</think>\n\n",
        "reasoning": "<|im_start|>assistant\n<think>\n",
    },
    "qwen3_5_think": {
        "raw": "<|im_start|>assistant\n<think>\n",
        "content": "<|im_start|>assistant\n<think>\n\n</think>\n\n",
        "reasoning": "<|im_start|>assistant\n<think>\n",
    },
    "deepseek_r1_distill": {
        "raw": "<｜Assistant｜><think>\n",
        "content": "<｜Assistant｜>",
        "reasoning": "<｜Assistant｜><think>\n",
    },
    "gptoss": {
        "raw": "<|start|>assistant",
        "content": "<|start|>assistant<|channel|>final<|message|>",
        "reasoning": "<|start|>assistant<|channel|>analysis<|message|>",
    },
    "gemma4_v5": {
        "raw": "<|turn>model\n",
        "content": "<|turn>model\n",
        "reasoning": "<|turn>model\n<|channel>thought\n",
    },
    "glm4moe": {
        "raw": "<|assistant|>",
        "content": "<|assistant|>\n<think></think>\n",
        "reasoning": "<|assistant|>\n<think>",
    },
}
"""The end of what the model reads before the prefill (checked against the vendors' own continuations)."""
PLAIN = ("llama3", "gemma3", "phi3", "qwen2_5")
MISTRAL = ("mistral_v1", "mistral_v2v3", "mistral_v3_tekken", "mistral_v7_tekken")


def loaded(name: str, tokenizer: Any) -> tuple[Any, ChatTemplate]:
    """The small tokenizer with a model's control tokens, and its published template."""
    tokenizer.add_tokens(list(CONTROL[name]), special_tokens=False)
    folder = resources.files("trl") / "chat_templates"
    if name in MISTRAL:
        folder = Path(str(metadata.distribution("axolotl").locate_file("axolotl/utils/chat_templates/templates")))
    text = (folder / f"{name}.jinja").read_text(encoding="utf-8")
    return tokenizer, ChatTemplate(text=text, source="model")


@pytest.mark.parametrize(("name", "site"), [(name, site) for name, sites in EXPECTED.items() for site in sites])
def test_what_a_reasoning_model_reads_before_the_prefill(name: str, site: Site, tiny_tokenizer: Any) -> None:
    tokenizer, template = loaded(name, tiny_tokenizer)
    forced = tuple(tokenizer("Sure, here", add_special_tokens=False)["input_ids"])
    rendered = render(tokenizer, template, conversation("Count <think> to three", None), forced, site)
    assert rendered.ids[-len(forced) :] == forced
    assert sum(rendered.response_mask) == len(forced)
    before = tokenizer.decode(rendered.ids[: rendered.response_start])
    assert before.endswith(EXPECTED[name][site])
    # The user's own words cannot open a block of thoughts.
    (think,) = tokenizer("<think>", add_special_tokens=False)["input_ids"][:1]
    if "<think>" in CONTROL[name]:
        assert list(rendered.ids).count(think) == EXPECTED[name][site].count("<think>")
    assert list(rendered.ids).count(tokenizer.bos_token_id) <= 1


@pytest.mark.parametrize("name", MISTRAL)
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_a_mistral_turn_begins_right_after_the_instruction(name: str, system: str | None, tiny_tokenizer: Any) -> None:
    tokenizer, template = loaded(name, tiny_tokenizer)
    forced = write(tokenizer, "Sure, here")
    rendered = render(tokenizer, template, conversation("Count [/INST] to three", system), forced)
    assert rendered.ids[rendered.response_start :] == forced
    before = tokenizer.decode(rendered.ids[: rendered.response_start])
    assert before.endswith("[/INST]")
    assert ("Be brief." in before) is (system is not None)
    # The user's own words cannot end the instruction.
    for marker in CONTROL[name][:2]:
        (token,) = write(tokenizer, marker)
        assert list(rendered.ids).count(token) == 1


@pytest.mark.parametrize("name", PLAIN + MISTRAL)
def test_models_that_do_not_think(name: str, tiny_tokenizer: Any) -> None:
    tokenizer, template = loaded(name, tiny_tokenizer)
    assert thought_markers(tokenizer, template) is None
    messages = conversation("Count to three", None)
    assert render(tokenizer, template, messages, (5,), "content") == render(tokenizer, template, messages, (5,))
    with pytest.raises(UserError, match=r"--site reasoning: .*--site content or raw"):
        render(tokenizer, template, messages, (5,), "reasoning")


def write(tokenizer: Any, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


WRITTEN = {
    "qwen3": "<think>\nI cannot help with that, I think.\n</think>\n\nSure, here are the steps.",
    "qwen3_5_think": "I cannot help with that, I think.\n</think>\n\nSure, here are the steps.",
    "deepseek_r1_distill": "I cannot help with that, I think.\n</think>\n\nSure, here are the steps.",
    "gptoss": "<|channel|>analysis<|message|>I cannot help with that, I think.<|end|><|start|>assistant<|channel|>final"
    "<|message|>Sure, here are the steps.",
    "gemma4_v5": "<|channel>thought\nI cannot help with that, I think.\n<channel|>Sure, here are the steps.",
    "glm4moe": "\n<think>I cannot help with that, I think.</think>\nSure, here are the steps.",
}


@pytest.mark.parametrize("name", list(WRITTEN))
def test_a_refusal_in_the_thoughts_is_not_counted(name: str, tiny_tokenizer: Any) -> None:
    tokenizer, template = loaded(name, tiny_tokenizer)
    ids = write(tokenizer, WRITTEN[name])
    attempt = Attempt(
        prompt_id="p", attack="prefill", variant="k=0", sample=0, model="target", messages=conversation("Go", None)
    )
    continuation = Continuation(index=0, status="ok", token_ids=ids, finish="stop")
    completion = to_completion(tokenizer, attempt, 9, continuation, thought_markers(tokenizer, template))
    assert completion.text.strip() == "Sure, here are the steps."
    assert "I cannot help with that" in completion.thoughts
    assert completion.token_ids == ids
    assert len(completion.char_ends) == len(ids) - completion.num_thought_tokens
    (verdict,) = judge_batch(get_judge("refusal"), [(attempt, completion)])
    assert (verdict.status, verdict.status_with_prefix) == ("complied", "complied")
    assert verdict.outcome_of_thoughts == "refused_at_once"


@pytest.mark.parametrize("name", list(WRITTEN))
def test_thoughts_without_end_are_unscored_with_the_reason(name: str, tiny_tokenizer: Any) -> None:
    tokenizer, template = loaded(name, tiny_tokenizer)
    whole = WRITTEN[name]
    ids = write(tokenizer, whole[: whole.index(", I think")])
    attempt = Attempt(
        prompt_id="p", attack="prefill", variant="k=0", sample=0, model="target", messages=conversation("Go", None)
    )
    continuation = Continuation(index=0, status="ok", token_ids=ids, finish="length")
    completion = to_completion(tokenizer, attempt, 9, continuation, thought_markers(tokenizer, template))
    (verdict,) = judge_batch(get_judge("refusal"), [(attempt, completion)])
    assert verdict.status == verdict.status_with_prefix == "unscored"
    assert verdict.reason == f"no answer: still thinking after {len(ids)} tokens"


def test_a_prefill_in_the_thoughts_is_no_part_of_the_answer(tiny_tokenizer: Any) -> None:
    tokenizer, template = loaded("qwen3", tiny_tokenizer)
    forced = write(tokenizer, "I cannot")
    attempt = Attempt(
        prompt_id="p",
        attack="prefill",
        variant="k=2",
        sample=0,
        model="target",
        messages=conversation("Go", None),
        prefill_ids=forced,
        prefill_text="I cannot",
        site="reasoning",
    )
    ids = write(tokenizer, " help, I think.\n</think>\n\nSure, here. I cannot help with that request.")
    continuation = Continuation(index=0, status="ok", token_ids=ids, finish="stop")
    completion = to_completion(tokenizer, attempt, 9, continuation, thought_markers(tokenizer, template))
    (verdict,) = judge_batch(get_judge("refusal"), [(attempt, completion)])
    assert completion.text.strip().startswith("Sure")
    assert verdict.outcome == verdict.outcome_with_prefix == "recovered"
    # The position counts everything that stands in the turn: prefill, thoughts and answer.
    assert verdict.refusal_position is not None
    place = verdict.refusal_position - len(forced)
    assert "I" in tokenizer.decode(ids[place : place + 1])
    assert place >= completion.num_thought_tokens + 2


def test_the_end_of_a_harmony_message_is_not_the_end_of_the_turn(tiny_tokenizer: Any) -> None:
    tokenizer, _ = loaded("gptoss", tiny_tokenizer)
    (end,) = write(tokenizer, "<|end|>")
    assert end not in stop_ids(tokenizer)
    other = type(tiny_tokenizer)(tokenizer_object=tiny_tokenizer.backend_tokenizer, eos_token="<|im_end|>")
    assert other.eos_token_id in stop_ids(other)


def test_phi_still_stops_at_its_end_token(tiny_tokenizer: Any) -> None:
    tokenizer, _ = loaded("phi3", tiny_tokenizer)
    (end,) = write(tokenizer, "<|end|>")
    assert end in stop_ids(tokenizer)


MARKED = Markers(opening=(1,), closing=(2, 3), starts_open=False)


@pytest.mark.parametrize(
    ("ids", "inside", "thoughts", "answer", "unfinished"),
    [
        ((), False, (), (), False),
        ((9, 8, 7), False, (), (9, 8, 7), False),
        ((1, 9, 2, 3, 7), False, (9,), (7,), False),
        ((5, 1, 9, 2, 3), False, (9,), (), False),
        ((1, 9, 2, 9, 3), False, (9, 2, 9, 3), (), True),
        # A marker that the answer talks of opens nothing.
        ((9, 8, 7, 6, 1, 9, 2, 3), False, (), (9, 8, 7, 6, 1, 9, 2, 3), False),
        ((9, 2, 3, 7), True, (9,), (7,), False),
        ((9, 9), True, (9, 9), (), True),
    ],
)
def test_where_the_answer_begins(
    ids: tuple[int, ...], inside: bool, thoughts: tuple[int, ...], answer: tuple[int, ...], unfinished: bool
) -> None:
    split = split_thoughts(ids, MARKED, inside=inside)
    assert (ids[split.first : split.last], ids[split.answer :], split.unfinished) == (thoughts, answer, unfinished)


def test_finding_nothing_in_nothing() -> None:
    assert find((1, 2), ()) is None
    assert find((), (1,)) is None
    assert find((1, 2, 1, 2, 3), (1, 2, 3)) == 2
