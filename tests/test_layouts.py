"""Models in other forms: wrappers of several modalities, weights of few bits, layers spread over places."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForImageTextToText

from deepalign import weights
from deepalign.depth import kl_profiles
from deepalign.errors import UserError
from deepalign.generation import Job, generate
from deepalign.models import fingerprint, load_model
from deepalign.onset import Openings, onset_profiles
from deepalign.records import Sampling
from support import conversation

GREEDY = Sampling(temperature=0.0, max_new_tokens=8)
IDS = tuple(range(10, 30))
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
PATCHES = {**VISION, "image_size": 16, "patch_size": 8}
BLOCKS = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
MROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
WRAPPERS: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "gemma3": ({"model_type": "gemma3_text", "sliding_window": 512}, {"model_type": "siglip_vision_model", **PATCHES}),
    "mistral3": ({"model_type": "mistral"}, {"model_type": "pixtral", "head_dim": 16, **PATCHES}),
    "llava": ({"model_type": "llama"}, {"model_type": "clip_vision_model", **PATCHES}),
    "qwen2_5_vl": (MROPE, {**BLOCKS, "fullatt_block_indexes": [0]}),
    "qwen3_vl": (MROPE, {**BLOCKS, "deepstack_visual_indexes": [0]}),
    "qwen3_5": (LINEAR, BLOCKS),
    # No encoder at all: images go into the decoder as they are.
    "gemma4_unified": ({"sliding_window": 512, "vocab_size_per_layer_input": 404}, None),
}


def written(model: Any, *rows: tuple[int, ...]) -> list[tuple[int, ...]]:
    jobs = [Job(ids=ids, sampling=GREEDY, seed=0) for ids in rows]
    found = sorted(generate(model, jobs, stop_ids=()), key=lambda one: one.index)
    assert {one.status for one in found} == {"ok"}
    return [one.token_ids for one in found]


def library_greedy(model: Any, ids: tuple[int, ...]) -> tuple[int, ...]:
    out = model.generate(
        input_ids=torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        do_sample=False,
        max_new_tokens=8,
        min_new_tokens=8,
        pad_token_id=0,
    )
    return tuple(out[0, len(ids) :].tolist())


@pytest.mark.parametrize("name", list(WRAPPERS))
def test_a_wrapper_of_a_language_model_is_one(name: str, tiny_tokenizer: Any, tmp_path: Path) -> None:
    text, vision = WRAPPERS[name]
    sizes = {"vocab_size": 404, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    # Tied, Gemma's scaled embeddings would only echo their input.
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "eos_token_id": None, "tie_word_embeddings": False}
    settings: dict[str, Any] = {"text_config": {**sizes, **heads, **text}, "tie_word_embeddings": False}
    if vision is not None:
        settings["vision_config"] = vision
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        wrapper = AutoModelForImageTextToText.from_config(AutoConfig.for_model(name, **settings))
        for weight in wrapper.parameters():
            if weight.dim() > 1:
                torch.nn.init.normal_(weight, std=0.4)
    wrapper.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), dtype="float32", device="cpu")
    model = loaded.model
    assert loaded.vocab_size == 404
    expected = [library_greedy(model, ids) for ids in (IDS, IDS[:9])]
    assert len(set(sum(expected, ()))) > 3, "too monotonous to tell right from wrong"
    assert written(model, IDS, IDS[:9]) == expected
    items = [("p", conversation(6, 9, 0))]
    (itself,) = kl_profiles(model, model, items, vocab_size=404, max_positions=9)
    assert itself.forward == pytest.approx([0.0] * 9, abs=1e-5)
    (onset,) = onset_profiles(model, items, Openings(frozenset({(5,), (7, 8)})), vocab_size=404, max_positions=9)
    assert onset.finite


@pytest.fixture
def wide_folder(tiny_model_folder: Callable[..., Path]) -> Callable[..., Path]:
    """A model wide enough for blocks of 64 weights."""
    return lambda name="model", **settings: tiny_model_folder(name, hidden_size=64, intermediate_size=128, **settings)


@pytest.mark.parametrize(("quantize", "most"), [("8bit", 0.2), ("4bit", 0.9)])
def test_few_bits(quantize: Any, most: float, wide_folder: Callable[..., Path]) -> None:
    folder = str(wide_folder())
    plain = load_model(folder, dtype="bfloat16", device="cpu")
    rounded = load_model(folder, dtype="bfloat16", device="cpu", quantize=quantize)
    assert plain.quantization is None
    assert rounded.quantization == f"bitsandbytes {quantize}"
    assert (rounded.dtype, rounded.vocab_size) == (plain.dtype, plain.vocab_size)
    assert rounded.num_parameters == plain.num_parameters
    assert rounded.fingerprint != plain.fingerprint
    ids = torch.tensor([IDS])
    with torch.no_grad():
        ours, theirs = rounded.model(input_ids=ids).logits.float(), plain.model(input_ids=ids).logits.float()
    assert 0.0 < float((ours - theirs).norm() / theirs.norm()) < most
    assert written(rounded.model, IDS) == [library_greedy(rounded.model, IDS)]
    assert rounded.fingerprint == load_model(folder, dtype="bfloat16", device="cpu", quantize=quantize).fingerprint


def test_an_adapter_on_few_bits_stays_beside_them(wide_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = wide_folder()
    base = load_model(str(folder), dtype="float32", device="cpu")
    adapted = get_peft_model(base.model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    settings: dict[str, Any] = {"dtype": "bfloat16", "device": "cpu", "quantize": "4bit"}
    alone = load_model(str(folder), **settings)
    beside = load_model(str(tmp_path / "adapter"), adapter_base=str(folder), **settings)
    assert beside.quantization == "bitsandbytes 4bit"
    assert beside.fingerprint != alone.fingerprint
    with torch.no_grad():
        logits = [one.model(input_ids=torch.tensor([IDS])).logits.float() for one in (alone, beside)]
    assert float((logits[0] - logits[1]).norm() / logits[0].norm()) > 0.05
    assert written(beside.model, IDS) == [library_greedy(beside.model, IDS)]


def test_weights_that_were_saved_with_few_bits(wide_folder: Callable[..., Path], tmp_path: Path) -> None:
    rounded = load_model(str(wide_folder()), dtype="bfloat16", device="cpu", quantize="4bit")
    rounded.model.save_pretrained(tmp_path / "few")
    rounded.tokenizer.save_pretrained(tmp_path / "few")
    again = load_model(str(tmp_path / "few"), dtype="bfloat16", device="cpu")
    assert again.quantization == "bitsandbytes 4bit"
    assert written(again.model, IDS) == written(rounded.model, IDS)


def test_few_bits_without_the_package(wide_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any, **__: Any) -> None:
        raise ImportError(
            "Using `bitsandbytes` 4-bit quantization requires bitsandbytes: `pip install -U bitsandbytes`"
        )

    folder = str(wide_folder())
    monkeypatch.setattr(weights.AutoModelForCausalLM, "from_pretrained", missing)
    with pytest.raises(UserError, match=r"needs a package that is not installed: .*pip install -U bitsandbytes"):
        load_model(folder, device="cpu", quantize="4bit")


def test_gguf_takes_neither(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    for settings in ({"quantize": "4bit"}, {"device": "sharded"}):
        with pytest.raises(UserError, match="leave out --quantize, and name one --device"):
            load_model(str(tmp_path / "model.gguf"), **settings)  # type: ignore[arg-type]


def test_sharded_on_one_device_is_the_same_model(tiny_model_folder: Callable[..., Path]) -> None:
    folder = str(tiny_model_folder())
    spread = load_model(folder, dtype="float32", device="sharded")
    whole = load_model(folder, dtype="float32", device="cpu")
    assert spread.fingerprint == whole.fingerprint
    assert written(spread.model, IDS, IDS[:7]) == written(whole.model, IDS, IDS[:7])


def test_layers_that_are_fetched_when_they_are_needed(tiny_model_folder: Callable[..., Path], tmp_path: Path) -> None:
    """What `device_map` does with a model larger than all devices: some layers, here the head too, come from disk."""
    folder = str(tiny_model_folder(tie_word_embeddings=False))
    whole = load_model(folder, dtype="float32", device="cpu").model
    items = [(f"p{seed}", conversation(6, 9, seed)) for seed in range(3)]
    openings = Openings(frozenset({(5,), (7, 8), (7, 9, 10)}))

    def measured(model: Any) -> tuple[Any, ...]:
        return (
            fingerprint(model),
            written(model, IDS, IDS[:7]),
            [profile.forward for profile in kl_profiles(model, whole, items, vocab_size=400, max_positions=9)],
            [one.checked for one in onset_profiles(model, items, openings, vocab_size=400, max_positions=9)],
        )

    expected = measured(whole)
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    spread = dispatch_model(
        load_model(folder, dtype="float32", device="cpu").model,
        {**places, "model.rotary_emb": "cpu", "lm_head": "disk"},
        offload_dir=str(tmp_path / "offload"),
    )
    assert spread.lm_head.weight.is_meta
    found = measured(spread)
    assert found[:2] == expected[:2]
    for ours, theirs in zip(found[2] + found[3], expected[2] + expected[3], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)
