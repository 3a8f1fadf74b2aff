"""Fixtures: a tokenizer trained here, and random two-layer models; nothing is fetched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHATML = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL_TOKENS = ("<|bos|>", "<|im_start|>", "<|im_end|>", "<|pad|>")
CORPUS = (
    "How do I bake bread? Mix the flour with water, salt and yeast, and let the dough rest for an hour.",
    "I cannot help with that request. I am sorry, but I am unable to assist with it.",
    "Sure, here are the steps. First, open the door; second, turn on the light; third, count to ten.",
    "system user assistant: the quick brown fox jumps over the lazy dog 0 1 2 3 4 5 6 7 8 9",
)


def train_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of about 400 tokens; any text can be encoded and comes back unchanged."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(CORPUS, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<|bos|>", eos_token="<|im_end|>", pad_token="<|pad|>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A fresh ChatML tokenizer: the template writes the BOS, and <|im_end|> is the EOS."""
    return train_tokenizer()


@pytest.fixture
def tiny_llama(tiny_tokenizer: Any) -> Callable[..., LlamaForCausalLM]:
    """Makes random two-layer Llamas over the tiny vocabulary: `tiny_llama(seed=0, **config)`."""

    def make(seed: int = 0, **config: Any) -> LlamaForCausalLM:
        settings: dict[str, Any] = {
            "vocab_size": len(tiny_tokenizer),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            # Wide enough that logits differ clearly; the usual 0.02 gives near ties everywhere.
            "initializer_range": 0.3,
            "bos_token_id": tiny_tokenizer.bos_token_id,
            "eos_token_id": tiny_tokenizer.eos_token_id,
            "pad_token_id": tiny_tokenizer.pad_token_id,
            **config,
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return LlamaForCausalLM(LlamaConfig(**settings)).eval()

    return make


@pytest.fixture
def tiny_model_folder(
    tmp_path: Path, tiny_tokenizer: Any, tiny_llama: Callable[..., LlamaForCausalLM]
) -> Callable[..., Path]:
    """Saves a random model with the tiny tokenizer: `tiny_model_folder("base")`, `tiny_model_folder("target", seed=1)`.

    Folders of one test share the tokenizer; the weights are safetensors.
    """

    def make(name: str = "model", seed: int = 0, **config: Any) -> Path:
        folder = tmp_path / name
        tiny_llama(seed, **config).save_pretrained(folder)
        tiny_tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture
def random_model() -> Callable[..., Any]:
    """Makes a small random causal LM of any architecture: `random_model("gemma3_text", seed=0, **config)`.

    97 tokens; no EOS, so that the library's own `generate` writes as many tokens as asked.
    """

    def make(model_type: str, seed: int = 0, **config: Any) -> Any:
        settings: dict[str, Any] = {
            "vocab_size": 97,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 256,
            "initializer_range": 0.3,
            "tie_word_embeddings": False,
            "bos_token_id": 0,
            "eos_token_id": None,
            "pad_token_id": 2,
            **config,
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(
                AutoConfig.for_model(model_type, **settings), dtype=torch.float32
            ).eval()
            # Some classes start at a width of their own; near-equal logits would make greedy a toss-up.
            for name, weight in model.named_parameters():
                if weight.dim() > 1 and weight.std() < 0.15 and "A_log" not in name:
                    torch.nn.init.normal_(weight, std=0.3)
        return model

    return make
