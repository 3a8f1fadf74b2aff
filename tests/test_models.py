"""Loading: every kind of source, adapters merged and checked, and mistakes told in one line."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file

from deepalign.chat import conversation, render
from deepalign.errors import UserError
from deepalign.models import fingerprint, from_objects, load_model

IDS = torch.arange(5, 25).unsqueeze(0)
MakeModel = Callable[..., Any]
MakeFolder = Callable[..., Path]


def load(name: str | Path, **settings: Any) -> Any:
    return load_model(str(name), **{"dtype": "float32", "device": "cpu", **settings})


def refusal(name: str | Path, **settings: Any) -> str:
    """The one line that loading ends with."""
    with pytest.raises(UserError) as error:
        load(name, **settings)
    text = str(error.value)
    assert "\n" not in text
    return text


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=IDS).logits
    return out


def copy_of(folder: Path, name: str, without: str | None = None) -> Path:
    copy = folder.with_name(name)
    shutil.copytree(folder, copy)
    if without is not None:
        (copy / without).unlink()
    return copy


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub is out of reach, as the hub's own switch says it (read at import, hence the second line)."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_a_local_folder(tiny_model_folder: MakeFolder, tiny_llama: MakeModel) -> None:
    folder = tiny_model_folder("base", seed=3)
    loaded = load(folder)
    assert torch.equal(logits(loaded.model), logits(tiny_llama(seed=3)))
    assert not loaded.model.training
    assert (loaded.name, loaded.source, loaded.dtype) == (str(folder), "folder", "float32")
    assert (loaded.vocab_size, loaded.architecture, loaded.device.type) == (400, "LlamaForCausalLM", "cpu")
    assert loaded.num_parameters == sum(weight.numel() for weight in tiny_llama().parameters())
    assert loaded.template.source == "model"
    assert loaded.fingerprint == fingerprint(tiny_llama(seed=3))


def test_a_folder_with_tied_weights_is_whole(tiny_model_folder: MakeFolder, tiny_llama: MakeModel) -> None:
    loaded = load(tiny_model_folder("tied", tie_word_embeddings=True))
    assert torch.equal(logits(loaded.model), logits(tiny_llama(tie_word_embeddings=True)))


def test_a_folder_named_from_home(
    tiny_model_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tiny_model_folder("base")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load("~/base").source == "folder"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtypes(dtype: str, tiny_model_folder: MakeFolder) -> None:
    assert load(tiny_model_folder(), dtype=dtype).dtype == dtype


def test_auto_chooses_what_the_hardware_is_fast_at(tiny_model_folder: MakeFolder) -> None:
    assert load(tiny_model_folder(), dtype="auto", device="auto").dtype in ("bfloat16", "float32")


@pytest.mark.parametrize(
    ("settings", "start"),
    [
        ({"dtype": "int4"}, "--dtype int4 is not one of auto, float32, bfloat16, float16"),
        ({"device": "cuda:77"}, "--device cuda:77 cannot be used here: "),
        ({"device": "gpu"}, "--device gpu cannot be used here: "),
        ({"chat_template": "/no/such.jinja"}, "--chat-template /no/such.jinja: cannot be read"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, str], start: str, tiny_model_folder: MakeFolder) -> None:
    assert refusal(tiny_model_folder(), **settings).startswith(start)


def test_names_that_cannot_be(tmp_path: Path) -> None:
    assert "no such folder" in refusal(tmp_path / "nowhere")
    assert "no such folder" in refusal("./nowhere")
    assert "no such folder" in refusal("two words")
    assert "testbed:shallow" in refusal("testbed:nonesuch")
    (tmp_path / "weights.safetensors").write_bytes(b"x")
    assert "is a file but not a .gguf" in refusal(tmp_path / "weights.safetensors")


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("revision", [None, "v1.2"])
def test_a_hub_id_without_a_network_is_one_line_at_once(revision: str | None) -> None:
    start = time.perf_counter()
    text = refusal("deepalign-nobody/deepalign-nothing", revision=revision)
    assert time.perf_counter() - start < 5
    assert text.startswith("deepalign-nobody/deepalign-nothing" + (" at revision v1.2: " if revision else ": "))
    assert "hub" in text
    assert "network" in text


def test_a_folder_with_pickled_weights_only(tiny_model_folder: MakeFolder) -> None:
    folder = copy_of(tiny_model_folder(), "pickled", without="model.safetensors")
    torch.save({}, folder / "pytorch_model.bin")
    assert "pickled weights are not read" in refusal(folder)


def test_an_empty_folder(tmp_path: Path) -> None:
    assert "without config.json, adapter_config.json or a single .gguf file" in refusal(tmp_path)


def test_a_folder_without_a_tokenizer(tiny_llama: MakeModel, tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "bare")
    assert "has no usable tokenizer" in refusal(tmp_path / "bare")


def test_broken_files(tiny_model_folder: MakeFolder) -> None:
    folder = tiny_model_folder()
    weights = copy_of(folder, "weights")
    (weights / "model.safetensors").write_bytes(b"not weights")
    assert "cannot be loaded as a causal LM" in refusal(weights)
    config = copy_of(folder, "config")
    (config / "config.json").write_text("{", encoding="utf-8")
    assert "cannot be loaded as a causal LM" in refusal(config)
    other = copy_of(folder, "other")
    (other / "config.json").write_text('{"model_type": "t5"}', encoding="utf-8")
    assert "cannot be loaded as a causal LM" in refusal(other)


def test_missing_weights_are_never_made_up(tiny_model_folder: MakeFolder) -> None:
    """`transformers` draws them at random and only warns: an audit of noise."""
    folder = tiny_model_folder()
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    text = refusal(folder)
    assert "1 weights are missing, such as model.layers.1.mlp.up_proj.weight" in text


def test_a_models_own_code_is_neither_run_nor_asked_about(
    tiny_model_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Left to itself, `transformers` would ask on the terminal whether to run it."""
    folder = tiny_model_folder()
    ran = folder / "ran"
    (folder / "own.py").write_text(f"open({str(ran)!r}, 'w').close()\n", encoding="utf-8")
    code = {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}
    (folder / "config.json").write_text(json.dumps({"model_type": "unheard-of", "auto_map": code}), encoding="utf-8")

    def asked(question: str = "") -> str:
        pytest.fail(f"asked: {question}")

    monkeypatch.setattr("builtins.input", asked)
    assert "custom code" in refusal(folder)
    assert not ran.exists()


def test_a_tokenizer_larger_than_the_embeddings(tiny_llama: MakeModel, tiny_tokenizer: Any) -> None:
    model = tiny_llama()
    tiny_tokenizer.add_tokens(["<one>", "<two>"])
    with pytest.raises(UserError, match="knows 402 tokens but the model has 400 embedding rows"):
        from_objects(model, tiny_tokenizer, name="tiny")


def test_wrapping_objects_changes_neither(tiny_llama: MakeModel, tiny_tokenizer: Any) -> None:
    model = tiny_llama().train()
    loaded = from_objects(model, tiny_tokenizer, name="mine", chat_template="plain")
    assert loaded.model is model
    assert model.training
    assert loaded.tokenizer is tiny_tokenizer
    assert tiny_tokenizer.chat_template != loaded.template.text
    assert loaded.source == "object"


def test_fingerprint_is_of_the_weights(tiny_llama: MakeModel) -> None:
    model = tiny_llama()
    first = fingerprint(model)
    assert len(first) == 16
    assert fingerprint(tiny_llama()) == first
    assert fingerprint(tiny_llama(seed=1)) != first
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] += 1e-6
    assert fingerprint(model) != first


def test_fingerprint_survives_an_exact_change_of_dtype(tiny_llama: MakeModel) -> None:
    short = tiny_llama().bfloat16()
    first = fingerprint(short)
    assert fingerprint(tiny_llama()) != first, "rounding to bfloat16 changes the weights"
    assert fingerprint(short.float()) == first
    assert fingerprint(short.bfloat16()) == first


def test_fingerprint_sees_a_low_rank_change_of_a_large_weight(random_model: MakeModel) -> None:
    """Only about 1024 numbers of each weight are read, which any change of rank one still meets."""
    model = random_model("llama", hidden_size=256, intermediate_size=512)
    first = fingerprint(model)
    with torch.no_grad():
        weight = model.model.layers[0].mlp.up_proj.weight
        weight += 1e-4 * torch.randn(512, 1) @ torch.randn(1, 256)
    assert fingerprint(model) != first


def save_adapter(model: Any, base: Path | str | None, folder: Path, config: Any = None) -> Any:
    """Put a random adapter on a model and save it; returns the model with its adapter, unmerged."""
    settings = config or LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    adapted = get_peft_model(model, settings).eval()
    adapted.peft_config["default"].base_model_name_or_path = None if base is None else str(base)
    adapted.save_pretrained(folder)
    return adapted


def test_an_adapter_is_merged_into_its_base(
    tiny_model_folder: MakeFolder, tiny_llama: MakeModel, tmp_path: Path
) -> None:
    base = tiny_model_folder("base")
    adapted = save_adapter(tiny_llama(), base, tmp_path / "adapter")
    loaded = load(tmp_path / "adapter")
    assert loaded.source == "adapter"
    assert loaded.architecture == "LlamaForCausalLM"
    assert torch.allclose(logits(loaded.model), logits(adapted), atol=1e-4)
    assert (logits(loaded.model) - logits(tiny_llama())).abs().max() > 0.1
    assert loaded.fingerprint != load(base).fingerprint
    assert len(loaded.tokenizer) == 400


@pytest.mark.parametrize(
    "settings", [{"modules_to_save": ["lm_head"]}, {"use_dora": True}, {"layers_to_transform": [1]}, {"bias": "all"}]
)
def test_kinds_of_adapters(
    settings: dict[str, Any], tiny_model_folder: MakeFolder, tiny_llama: MakeModel, tmp_path: Path
) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, **settings)
    adapted = save_adapter(tiny_llama(), tiny_model_folder("base"), tmp_path / "adapter", config)
    assert torch.allclose(logits(load(tmp_path / "adapter").model), logits(adapted), atol=1e-4)


def test_an_adapters_own_tokenizer_and_embeddings(
    tiny_model_folder: MakeFolder, tiny_llama: MakeModel, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    base, model = tiny_model_folder("base"), tiny_llama()
    tiny_tokenizer.add_tokens(["<thought>", "<answer>"])
    tiny_tokenizer.chat_template = "own: {{ messages[0].content }}"
    model.resize_token_embeddings(402)
    adapted = save_adapter(model, base, tmp_path / "adapter")
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    tiny_tokenizer.save_pretrained(tmp_path / "adapter")
    loaded = load(tmp_path / "adapter")
    assert len(loaded.tokenizer) == loaded.vocab_size == 402
    assert loaded.template.text == "own: {{ messages[0].content }}"
    ids = torch.tensor([[400, 5, 401]])
    with torch.no_grad():
        assert torch.allclose(loaded.model(ids).logits, adapted(ids).logits, atol=1e-4)


def test_new_rows_that_an_adapter_does_not_bring_are_the_same_each_time(
    tiny_model_folder: MakeFolder, tiny_llama: MakeModel, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    base = tiny_model_folder("base")
    save_adapter(tiny_llama(), base, tmp_path / "adapter")
    tiny_tokenizer.add_tokens(["<never used>"])
    tiny_tokenizer.save_pretrained(tmp_path / "adapter")
    first, second = load(tmp_path / "adapter"), load(tmp_path / "adapter")
    assert first.vocab_size == 401
    assert first.fingerprint == second.fingerprint


def test_an_adapter_on_another_base(tiny_model_folder: MakeFolder, tiny_llama: MakeModel, tmp_path: Path) -> None:
    adapted = save_adapter(tiny_llama(seed=5), tmp_path / "gone", tmp_path / "adapter")
    text = refusal(tmp_path / "adapter")
    assert str(tmp_path / "gone") in text
    assert "--adapter-base" in text
    moved = tiny_model_folder("moved", seed=5)
    assert torch.allclose(logits(load(tmp_path / "adapter", adapter_base=str(moved)).model), logits(adapted), atol=1e-4)


@pytest.mark.usefixtures("offline")
def test_an_adapter_whose_base_is_on_a_hub_out_of_reach(tiny_llama: MakeModel, tmp_path: Path) -> None:
    save_adapter(tiny_llama(), "deepalign-nobody/deepalign-nothing", tmp_path / "adapter")
    text = refusal(tmp_path / "adapter")
    assert "deepalign-nobody/deepalign-nothing" in text
    assert "--adapter-base" in text


def test_an_adapter_that_does_not_name_its_base(tiny_llama: MakeModel, tmp_path: Path) -> None:
    save_adapter(tiny_llama(), None, tmp_path / "adapter")
    assert "--adapter-base" in refusal(tmp_path / "adapter")
    edit_json(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path=str(tmp_path / "adapter"))
    assert "names itself" in refusal(tmp_path / "adapter")


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"hidden_size": 16}, "does not fit its base"),
        ({"num_hidden_layers": 3}, "4 weights are on one side only"),
        ({"num_hidden_layers": 1}, "4 weights are on one side only"),
    ],
)
def test_an_adapter_made_for_another_model(
    config: dict[str, int], problem: str, tiny_model_folder: MakeFolder, tiny_llama: MakeModel, tmp_path: Path
) -> None:
    """PEFT itself only warns where layers are missing on either side, and measures half an adapter."""
    save_adapter(tiny_llama(), tiny_model_folder("other", **config), tmp_path / "adapter")
    text = refusal(tmp_path / "adapter")
    assert problem in text
    assert "--adapter-base" in text


def test_broken_adapters(tiny_model_folder: MakeFolder, tiny_llama: MakeModel, tmp_path: Path) -> None:
    base, adapter = tiny_model_folder("base"), tmp_path / "adapter"
    save_adapter(tiny_llama(), base, adapter)
    assert "no adapter_model.safetensors" in refusal(copy_of(adapter, "empty", without="adapter_model.safetensors"))
    torn = copy_of(adapter, "torn")
    (torn / "adapter_model.safetensors").write_bytes(b"not weights")
    assert "does not fit its base" in refusal(torn)
    kind = copy_of(adapter, "kind")
    edit_json(kind / "adapter_config.json", peft_type="UNHEARD_OF")
    assert "does not fit its base" in refusal(kind)
    settings = copy_of(adapter, "settings")
    (settings / "adapter_config.json").write_text("{", encoding="utf-8")
    assert "adapter_config.json cannot be read" in refusal(settings)


def test_virtual_tokens_cannot_be_merged(tiny_model_folder: MakeFolder, tiny_llama: MakeModel, tmp_path: Path) -> None:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    save_adapter(tiny_llama(), tiny_model_folder("base"), tmp_path / "adapter", config)
    assert "virtual tokens" in refusal(tmp_path / "adapter")


def write_gguf(model: Any, tokenizer: Any, path: Path, adds_bos: bool) -> None:
    """A Llama as llama.cpp's converter writes it: float32, query and key rows permuted for its rotary order."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    vocabulary = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    added = tokenizer.get_added_vocab()
    tokens = [token for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if token in added else gguf.TokenType.NORMAL for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in vocabulary["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_add_bos_token(adds_bos)
    writer.add_chat_template(tokenizer.chat_template)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        array = weight.numpy()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), array.copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("as_folder", [False, True])
@pytest.mark.parametrize("adds_bos", [False, True])
def test_a_gguf_file(
    as_folder: bool, adds_bos: bool, tiny_llama: MakeModel, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    model = tiny_llama()
    write_gguf(model, tiny_tokenizer, tmp_path / "tiny.gguf", adds_bos)
    loaded = load(tmp_path if as_folder else tmp_path / "tiny.gguf")
    assert loaded.source == "gguf"
    assert torch.allclose(logits(loaded.model), logits(model), atol=1e-4)
    assert loaded.template.text == tiny_tokenizer.chat_template
    assert loaded.tokenizer.get_vocab() == tiny_tokenizer.get_vocab()
    assert loaded.tokenizer.eos_token_id == tiny_tokenizer.eos_token_id
    for text in ("Sure, here are the steps.<|im_end|>", "<|endoftext|> Ünïcödé"):
        assert loaded.tokenizer(text)["input_ids"] == [0] * adds_bos + tiny_tokenizer(text)["input_ids"]
    for messages in (conversation("Hi <|im_end|>", None), conversation("Hi", "Be kind.")):
        expected = render(tiny_tokenizer, loaded.template, messages)
        assert render(loaded.tokenizer, loaded.template, messages) == expected


def test_a_broken_gguf_file(tmp_path: Path) -> None:
    (tmp_path / "torn.gguf").write_bytes(b"GGUF....")
    assert "cannot be read as GGUF" in refusal(tmp_path / "torn.gguf")


@pytest.fixture
def sentencepiece_folder(tiny_model_folder: Callable[..., Path]) -> Path:
    """A Mistral whose tokenizer is a SentencePiece model and nothing else, as HarmBench's validation classifier."""
    pytest.importorskip("google.protobuf")
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = tiny_model_folder("mistral", vocab_size=400)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    corpus = folder.parent / "corpus.txt"
    corpus.write_text(
        "Yes no [INST] behavior: Sure, here are the steps. First, open the door.\n" * 50, encoding="utf-8"
    )
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": True,
        "add_bos_token": True,
        "bos_token": "<s>",
        "eos_token": "</s>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "unk_token": "<unk>"}), encoding="utf-8")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.mark.parametrize("text", ["[INST] Yes", "Sure, here\n\nFirst:  open", "é ☃"])
def test_a_tokenizer_that_is_a_sentencepiece_model_only(text: str, sentencepiece_folder: Path) -> None:
    import sentencepiece

    loaded = load_model(str(sentencepiece_folder), chat_template="plain", dtype="float32")
    reader = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_folder / "tokenizer.model"))
    assert loaded.tokenizer(text)["input_ids"] == [reader.bos_id(), *reader.encode(text)]


def test_without_sentencepiece_one_line_says_what_to_install(
    sentencepiece_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(UserError, match=r"pip install 'deepalign\[sentencepiece\]'") as error:
        load_model(str(sentencepiece_folder), chat_template="plain")
    assert "\n" not in str(error.value)
