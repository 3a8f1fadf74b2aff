"""A model's next-token logits at chosen positions, a slice of the vocabulary at a time.

The head is applied to the positions that are asked for only, in float32, so that no [T, V] tensor is ever held. Where a
model does more to its logits than the head and a known scale or cap, its own forward pass is used instead: that is
found out by comparing the two on a few positions, never by the model's name. Knows nothing of what logits are for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Shape suffixes: B = sequences, T = positions of one, N = chosen positions, H = hidden width, V = vocabulary,
# C = a slice of it, K = chosen entries of it.
VOCABULARY_SLICE = 2048
_PARITY_TOLERANCE = 1e-3

LogitSource = Callable[[int, int], Tensor]
"""Gives logits [N, C] of vocabulary entries [first, last), float32."""
Inputs = dict[str, Any]
"""Arguments of a model's forward pass; it fills a cache where there are `past_key_values` among them."""
Picks = Sequence[slice | Tensor]
"""For each sequence of a batch, the positions whose logits are wanted."""
Reader = Callable[[Inputs, Picks], LogitSource]
"""Runs the model once; rows of the source are the picked positions, sequence after sequence."""


@dataclass(frozen=True, slots=True)
class Head:
    """A model's output layer, `cap * tanh(scale * (W h + b) / cap)`."""

    weight_VH: Tensor
    bias_V: Tensor | None
    scale: float
    cap: float | None

    def logits(self, hidden_NH: Tensor, first: int, last: int) -> Tensor:
        """Logits of vocabulary entries [first, last), float32."""
        bias = None if self.bias_V is None else self.bias_V[first:last].float()
        # A no-op where the head lies with the layers before it.
        hidden_NH = hidden_NH.to(self.weight_VH.device)
        out_NC = torch.nn.functional.linear(hidden_NH.float(), self.weight_VH[first:last].float(), bias)
        if self.scale != 1.0:
            out_NC = out_NC * self.scale
        return out_NC if self.cap is None else self.cap * torch.tanh(out_NC / self.cap)


def logit_reader(model: Any, probe: Sequence[int]) -> Reader:
    """How to get this model's logits: through its head by slices where that is all there is, else from itself.

    Args:
        model: A `transformers` causal LM.
        probe: Ids on which the two ways are compared.
    """
    head = output_head(model)
    # Where the class names no body of its own (Llama 4's text model), `base_model` is the whole model.
    if head is not None and model.base_model is not model:
        ids_1T = torch.tensor([list(probe)], device=torch.device(model.device))
        own_TV = model(input_ids=ids_1T, use_cache=False).logits[0].float()
        hidden_TH = model.base_model(input_ids=ids_1T, use_cache=False).last_hidden_state[0]
        if _same_logits(head, hidden_TH, own_TV):
            return lambda inputs, picks: _head_source(model, head, inputs, picks)
    return lambda inputs, picks: _full_source(model, inputs, picks)


def padded(model: Any, sequences: Sequence[Sequence[int]]) -> Inputs:
    """Ids of sequences padded on the right: no mask is needed, for what comes after is seen by none of them."""
    width = max(len(ids) for ids in sequences)
    rows = [[*ids, *[0] * (width - len(ids))] for ids in sequences]
    return {"input_ids": torch.tensor(rows, device=torch.device(model.device))}


def predicting(sequences: Sequence[Sequence[int]], counts: Sequence[int]) -> list[slice | Tensor]:
    """The positions that predict the last `counts[i]` ids of each sequence."""
    return [slice(len(ids) - 1 - count, len(ids) - 1) for ids, count in zip(sequences, counts, strict=True)]


def slices(vocab_size: int, slice_size: int = VOCABULARY_SLICE) -> Iterator[tuple[int, int]]:
    """Bounds of the slices of a vocabulary."""
    for first in range(0, vocab_size, slice_size):
        yield first, min(first + slice_size, vocab_size)


def chosen_probabilities(source: LogitSource, vocab_size: int, entries: Sequence[int]) -> Tensor:
    """Probabilities of chosen vocabulary entries, normalised over all: [N, K] in float64 on the CPU."""
    return chosen_log_probabilities(source, vocab_size, torch.tensor([list(entries)], dtype=torch.long)).exp()


def chosen_log_probabilities(source: LogitSource, vocab_size: int, entries: Tensor) -> Tensor:
    """Log-probabilities of vocabulary entries [N, K], or [1, K] for all rows alike: [N, K] in float64 on the CPU."""
    norms, found = [], []
    for first, last in slices(vocab_size):
        logits_NC = source(first, last)
        norms.append(logits_NC.logsumexp(dim=-1))
        places_NK = (entries - first).expand(len(logits_NC), -1)
        inside_NK = (places_NK >= 0) & (places_NK < last - first)
        chosen_NK = logits_NC.gather(1, places_NK.clamp(0, last - first - 1).to(logits_NC.device)).double().cpu()
        found.append(torch.where(inside_NK, chosen_NK, 0.0))
    return torch.stack(found).sum(dim=0) - torch.stack(norms).logsumexp(dim=0).double().cpu().unsqueeze(-1)


def _head_source(model: Any, head: Head, inputs: Inputs, picks: Picks) -> LogitSource:
    hidden_BTH = model.base_model(**inputs, use_cache="past_key_values" in inputs).last_hidden_state
    hidden_NH = torch.cat([hidden_BTH[row, pick] for row, pick in enumerate(picks)])
    return lambda first, last: head.logits(hidden_NH, first, last)


def _full_source(model: Any, inputs: Inputs, picks: Picks) -> LogitSource:
    logits_BTV = model(**inputs, use_cache="past_key_values" in inputs).logits
    logits_NV = torch.cat([logits_BTV[row, pick] for row, pick in enumerate(picks)])
    return lambda first, last: logits_NV[:, first:last].float()


def vocabulary_size(model: Any) -> int:
    """Width of the model's output, in tokens."""
    layer = model.get_output_embeddings()
    # Weights of few bits may be packed, in another shape.
    return int(getattr(layer, "out_features", None) or layer.weight.shape[0])


def output_head(model: Any) -> Head | None:
    """The model's output layer; None where it is more than one matrix in memory."""
    layer = model.get_output_embeddings()
    # Weights that are kept elsewhere between passes, or packed into few bits, are for the model's own forward pass.
    if not isinstance(layer, torch.nn.Linear) or layer.weight.is_meta or not layer.weight.is_floating_point():
        return None
    config = model.config.get_text_config(decoder=True)
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    cap = getattr(config, "final_logit_softcapping", None)
    return Head(layer.weight, layer.bias, scale, float(cap) if cap else None)


def _same_logits(head: Head, hidden_TH: Tensor, own_TV: Tensor) -> bool:
    mine_TV = head.logits(hidden_TH, 0, own_TV.shape[-1])
    if not bool(torch.isfinite(own_TV).all()):
        return False
    scale = own_TV.abs().max().clamp(min=1.0)
    # In low precision the model's own head rounds; only a difference of form must count.
    tolerance = _PARITY_TOLERANCE if hidden_TH.dtype == torch.float32 else 0.05
    return bool((mine_TV - own_TV).abs().max() <= tolerance * scale)
