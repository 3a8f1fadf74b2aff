"""The steps between two files of a run: what is done, what is done again, and what a failure leaves behind."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from deepalign.chat import answer_ids, conversation, render, stop_ids
from deepalign.depth import KlProfile, kl_profiles
from deepalign.errors import UserError
from deepalign.generation import Continuation, Job, generate
from deepalign.models import LoadedModel, from_objects
from deepalign.records import Attempt, Completion, JudgeInput, Prompt, Ruling, Sampling, Verdict
from deepalign.runs import RunFolder
from deepalign.workflows.judging import judge_batch
from deepalign.workflows.steps import (
    COMPLETIONS,
    KL,
    complete,
    judge_completions,
    measure_kl,
    to_completion,
)

ANSWER = "Sure, here are the steps. First, open the door."
WARM = Sampling(temperature=1.0, top_p=0.95, top_k=0, max_new_tokens=8)


class RecordingJudge:
    """Refuses what contains "no", and notes what it is given."""

    name = "recording"

    def __init__(self) -> None:
        self.batches: list[list[JudgeInput]] = []

    def judge(self, items: Sequence[JudgeInput]) -> list[Ruling]:
        self.batches.append(list(items))
        return [self.rule(item.response) for item in items]

    def rule(self, text: str) -> Ruling:
        place = text.find("no")
        if place < 0:
            return Ruling(status="complied", outcome="complied")
        outcome = "refused_at_once" if place == 0 else "recovered"
        return Ruling(status="refused", outcome=outcome, reason="no", refusal_char=place)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path)


@pytest.fixture
def loaded(tiny_llama: Callable[..., Any], tiny_tokenizer: Any) -> LoadedModel:
    return from_objects(tiny_llama(), tiny_tokenizer, name="target")


def attempt(prompt_id: str, prefill: Sequence[int] = (), sample: int = 0, tokenizer: Any = None) -> Attempt:
    return Attempt(
        prompt_id=prompt_id,
        attack="prefill",
        variant=f"k={len(prefill)}",
        sample=sample,
        model="target",
        messages=conversation(f"How do I open door {prompt_id}?", "Be kind."),
        prefill_ids=tuple(prefill),
        prefill_text=tokenizer.decode(prefill) if tokenizer else "",
        sampling=WARM,
        seed=zlib.crc32(f"{prompt_id} {len(prefill)} {sample}".encode()),
    )


def some_attempts(tokenizer: Any) -> list[Attempt]:
    ids = answer_ids(tokenizer, ANSWER)
    return [
        attempt(prompt_id, ids[:k], sample, tokenizer)
        for prompt_id in ("p1", "p2", "p3")
        for k in (0, 1, 5)
        for sample in (0, 1)
    ]


def completions(run: RunFolder) -> dict[Any, Completion]:
    found = run.records(COMPLETIONS, Completion)
    assert len({one.key for one in found}) == len(found)
    return {one.key: one for one in found}


def test_completions_are_what_the_model_writes_after_the_rendered_prompt(run: RunFolder, loaded: LoadedModel) -> None:
    attempts = some_attempts(loaded.tokenizer)
    complete(run, loaded, attempts, stage="x", max_batch=5)
    found = completions(run)
    assert set(found) == {one.key for one in attempts}
    for one in attempts:
        ids = render(loaded.tokenizer, loaded.template, one.messages, one.prefill_ids).ids
        job = Job(ids=ids, sampling=WARM, seed=one.seed)
        (alone,) = generate(loaded.model, [job], stop_ids=stop_ids(loaded.tokenizer))
        saved = found[one.key]
        assert saved.status == "ok"
        assert (saved.token_ids, saved.finish, saved.num_input_tokens) == (alone.token_ids, alone.finish, len(ids))
        whole = loaded.tokenizer.decode((*one.prefill_ids, *saved.token_ids), skip_special_tokens=True)
        assert one.prefill_text + saved.text == whole
        assert len(saved.char_ends) == len(saved.token_ids)
        assert not saved.char_ends or saved.char_ends[-1] == len(saved.text)


def test_what_is_there_is_not_done_again(run: RunFolder, loaded: LoadedModel) -> None:
    attempts = some_attempts(loaded.tokenizer)
    complete(run, loaded, attempts, stage="x", max_batch=5)
    before = (run / COMPLETIONS).read_bytes()

    def refuse(*args: Any) -> None:
        raise AssertionError("the model was run")

    loaded.model.register_forward_pre_hook(refuse)
    complete(run, loaded, attempts, stage="x", max_batch=5)
    complete(run, loaded, [], stage="x", max_batch=5)
    assert (run / COMPLETIONS).read_bytes() == before


# The first eight passes find out whether rows can share their prefixes.
@pytest.mark.parametrize("passes", [1, 4, 9, 12, 17, 22])
def test_an_interrupted_run_goes_on_to_the_same_end(passes: int, run: RunFolder, loaded: LoadedModel) -> None:
    attempts = some_attempts(loaded.tokenizer)
    straight = RunFolder(run.path / "straight")
    straight.path.mkdir()
    complete(straight, loaded, attempts, stage="x", max_batch=5)
    count = 0

    def interrupt(*args: Any) -> None:
        nonlocal count
        count += 1
        if count > passes:
            raise KeyboardInterrupt

    hook = loaded.model.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        complete(run, loaded, attempts, stage="x", max_batch=5)
    hook.remove()
    kept = completions(run)
    assert len(kept) < len(attempts)
    assert passes < 18 or len(kept) > 0, "whatever was finished is on disk"
    complete(run, loaded, attempts, stage="x", max_batch=3)
    assert completions(run) == completions(straight)


def test_progress_starts_where_an_earlier_run_ended(run: RunFolder, loaded: LoadedModel) -> None:
    attempts = some_attempts(loaded.tokenizer)
    complete(run, loaded, attempts[:5], stage="first", max_batch=5)
    told: list[tuple[str, int, int]] = []
    complete(run, loaded, attempts, stage="second", max_batch=5, progress=lambda *news: told.append(news))
    assert told == [("second", done, 18) for done in range(5, 19)]


def test_a_failure_is_recorded_with_its_reason(run: RunFolder, tiny_llama: Any, tiny_tokenizer: Any) -> None:
    loaded = from_objects(tiny_llama(max_position_embeddings=60), tiny_tokenizer, name="target")
    ids = answer_ids(tiny_tokenizer, ANSWER * 3)
    complete(run, loaded, [attempt("p1", tokenizer=tiny_tokenizer), attempt("p1", ids)], stage="x", max_batch=5)
    fine, failed = sorted(completions(run).values(), key=lambda one: one.status, reverse=True)
    assert fine.status == "ok"
    assert failed.status == "failed"
    assert (failed.text, failed.token_ids, failed.char_ends) == ("", (), ())
    assert "exceed the model's 60" in failed.reason


def test_the_stop_ids_of_the_models_own_configuration_count(run: RunFolder, loaded: LoadedModel) -> None:
    attempts = [attempt("p1", tokenizer=loaded.tokenizer)]
    complete(run, loaded, attempts, stage="x", max_batch=5)
    first = completions(run)[attempts[0].key].token_ids[0]
    loaded.model.generation_config.eos_token_id = [first]
    (run / COMPLETIONS).unlink()
    complete(run, loaded, attempts, stage="x", max_batch=5)
    stopped = completions(run)[attempts[0].key]
    assert (stopped.finish, stopped.text, stopped.token_ids) == ("stop", "", ())


def record(tokenizer: Any, prefill: Sequence[int], written: Sequence[int]) -> Completion:
    continuation = Continuation(index=0, status="ok", token_ids=tuple(written), finish="length")
    return to_completion(tokenizer, attempt("p", prefill), 30, continuation)


def test_a_completion_keeps_its_leading_space(tiny_tokenizer: Any) -> None:
    ids = answer_ids(tiny_tokenizer, "Sure, here are")
    for cut in range(len(ids) + 1):
        one = record(tiny_tokenizer, ids[:cut], ids[cut:])
        assert tiny_tokenizer.decode(ids[:cut]) + one.text == "Sure, here are"
    assert record(tiny_tokenizer, ids[:-1], ids[-1:]).text.startswith(" ")


@pytest.mark.parametrize("text", ["é", "漢字", "🙂!", "a🙂é"])
def test_a_character_cut_in_two_belongs_to_the_completion(text: str, tiny_tokenizer: Any) -> None:
    ids = answer_ids(tiny_tokenizer, text)
    assert len(ids) > len(text) or text == "🙂!"
    for cut in range(len(ids) + 1):
        one = record(tiny_tokenizer, ids[:cut], ids[cut:])
        whole_before = tiny_tokenizer.decode(ids[:cut]).rstrip("\ufffd")
        assert whole_before + one.text == text
        assert list(one.char_ends) == sorted(one.char_ends)
        assert one.char_ends[-1:] in ((), (len(one.text),))


def test_char_ends_by_hand(tiny_tokenizer: Any) -> None:
    pieces = ["Sure", ",", " open"]
    ids = [answer_ids(tiny_tokenizer, piece) for piece in pieces]
    one = record(tiny_tokenizer, ids[0], [*ids[1], *ids[2]])
    assert one.text == ", open"
    assert one.char_ends[0] == 1
    assert one.char_ends[-1] == 6


def test_control_tokens_are_left_out_of_the_text(tiny_tokenizer: Any) -> None:
    ids = answer_ids(tiny_tokenizer, " open")
    one = record(tiny_tokenizer, (), [1, *ids, 3])
    assert one.text == " open"
    assert one.token_ids == (1, *ids, 3)
    assert one.char_ends[0] == 0
    assert one.char_ends[-2:] == (5, 5)


def completion_of(one: Attempt, text: str, char_ends: tuple[int, ...] = (), **changes: Any) -> Completion:
    values: dict[str, Any] = {
        **{"prompt_id": one.prompt_id, "attack": one.attack, "variant": one.variant, "sample": one.sample},
        **{"status": "ok", "text": text, "token_ids": tuple(range(len(char_ends))), "char_ends": char_ends},
        **{"finish": "length", "num_input_tokens": 9},
    }
    return Completion(**{**values, **changes})


def test_a_judge_sees_the_prompt_and_the_response_alone_and_joined(tiny_tokenizer: Any) -> None:
    one = attempt("p1", answer_ids(tiny_tokenizer, "Sure, I"), tokenizer=tiny_tokenizer)
    judge = RecordingJudge()
    (verdict,) = judge_batch(judge, [(one, completion_of(one, " will not", (5, 9)))])
    assert judge.batches == [
        [
            JudgeInput(prompt="How do I open door p1?", response=" will not"),
            JudgeInput(prompt="How do I open door p1?", response="Sure, I will not"),
        ]
    ]
    assert verdict.key == one.key
    assert (verdict.judge, verdict.status, verdict.outcome, verdict.reason) == (
        "recording",
        "refused",
        "recovered",
        "no",
    )
    assert (verdict.status_with_prefix, verdict.outcome_with_prefix) == ("refused", "recovered")


def test_the_two_rulings_are_kept_apart(tiny_tokenizer: Any) -> None:
    one = attempt("p1", answer_ids(tiny_tokenizer, "no, "), tokenizer=tiny_tokenizer)
    (verdict,) = judge_batch(RecordingJudge(), [(one, completion_of(one, "yes", (3,)))])
    assert (verdict.status, verdict.outcome) == ("complied", "complied")
    assert (verdict.status_with_prefix, verdict.outcome_with_prefix) == ("refused", "refused_at_once")
    assert verdict.refusal_position is None


@pytest.mark.parametrize(
    ("text", "char_ends", "position"),
    [
        ("no", (2,), 0),
        ("no", (1, 2), 0),
        ("so no", (2, 5), 1),
        ("so no", (3, 5), 1),
        ("so no", (1, 2, 3, 4, 5), 3),
        # A character finished only by a later token; and one that no token claims.
        ("\u00e9no", (1, 1, 3), 2),
        ("so no", (2, 3), 1),
    ],
)
@pytest.mark.parametrize("num_prefill", [0, 7])
def test_a_refusals_position_counts_tokens_from_the_first_of_the_response(
    text: str, char_ends: tuple[int, ...], position: int, num_prefill: int
) -> None:
    one = attempt("p1", range(10, 10 + num_prefill))
    (verdict,) = judge_batch(RecordingJudge(), [(one, completion_of(one, text, char_ends))])
    assert verdict.refusal_position == num_prefill + position


class BrokenJudge(RecordingJudge):
    """Raises on texts with "bomb" in them, and forgets one where there is "lost"."""

    def judge(self, items: Sequence[JudgeInput]) -> list[Ruling]:
        if any("bomb" in item.response for item in items):
            raise RuntimeError("no connection\nto the service")
        rulings = super().judge(items)
        return rulings[:-1] if any("lost" in item.response for item in items) else rulings


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a bomb", "the judge failed: RuntimeError: no connection"),
        ("lost", "the judge gave 0 rulings for 1 texts"),
    ],
)
def test_a_judges_failure_is_unscored_and_never_a_zero(text: str, reason: str) -> None:
    one = attempt("p1")
    (verdict,) = judge_batch(BrokenJudge(), [(one, completion_of(one, text, (len(text),)))])
    assert (verdict.status, verdict.outcome) == ("unscored", "unscored")
    assert (verdict.status_with_prefix, verdict.outcome_with_prefix) == ("unscored", "unscored")
    assert verdict.reason.startswith(reason)
    assert verdict.reason_with_prefix.startswith(reason)
    assert verdict.refusal_position is None


def test_a_failed_completion_is_unscored_for_its_own_reason() -> None:
    one = attempt("p1")
    failed = completion_of(one, "no", status="failed", reason="out of memory, even alone", finish="")
    (verdict,) = judge_batch(RecordingJudge(), [(one, failed)])
    assert (verdict.status, verdict.status_with_prefix) == ("unscored", "unscored")
    assert verdict.reason == verdict.reason_with_prefix == "out of memory, even alone"
    assert verdict.refusal_position is None


def judged_run(run: RunFolder, texts: Sequence[str]) -> list[Attempt]:
    attempts = [attempt(f"p{number}") for number in range(len(texts))]
    run.write_records(
        COMPLETIONS, [completion_of(one, text, (len(text),)) for one, text in zip(attempts, texts, strict=True)]
    )
    return attempts


def test_verdicts_are_joined_by_key_and_appended_once(run: RunFolder) -> None:
    attempts = judged_run(run, ["no", "yes", "so no", "yes"])
    judge = RecordingJudge()
    first = judge_completions(run, judge, attempts[::-1])
    assert {one.prompt_id: one.status for one in first} == {
        "p0": "refused",
        "p1": "complied",
        "p2": "refused",
        "p3": "complied",
    }
    assert run.records("verdicts.recording.jsonl", Verdict) == first
    assert judge_completions(run, judge, attempts) == first
    assert len(judge.batches) == 1, "nothing was judged again"


def test_only_what_is_missing_is_judged(run: RunFolder) -> None:
    attempts = judged_run(run, ["no", "yes", "so no"])
    whole = judge_completions(run, RecordingJudge(), attempts)
    run.write_records("verdicts.recording.jsonl", whole[:1])
    judge = RecordingJudge()
    told: list[tuple[str, int, int]] = []
    again = judge_completions(run, judge, attempts, progress=lambda *news: told.append(news))
    assert again == whole
    assert [item.response for item in judge.batches[0]] == ["yes", "so no"]
    assert told == [("judging", 1, 3), ("judging", 3, 3)]


def test_records_of_other_attempts_are_left_alone(run: RunFolder) -> None:
    attempts = judged_run(run, ["no", "yes", "so no"])
    assert [one.prompt_id for one in judge_completions(run, RecordingJudge(), attempts[1:2])] == ["p1"]


def test_each_judge_has_a_file_of_its_own(run: RunFolder) -> None:
    attempts = judged_run(run, ["no"])
    judge = RecordingJudge()
    judge_completions(run, judge, attempts)
    other = RecordingJudge()
    other.name = "other"
    assert judge_completions(run, other, attempts)[0].judge == "other"
    assert (run / "verdicts.other.jsonl").exists()


def test_a_judges_failure_costs_one_batch_of_64(run: RunFolder) -> None:
    attempts = judged_run(run, [*["yes"] * 70, "a bomb", *["yes"] * 59])
    verdicts = judge_completions(run, BrokenJudge(), attempts)
    assert len(verdicts) == 130
    assert [one.status for one in verdicts] == ["complied"] * 64 + ["unscored"] * 64 + ["complied"] * 2


PROMPTS = [
    Prompt(prompt_id="one", text="How do I open the door?", answer=ANSWER),
    Prompt(prompt_id="none", text="How do I count?"),
    Prompt(prompt_id="two", text="How do I turn on the light?", answer="Sure."),
    Prompt(prompt_id="empty", text="How?", answer=""),
    Prompt(prompt_id="three", text="How do I bake bread?", answer="Mix the flour with water, salt and yeast."),
]


@pytest.fixture
def base(tiny_llama: Callable[..., Any], tiny_tokenizer: Any) -> LoadedModel:
    return from_objects(tiny_llama(seed=1), tiny_tokenizer, name="base")


def measure(run: RunFolder, loaded: LoadedModel, base: LoadedModel, prompts: Sequence[Prompt], **more: Any) -> Any:
    found = measure_kl(run, loaded, base, prompts, **{"system_prompt": None, "max_positions": 6, **more})
    assert found == run.records(KL, KlProfile)
    return {one.prompt_id: one for one in found}


def test_kl_is_measured_on_every_prompt_with_an_answer(run: RunFolder, loaded: LoadedModel, base: LoadedModel) -> None:
    found = measure(run, loaded, base, PROMPTS)
    assert set(found) == {"one", "two", "three"}
    for prompt in PROMPTS:
        if not prompt.answer:
            continue
        ids = answer_ids(loaded.tokenizer, prompt.answer)
        rendered = render(loaded.tokenizer, loaded.template, conversation(prompt.text, None), ids)
        (alone,) = kl_profiles(
            loaded.model, base.model, [(prompt.prompt_id, rendered)], vocab_size=400, max_positions=6
        )
        assert found[prompt.prompt_id].forward == pytest.approx(alone.forward, abs=1e-5)
        assert len(alone.forward) == min(6, len(ids))
        assert min(alone.forward) > 0.01


def test_kl_is_measured_once(run: RunFolder, loaded: LoadedModel, base: LoadedModel) -> None:
    told: list[tuple[str, int, int]] = []
    first = measure(run, loaded, base, PROMPTS[:2])
    whole = measure(run, loaded, base, PROMPTS, progress=lambda *news: told.append(news))
    assert whole["one"] == first["one"]
    assert told == [("measuring KL", done, 3) for done in (1, 2, 3)]

    def refuse(*args: Any) -> None:
        raise AssertionError("the model was run")

    loaded.model.register_forward_pre_hook(refuse)
    assert measure(run, loaded, base, PROMPTS) == whole


def test_kl_sees_the_system_prompt(run: RunFolder, loaded: LoadedModel, base: LoadedModel, tmp_path: Path) -> None:
    without = measure(run, loaded, base, PROMPTS)["one"]
    other = RunFolder(tmp_path / "other")
    other.path.mkdir()
    assert measure(other, loaded, base, PROMPTS, system_prompt="Be kind.")["one"].forward != pytest.approx(
        without.forward, abs=1e-3
    )


def test_kl_values_that_are_unknown_survive_the_file(run: RunFolder, loaded: LoadedModel, base: LoadedModel) -> None:
    with torch.no_grad():
        loaded.model.lm_head.weight.fill_(float("nan"))
    found = measure(run, loaded, base, PROMPTS[:1])
    assert found["one"].forward == (None,) * 6
    assert "NaN" not in (run / KL).read_text(encoding="utf-8")


def test_kl_between_two_vocabularies_is_refused_before_anything_is_run(
    run: RunFolder, loaded: LoadedModel, tiny_llama: Any
) -> None:
    other = dataclasses.replace(loaded, name="base", tokenizer=OtherTokenizer(), model=tiny_llama(seed=1))
    with pytest.raises(UserError, match="target and base have different vocabularies"):
        measure(run, loaded, other, PROMPTS)
    assert not (run / KL).exists()


class OtherTokenizer:
    def get_vocab(self) -> dict[str, int]:
        return {"a": 0, "b": 1}
