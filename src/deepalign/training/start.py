"""A model as it was when its training began: how to tell it again, and how to have it back for the length of a pass."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from deepalign.generation import evaluation_mode
from deepalign.models import fingerprint


class StartingPoint:
    """A model as it is now, to be had back for a moment while it is being trained.

    Args:
        model: The model before training, with an adapter or without.
    """

    def __init__(self, model: Any) -> None:
        self._fresh_adapter = _is_fresh_adapter(model)
        self._held: dict[str, Tensor] = {}
        self._model = model
        self.fingerprint = fingerprint(_base_alone(model) if self._fresh_adapter else model)
        """The same for the same weights; a fresh adapter, which changes nothing yet, is left out."""

    def hold(self) -> None:
        """Keep the trainable weights; needed before `restored` unless the adapter can be switched off."""
        if not self._fresh_adapter and not self._held:
            self._held = {
                name: weight.detach().clone() for name, weight in self._model.named_parameters() if weight.requires_grad
            }

    @property
    def can_be_restored(self) -> bool:
        """Whether the model can still be had back once it has been trained."""
        return self._fresh_adapter or bool(self._held)

    @contextlib.contextmanager
    def restored(self, model: Any) -> Iterator[None]:
        """The model as it was, in evaluation mode."""
        with evaluation_mode(model), model.disable_adapter() if self._fresh_adapter else self._swapped(model):
            yield

    @contextlib.contextmanager
    def _swapped(self, model: Any) -> Iterator[None]:
        now = {name: weight for name, weight in model.named_parameters() if name in self._held}
        tuned = {name: weight.data for name, weight in now.items()}
        try:
            for name, weight in now.items():
                weight.data = self._held[name].to(weight.device)
            yield
        finally:
            for name, weight in now.items():
                weight.data = tuned[name]


def _base_alone(model: Any) -> Any:
    """What `fingerprint` asks of a model, without the adapter's weights, which lie among the base's."""
    base = model.get_base_model()
    weights = {name: weight for name, weight in base.state_dict().items() if ".lora_" not in name}
    return SimpleNamespace(state_dict=lambda: weights, get_submodule=base.get_submodule)


def _is_fresh_adapter(model: Any) -> bool:
    """Whether the trainable weights are a LoRA adapter that changes nothing yet, so that off is where it started."""
    if not hasattr(model, "peft_config"):
        return False
    trained = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    settings = [model.peft_config[name] for name in model.active_adapters]
    # Other ways to begin (PiSSA, OLoRA) change the base's own weights.
    plain = all(getattr(one, "init_lora_weights", None) in (True, "gaussian") for one in settings)
    known = all(".lora_A." in name or ".lora_B." in name for name, _ in trained)
    still = all(not bool(weight.any()) for name, weight in trained if ".lora_B." in name)
    return bool(trained) and plain and known and still
