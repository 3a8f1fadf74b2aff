"""Per-position KL divergence between two models on the same answers (paper section 2.2, Figs. 1 and 4).

Both models read the same ids: prompt and reference answer. At response position t (0-based) the full next-token
distributions are compared, in both directions. The head is applied to response positions only, and to a slice of the
vocabulary at a time, in float32, so that no [T, V] tensor of two models is ever held. Where a model does more to its
logits than the head and a known scale or cap, its own forward pass is used instead: that is found out by comparing
the two on the first positions, never by its name. Knows nothing of prompts' meaning or of judges.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deepalign.chat import Rendered
from deepalign.errors import UserError
from deepalign.generation import evaluation_mode

# Shape suffixes: N = response positions of one batch, H = hidden width, V = vocabulary, C = a slice of it.
VOCABULARY_SLICE = 8192
_PARITY_TOLERANCE = 1e-3


@dataclass(frozen=True, kw_only=True, slots=True)
class KlProfile:
    """KL at each response position of one prompt, in nats; NaN-free: a non-finite value is None."""

    prompt_id: str
    forward: tuple[float | None, ...]
    """D(model || base), the paper's direction."""
    reverse: tuple[float | None, ...]
    """D(base || model)."""


@dataclass(frozen=True, slots=True)
class _Head:
    """A model's output layer, `cap * tanh(scale * (W h + b) / cap)`."""

    weight_VH: Tensor
    bias_V: Tensor | None
    scale: float
    cap: float | None

    def logits(self, hidden_NH: Tensor, first: int, last: int) -> Tensor:
        """Logits of vocabulary entries [first, last), float32."""
        bias = None if self.bias_V is None else self.bias_V[first:last].float()
        out_NC = torch.nn.functional.linear(hidden_NH.float(), self.weight_VH[first:last].float(), bias) * self.scale
        return out_NC if self.cap is None else self.cap * torch.tanh(out_NC / self.cap)


LogitSource = Callable[[int, int], Tensor]
"""Gives logits [N, C] of vocabulary entries [first, last)."""


def check_vocabularies(model: Any, base: Any) -> int:
    """Number of vocabulary entries that two models share as their whole output.

    Rows that neither tokenizer names (padding of the embedding matrix) may differ in number and are left out.

    Raises:
        UserError: A token id means different things to the two.
    """
    ours, theirs = model.tokenizer.get_vocab(), base.tokenizer.get_vocab()
    if ours != theirs:
        odd = sorted(set(ours.items()) ^ set(theirs.items()))
        raise UserError(
            f"{model.name} and {base.name} have different vocabularies ({len(ours)} and {len(theirs)} tokens; "
            f"{len(odd)} entries differ, such as {odd[0][0]!r}): KL between them has no meaning; "
            "choose the base that this model was trained from, or leave out the kl probe"
        )
    named = int(max(ours.values())) + 1
    if model.vocab_size == base.vocab_size:
        return int(model.vocab_size)
    return min(named, int(model.vocab_size), int(base.vocab_size))


def kl_profiles(
    model: Any, base: Any, items: Sequence[tuple[str, Rendered]], *, vocab_size: int, max_positions: int, batch: int = 8
) -> Iterator[KlProfile]:
    """KL at each response position, for each (prompt_id, rendered prompt and answer).

    Args:
        model: The aligned model, a `transformers` causal LM.
        base: What it is compared with; same vocabulary.
        items: Conversations whose response is the answer.
        vocab_size: Entries to compare, from `check_vocabularies`.
        max_positions: Positions of each response to look at, from the first.
        batch: Sequences in one forward pass.
    """
    kept = [(name, *_clip(rendered, max_positions)) for name, rendered in items]
    kept = sorted((item for item in kept if item[2] > 0), key=lambda item: len(item[1]))
    if not kept:
        return
    with evaluation_mode(model), evaluation_mode(base):
        with torch.inference_mode():
            probe = kept[0][1][:16]
            our_reader, their_reader = _reader(model, probe), _reader(base, probe)
        for start in range(0, len(kept), batch):
            part = kept[start : start + batch]
            sequences = [ids for _, ids, _ in part]
            counts = [count for _, _, count in part]
            with torch.inference_mode():
                ours, theirs = our_reader(sequences, counts), their_reader(sequences, counts)
                forward_N, reverse_N = kl_by_slices(ours, theirs, vocab_size)
            forward, reverse = torch.split(forward_N.cpu(), counts), torch.split(reverse_N.cpu(), counts)
            for (name, _, _), one, other in zip(part, forward, reverse, strict=True):
                yield KlProfile(prompt_id=name, forward=_finite(one), reverse=_finite(other))


def kl_by_slices(
    ours: LogitSource, theirs: LogitSource, vocab_size: int, slice_size: int = VOCABULARY_SLICE
) -> tuple[Tensor, Tensor]:
    """D(p || q) and D(q || p), each [N], from two logit sources read slice by slice, twice.

    An entry that both models rule out (-inf in both) adds nothing; one that only one rules out makes that direction
    infinite, as it should be.
    """
    bounds = [(first, min(first + slice_size, vocab_size)) for first in range(0, vocab_size, slice_size)]
    norm_p = torch.stack([ours(*bound).logsumexp(dim=-1) for bound in bounds]).logsumexp(dim=0)
    norm_q = torch.stack([theirs(*bound).logsumexp(dim=-1) for bound in bounds]).logsumexp(dim=0)
    forward = torch.zeros_like(norm_p, dtype=torch.float64)
    reverse = torch.zeros_like(forward)
    for bound in bounds:
        log_p = ours(*bound) - norm_p.unsqueeze(-1)
        log_q = theirs(*bound) - norm_q.unsqueeze(-1)
        ratio = log_p - log_q
        # 0 * (-inf - x) is 0 by convention.
        forward += torch.where(log_p == -torch.inf, 0.0, log_p.exp() * ratio).sum(dim=-1, dtype=torch.float64)
        reverse -= torch.where(log_q == -torch.inf, 0.0, log_q.exp() * ratio).sum(dim=-1, dtype=torch.float64)
    return forward, reverse


def _clip(rendered: Rendered, max_positions: int) -> tuple[tuple[int, ...], int]:
    """Ids up to the last position looked at, and how many response positions they hold."""
    count = min(max_positions, len(rendered.ids) - rendered.response_start)
    return rendered.ids[: rendered.response_start + count], count


def _reader(model: Any, probe: Sequence[int]) -> Callable[[Sequence[tuple[int, ...]], Sequence[int]], LogitSource]:
    """How to get this model's logits: through its head by slices where that is all there is, else from itself.

    Args:
        model: A `transformers` causal LM.
        probe: Ids on which the two ways are compared.
    """
    head = _head(model)
    # Where the class names no body of its own (Llama 4's text model), `base_model` is the whole model.
    if head is not None and model.base_model is not model:
        ids_1T = torch.tensor([list(probe)], device=torch.device(model.device))
        own_TV = model(input_ids=ids_1T, use_cache=False).logits[0].float()
        hidden_TH = model.base_model(input_ids=ids_1T, use_cache=False).last_hidden_state[0]
        if _same_logits(head, hidden_TH, own_TV):
            return lambda sequences, counts: _head_source(model, head, sequences, counts)
    return lambda sequences, counts: _full_source(model, sequences, counts)


def _head_source(model: Any, head: _Head, sequences: Sequence[tuple[int, ...]], counts: Sequence[int]) -> LogitSource:
    """Logits that predict the last `counts[i]` ids of each sequence, rows one after another."""
    hidden_BTH = model.base_model(**_padded(model, sequences), use_cache=False).last_hidden_state
    hidden_NH = torch.cat([hidden_BTH[row, pick] for row, pick in enumerate(_picks(sequences, counts))])
    return lambda first, last: head.logits(hidden_NH, first, last)


def _full_source(model: Any, sequences: Sequence[tuple[int, ...]], counts: Sequence[int]) -> LogitSource:
    """The same from the model's own full logits."""
    logits_BTV = model(**_padded(model, sequences), use_cache=False).logits
    logits_NV = torch.cat([logits_BTV[row, pick] for row, pick in enumerate(_picks(sequences, counts))])
    return lambda first, last: logits_NV[:, first:last].float()


def _padded(model: Any, sequences: Sequence[tuple[int, ...]]) -> dict[str, Tensor]:
    device = torch.device(model.device)
    width = max(len(ids) for ids in sequences)
    return {
        "input_ids": torch.tensor([ids + (0,) * (width - len(ids)) for ids in sequences], device=device),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in sequences], device=device),
    }


def _picks(sequences: Sequence[tuple[int, ...]], counts: Sequence[int]) -> list[slice]:
    return [slice(len(ids) - 1 - count, len(ids) - 1) for ids, count in zip(sequences, counts, strict=True)]


def _head(model: Any) -> _Head | None:
    layer = model.get_output_embeddings()
    if not isinstance(layer, torch.nn.Linear):
        return None
    config = model.config.get_text_config(decoder=True)
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    cap = getattr(config, "final_logit_softcapping", None)
    return _Head(layer.weight, layer.bias, scale, float(cap) if cap else None)


def _same_logits(head: _Head, hidden_TH: Tensor, own_TV: Tensor) -> bool:
    mine_TV = head.logits(hidden_TH, 0, own_TV.shape[-1])
    if not bool(torch.isfinite(own_TV).all()):
        return False
    scale = own_TV.abs().max().clamp(min=1.0)
    # In low precision the model's own head rounds; only a difference of form must count.
    tolerance = _PARITY_TOLERANCE if hidden_TH.dtype == torch.float32 else 0.05
    return bool((mine_TV - own_TV).abs().max() <= tolerance * scale)


def _finite(values: Tensor) -> tuple[float | None, ...]:
    return tuple(float(value) if bool(torch.isfinite(value)) else None for value in values)
