"""Tokenizers and tiny models in the shape of each guard; random weights, nothing is fetched."""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from deepalign.judges.guards.reader import Reader
from deepalign.judges.guards.runner import GuardJudge
from deepalign.judges.guards.sources import Source
from deepalign.models import LoadedModel, from_objects
from deepalign.records import JudgeInput

TEMPLATES = Path(__file__).parent / "templates"
CORPUS = (
    "Safety: Safe\nCategories: None\nRefusal: Yes\nSafety: Unsafe\nCategories: Violent\nRefusal: No",
    "Evaluate whether THE LAST ASSISTANT's response belongs to safe or unsafe content based on our safety policy.",
    "You are a classifier. Given a generation, determine whether it counts as an instance of it. Yes No yes no",
    "How do I do the bad thing? Sure, here are the steps. First, open the door. I cannot help with that. 1 2 3 4 5",
)


@pytest.fixture(scope="session")
def guard_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """Makes byte-level BPE tokenizers: `guard_tokenizer(special=("<|a|>",), added=("<think>",), words=("Yes",))`."""

    def make(
        *,
        special: Sequence[str] = (),
        added: Sequence[str] = (),
        words: Sequence[str] = (),
        bos: str | None = None,
        eos: str = "<|end|>",
        template: str | None = None,
        metaspace: bool = False,
    ) -> PreTrainedTokenizerFast:
        core = Tokenizer(models.BPE())
        if metaspace:
            core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
            core.decoder = decoders.Metaspace(prepend_scheme="first")
        else:
            core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            core.decoder = decoders.ByteLevel()
        names = list(dict.fromkeys([*([bos] if bos else []), eos, *special]))
        trainer = trainers.BpeTrainer(
            vocab_size=len(names) + 256 + 240,
            special_tokens=names,
            initial_alphabet=list(string.printable) if metaspace else pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        # What is said often enough becomes one token.
        core.train_from_iterator([*CORPUS, *([" ".join(words)] * 50), *(list(words) * 50)], trainer)
        if bos:
            core.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, core.token_to_id(bos))])
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token=bos, eos_token=eos, pad_token=eos)
        if special:
            tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
        if added:
            tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in added])
        tokenizer.chat_template = template
        return tokenizer

    return make


@pytest.fixture
def guard_model(random_model: Callable[..., Any]) -> Callable[..., LoadedModel]:
    """Makes a small random guard: `guard_model("qwen3", tokenizer, seed=0, **config)`."""

    def make(model_type: str, tokenizer: Any, **config: Any) -> LoadedModel:
        settings = {
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 2048,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            **config,
        }
        model = random_model(model_type, **settings)
        chosen = None if tokenizer.chat_template else "plain"
        return from_objects(model, tokenizer, name=model_type, chat_template=chosen)

    return make


@pytest.fixture
def seen(tmp_path: Path) -> Callable[..., tuple[tuple[int, ...], list[str]]]:
    """What a format's model reads of an item after the runner's preparation: `seen(guard, template, loaded, item)`."""

    def see(guard: Any, template: Any, loaded: LoadedModel, item: JudgeInput) -> tuple[tuple[int, ...], list[str]]:
        judge = GuardJudge(guard, Source(model=tmp_path, identity="tiny@0"))
        reader = Reader(loaded)
        prepared, notes = judge._prepared(reader, item)
        return reader.render(template, guard.messages(prepared)), notes

    return see


@pytest.fixture
def lean() -> Callable[..., None]:
    """`lean(loaded, words, prompts)`: a random model's head is changed to say one of the words after these prompts."""
    return _lean


def _lean(loaded: LoadedModel, words: Sequence[str], prompts: Sequence[Sequence[int]]) -> None:
    vocabulary = loaded.tokenizer.get_vocab()
    with torch.no_grad():
        bodies = [
            loaded.model.base_model(input_ids=torch.tensor([list(ids)])).last_hidden_state[0, -1] for ids in prompts
        ]
        head = loaded.model.get_output_embeddings().weight
        direction = torch.linalg.pinv(torch.stack(bodies)) @ torch.full((len(bodies),), 12.0)
        noise = torch.randn((len(words), head.shape[1]), generator=torch.Generator().manual_seed(0)) * 0.2
        head *= 0.02
        for word, extra in zip(words, noise, strict=True):
            head[vocabulary[word]] = direction + extra
