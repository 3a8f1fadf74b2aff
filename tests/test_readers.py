"""Readers: what a loaded model's tokenizer, template and settings are, without its weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deepalign import UserError
from deepalign.chat import conversation, render, stop_ids
from deepalign.models import load_model
from deepalign.readers import load_reader


def test_a_reader_renders_and_stops_as_the_loaded_model_does(tiny_model_folder: Callable[..., Path]) -> None:
    folder = tiny_model_folder()
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7], "temperature": 0.3}))
    loaded, reader = load_model(str(folder), dtype="float32"), load_reader(str(folder))
    turns = conversation("How do I bake bread?", None)
    assert render(reader.tokenizer, reader.template, turns) == render(loaded.tokenizer, loaded.template, turns)
    assert reader.template == loaded.template
    assert stop_ids(reader.tokenizer, reader.generation_config) == stop_ids(loaded.tokenizer, loaded.generation_config)
    assert 7 in stop_ids(reader.tokenizer, reader.generation_config)
    assert reader.generation_config.temperature == loaded.generation_config.temperature == 0.3
    assert (reader.source, reader.architecture) == ("folder", "LlamaForCausalLM")


def test_ends_are_read_from_the_configuration_where_no_settings_lie_beside_it(
    tiny_model_folder: Callable[..., Path],
) -> None:
    folder = tiny_model_folder(eos_token_id=5)
    (folder / "generation_config.json").unlink()
    assert load_reader(str(folder)).generation_config.eos_token_id == 5


def test_weights_are_not_read(tiny_model_folder: Callable[..., Path]) -> None:
    folder = tiny_model_folder()
    for weights in folder.glob("*.safetensors"):
        weights.unlink()
    assert load_reader(str(folder)).name == str(folder)


def test_an_adapter_is_read_through_its_base(tiny_model_folder: Callable[..., Path], tmp_path: Path) -> None:
    base = tiny_model_folder("base")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    reader = load_reader(str(adapter))
    assert (reader.source, reader.architecture) == ("adapter", "LlamaForCausalLM")
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="--adapter-base"):
        load_reader(str(adapter))
    assert load_reader(str(adapter), adapter_base=str(base)).source == "adapter"


def test_mistakes(tiny_model_folder: Callable[..., Path], tmp_path: Path, tiny_tokenizer: Any) -> None:
    with pytest.raises(UserError, match="no model at"):
        load_reader(str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="tokenizer_config"):
        load_reader(str(tmp_path / "empty"))
    (tmp_path / "model.bin").touch()
    with pytest.raises(UserError, match=r"not a \.gguf"):
        load_reader(str(tmp_path / "model.bin"))
    tiny_tokenizer.chat_template = None
    tiny_tokenizer.save_pretrained(tmp_path / "bare")
    with pytest.raises(UserError, match="--chat-template"):
        load_reader(str(tmp_path / "bare"))
    assert load_reader(str(tmp_path / "bare"), chat_template="plain").template.source == "plain"
