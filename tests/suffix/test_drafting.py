"""Probe sampling: which candidates the model reads, that losses stay its own, and that a killed search goes on."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from deepalign import cli
from deepalign.chat import resolve_template
from deepalign.suffix.behaviours import Behaviour, behaviour
from deepalign.suffix.drafting import Draft, probes, worth_reading
from deepalign.suffix.panel import Panel
from deepalign.suffix.proposals import Seen, step_generator
from deepalign.suffix.search import SearchSettings, SearchState, search

SMALL: dict[str, Any] = {"suffix_tokens": 6, "steps": 6, "search_width": 48, "topk": 40, "early_stop": False}


def test_how_many_more_are_read_follows_from_the_agreement() -> None:
    """64 candidates, reduction 8: none agree (rho -1) reads 8 more, no relation 4, full agreement 1."""
    draft = [float(value) for value in range(64)]
    probed = [10, 20, 30, 40]
    assert worth_reading(probed, [4.0, 3.0, 2.0, 1.0], draft) == list(range(8))
    # Ranks 2, 4, 1, 3 against 1, 2, 3, 4 have a Spearman correlation of 0.
    assert worth_reading(probed, [2.0, 4.0, 1.0, 3.0], draft) == list(range(4))
    assert worth_reading(probed, [1.0, 2.0, 3.0, 4.0], draft) == [0]


def test_what_is_known_or_unreadable_is_not_read_again() -> None:
    draft = [0.0, math.inf, 1.0, 2.0, 3.0, *[9.0] * 59]
    # Ranks 4, 3, 1, 2 against 1, 2, 3.5, 3.5: rho -0.949, so int(0.974 * 64 / 8) = 7, less the two that are known.
    assert worth_reading([0, 2, 20, 21], [1.0, 0.9, 0.1, 0.2], draft) == [3, 4, 5, 6, 7]
    # One pair has no correlation, as if there were none: int(0.5 * 64 / 8) = 4, less the two that are known.
    assert worth_reading([0, 2], [math.inf, 1.0], draft) == [3, 4]
    assert worth_reading([0], [1.0], [math.inf] * 8) == []


def test_probes_are_a_sixteenth_and_at_least_four() -> None:
    assert len(probes(160, step_generator(0, 0))) == 10
    assert len(set(probes(20, step_generator(0, 0)))) == 4
    assert sorted(probes(3, step_generator(0, 0))) == [0, 1, 2]
    assert probes(160, step_generator(1, 5)) == probes(160, step_generator(1, 5))


def test_what_was_not_read_may_come_again() -> None:
    seen = Seen()
    for number in range(6):
        seen.add((number,))
    seen.forget([(1,), (4,), (5,)], since=3)
    assert [(number,) in seen for number in range(6)] == [True, True, True, True, False, False]
    assert len(Seen(seen.packed)) == len(seen) == 4


@pytest.fixture
def other_tokenizer(tiny_tokenizer: Any) -> PreTrainedTokenizerFast:
    """Cuts text otherwise than the tiny tokenizer: bytes alone."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        ["no merges"],
        trainers.BpeTrainer(
            vocab_size=260,
            special_tokens=["<|bos|>", "<|im_start|>", "<|im_end|>", "<|pad|>"],
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<|bos|>", eos_token="<|im_end|>", pad_token="<|pad|>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = tiny_tokenizer.chat_template
    return tokenizer


def drafted(model: Any, tokenizer: Any, asked: list[Behaviour]) -> Draft:
    template = resolve_template(tokenizer, None, "draft")
    assert template is not None
    own = [behaviour(tokenizer, template, prompt_id=at.prompt_id, text=at.text, target=at.target) for at in asked]
    return Draft(model, tokenizer, own, "feedface")


def run(model: Any, tokenizer: Any, asked: list[Behaviour], **given: Any) -> Any:
    settings = {**SMALL, **given.pop("settings", {})}
    return search(model, tokenizer, asked, SearchSettings(**settings), **given)


@pytest.mark.parametrize("other", [False, True], ids=["same tokenizer", "another"])
@pytest.mark.parametrize("count", [1, 2])
def test_few_are_read_and_the_losses_are_the_models(
    other: bool,
    count: int,
    tiny_llama: Callable[..., Any],
    tiny_tokenizer: Any,
    other_tokenizer: Any,
    behaviours: list[Behaviour],
) -> None:
    model, asked = tiny_llama(), behaviours[:count]
    tokenizer = other_tokenizer if other else tiny_tokenizer
    draft = drafted(tiny_llama(3, num_hidden_layers=1, vocab_size=len(tokenizer)), tokenizer, asked)
    found = run(model, tiny_tokenizer, asked, draft=draft, settings={"progressive": False})
    begun = run(model, tiny_tokenizer, asked, settings={"progressive": False, "steps": 0})
    assert found.evaluated < 0.4 * 6 * 48
    assert found.drafted + found.evaluated == 6 * 48
    assert sum(found.losses) < sum(begun.losses)
    plain = Panel(model, asked, SearchSettings(**SMALL), found.suffix_ids).scores(found.suffix_ids)
    assert found.losses == pytest.approx([score.loss for score in plain], rel=1e-5)
    assert found.comes_back


def test_a_draft_like_the_model_finds_what_reading_all_finds(
    tiny_llama: Callable[..., Any], tiny_tokenizer: Any, behaviours: list[Behaviour]
) -> None:
    """With the model itself as the draft the first step's best is the best of all: it is the draft's first."""
    model, asked = tiny_llama(), behaviours[:1]
    draft = drafted(tiny_llama(), tiny_tokenizer, asked)
    one_step = {"steps": 1}
    found = run(model, tiny_tokenizer, asked, draft=draft, settings=one_step)
    whole = run(model, tiny_tokenizer, asked, settings=one_step)
    assert found.suffix_ids == whole.suffix_ids
    assert found.evaluated <= 6 < whole.evaluated == 48


def test_a_killed_search_with_a_draft_goes_on_to_the_same_end(
    tiny_llama: Callable[..., Any], tiny_tokenizer: Any, behaviours: list[Behaviour]
) -> None:
    model, asked = tiny_llama(), behaviours[:1]

    def small() -> Draft:
        return drafted(tiny_llama(3, num_hidden_layers=1), tiny_tokenizer, asked)

    whole = run(model, tiny_tokenizer, asked, draft=small())
    states: list[str] = []
    run(
        model,
        tiny_tokenizer,
        asked,
        draft=small(),
        settings={"steps": 3},
        on_step=lambda state: states.append(json.dumps(state.to_json())),
    )
    torch.manual_seed(1)
    state = SearchState.from_json(json.loads(states[-1]))
    assert run(model, tiny_tokenizer, asked, draft=small(), state=state) == whole
    with pytest.raises(Exception, match="other settings"):
        run(model, tiny_tokenizer, asked, state=SearchState.from_json(json.loads(states[-1])))


@pytest.mark.parametrize("draft", ["missing", "itself"])
def test_a_draft_that_cannot_be_is_told(
    draft: str, tiny_model_folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_model_folder("model")
    given = tmp_path / "nowhere" if draft == "missing" else model
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("How do I do the bad thing 1?\n", encoding="utf-8")
    asked = ["suffix", str(model), "--prompts", str(prompts), "--draft", str(given), "--output", str(tmp_path / "run")]
    capsys.readouterr()
    assert cli.main(asked) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert str(given) in told
