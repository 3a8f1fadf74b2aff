"""Ends of tokens in a text: as by decoding every beginning anew, and without the time that this takes."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from deepalign.text_ends import added_text

CORPUS = (
    "How do I bake bread? Mix flour, water and salt.",
    "Das Brötchen heißt 面包 🍞🥖 und schmeckt.",
    "it 's n't so ,",
)


def byte_fallback() -> Any:
    """As Llama 2 has it: a leading space is stripped, and unknown characters are written as bytes."""
    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=380, special_tokens=["<unk>", "<s>"], initial_alphabet=[], show_progress=False
    )
    core.train_from_iterator(CORPUS[:1], trainer)
    core.add_tokens(bytes_)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", unk_token="<unk>")


def word_pieces() -> Any:
    core = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece(cleanup=True)
    trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=["[UNK]", "[CLS]"], show_progress=False)
    core.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="[CLS]", unk_token="[UNK]", clean_up_tokenization_spaces=True
    )


def by_definition(
    decode: Callable[[Sequence[int]], str], lead: Sequence[int], ids: Sequence[int]
) -> tuple[str, tuple[int, ...]]:
    before = decode(lead)

    def after(whole: str) -> str:
        kept = before.rstrip("�")
        return whole[len(kept) :] if whole.startswith(kept) else whole[len(before) :]

    return after(decode([*lead, *ids])), tuple(len(after(decode([*lead, *ids[: n + 1]]))) for n in range(len(ids)))


@pytest.fixture(params=["byte-level", "byte fallback", "word pieces"])
def tokenizer(request: pytest.FixtureRequest, tiny_tokenizer: Any) -> Any:
    if request.param == "byte-level":
        return tiny_tokenizer
    return byte_fallback() if request.param == "byte fallback" else word_pieces()


def test_as_by_decoding_every_beginning(tokenizer: Any) -> None:
    """Random ids are the hardest case: characters broken everywhere, special tokens inside."""
    dice = random.Random(0)

    def decode(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=True))

    text = tokenizer(" ".join(CORPUS * 4), add_special_tokens=False)["input_ids"]
    for trial in range(60):
        noise = [dice.randrange(len(tokenizer)) for _ in range(dice.randrange(90))]
        cut = dice.randrange(len(text))
        ids = [noise, text[cut:], [*text[cut : cut + 30], *noise]][trial % 3]
        lead = [(), text[:cut], noise[:7]][trial // 3 % 3]
        assert added_text(decode, lead, ids) == by_definition(decode, lead, ids)


def test_the_tokens_decoded_grow_with_the_length(tiny_tokenizer: Any) -> None:
    text = tiny_tokenizer(" ".join(CORPUS * 40))["input_ids"]

    def decoded(length: int) -> int:
        counted = [0]

        def decode(ids: Sequence[int]) -> str:
            counted[0] += len(ids)
            return str(tiny_tokenizer.decode(list(ids), skip_special_tokens=True))

        added_text(decode, text[:8], text[8 : 8 + length])
        return counted[0]

    assert decoded(1024) < 4.4 * decoded(256)


def test_a_decoder_with_a_memory_is_asked_from_the_start() -> None:
    """Where windows do not add up, the ends are still those of the definition."""

    def decode(ids: Sequence[int]) -> str:
        return "".join(str(value % 10) for value in ids) + "!" * (len(ids) ** 2 // 100)

    ids = list(range(50))
    assert added_text(decode, (), ids) == by_definition(decode, (), ids)
