"""Tokenised training rows: what is wrong with them, what a length limit does to them, and how they become a batch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deepalign.errors import UserError
from deepalign.losses import turn_lengths, turn_positions
from deepalign.training.objective import IGNORED

logger = logging.getLogger(__name__)

REFERENCE = "reference_log_probs"
GROUPS = "groups"
EXTRAS = {REFERENCE: 0.0, GROUPS: 0}
"""Columns of one value for each token, with what stands at padding."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RowCounts:
    """What a set of tokenised rows is made of."""

    num_rows: int
    num_tokens: int
    num_response_tokens: int
    num_without_response: int
    """Rows without a single token to learn."""
    num_too_long: int
    """Rows longer than the limit."""
    num_cut_tokens: int
    """Response tokens beyond it."""
    num_lost: int
    """Rows that have no response token within it; they are left out."""

    @property
    def left_out(self) -> int:
        """Rows that are not trained on."""
        return self.num_without_response + self.num_lost


def count_rows(dataset: Any, limit: int | None, *, keep_end: bool, packed: bool, name: str) -> RowCounts:
    """Look at every row of a tokenised set, before it is cut or packed.

    Args:
        dataset: A `datasets.Dataset` with columns input_ids and labels.
        limit: Most tokens of a row.
        keep_end: Whether a row that is too long loses its beginning.
        packed: Whether the rows' first tokens will carry no loss anyway.
        name: The set's name, for messages.

    Raises:
        UserError: Labels are malformed, or no row has a token to learn.
    """
    tokens = responses = without = too_long = cut = lost = 0
    for number, (ids, labels) in enumerate(_columns(dataset)):
        _check_labels(ids, labels, number, name)
        places = [place for place, label in enumerate(labels) if label != IGNORED and place > 0]
        tokens += len(ids)
        responses += len(places)
        without += not places
        if limit is None or len(ids) <= limit:
            continue
        too_long += 1
        # A row that is packed or cut begins with a token that nothing predicts.
        first, last = (len(ids) - limit, len(ids)) if keep_end and not packed else (0, limit)
        kept = sum(first < place < last for place in places)
        cut += len(places) - kept
        lost += bool(places) and not kept
    found = RowCounts(
        num_rows=len(dataset),
        num_tokens=tokens,
        num_response_tokens=responses,
        num_without_response=without,
        num_too_long=too_long,
        num_cut_tokens=cut,
        num_lost=lost,
    )
    if found.left_out == found.num_rows:
        why = f"longer than max_length={limit} before their response begins" if lost else "without a response token"
        remedy = "raise it, or shorten the prompts" if lost else "check the columns and the masks"
        raise UserError(f"{name}: all {found.num_rows} rows are {why}; {remedy}")
    return found


def tell(found: RowCounts, limit: int | None, name: str) -> None:
    """Say what is left out or cut, where anything is."""
    if found.num_without_response:
        logger.warning("%s: %d of %d rows have no response token", name, found.num_without_response, found.num_rows)
    if found.num_too_long:
        logger.warning(
            "%s: %d of %d rows are longer than max_length=%s; %d of %d response tokens are cut off, and %d rows that "
            "have none left are left out",
            name,
            found.num_too_long,
            found.num_rows,
            limit,
            found.num_cut_tokens,
            found.num_response_tokens,
            found.num_lost,
        )


def within(limit: int | None, *, keep_end: bool) -> slice:
    """What a limit leaves of a row."""
    return slice(-limit, None) if limit is not None and keep_end else slice(limit)


def has_response(labels: Sequence[int]) -> bool:
    """Whether a row holds a token that is predicted and carries loss."""
    return any(label != IGNORED for label in labels[1:])


def column_names(dataset: Any) -> list[str]:
    """Names of a set's columns; none where a stream does not tell."""
    return list(getattr(dataset, "column_names", None) or ())


def _columns(dataset: Any) -> Iterator[tuple[Sequence[int], Sequence[int]]]:
    for start in range(0, len(dataset), 1000):
        part = dataset[start : start + 1000]
        yield from zip(part["input_ids"], part["labels"], strict=True)


def _check_labels(ids: Any, labels: Any, number: int, name: str) -> None:
    where = f"{name}, row {number}"
    if not isinstance(labels, list) or any(type(label) is not int for label in labels):
        kind = type(labels[0]).__name__ if isinstance(labels, list) and labels else type(labels).__name__
        raise UserError(f"{where}: labels hold {kind}; give a list of token ids, with -100 where no loss is wanted")
    if len(labels) != len(ids):
        raise UserError(f"{where}: {len(labels)} labels for {len(ids)} input_ids; give one label for each token")
    odd = next((label for label in labels if label < 0 and label != IGNORED), None)
    if odd is not None:
        raise UserError(f"{where}: the label {odd} is no token id; use -100 where no loss is wanted")


class ExtraColumns:
    """A collator around another one, which also pads the columns that hold one value for each token."""

    def __init__(self, inner: Callable[[list[dict[str, Any]]], dict[str, Any]]) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        if name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate; each extra column comes out in the shape of the labels."""
        batch = self.inner(examples)
        for name, padding in EXTRAS.items():
            if name in examples[0]:
                batch[name] = _beside(batch, examples, name, padding)
        return batch


def places(batch: Mapping[str, Any], examples: Sequence[Mapping[str, Any]]) -> list[tuple[int, slice]]:
    """Row and columns of each example's tokens in a batch: padded on either side, or laid one after another.

    Raises:
        UserError: The collator has made something else of them.
    """
    ids_BT, found, first = batch["input_ids"], [], 0
    for number, example in enumerate(examples):
        ids = list(example["input_ids"])
        row, starts = (number, (0, ids_BT.shape[1] - len(ids))) if len(ids_BT) == len(examples) else (0, (first,))
        first += len(ids)
        spans = [slice(start, start + len(ids)) for start in starts]
        span = next((one for one in spans if ids_BT[row, one].tolist() == ids), None)
        if span is None:
            raise UserError("data_collator changes the rows' tokens, so nothing can stand beside them; leave it out")
        found.append((row, span))
    return found


def _beside(batch: Mapping[str, Any], examples: Sequence[Mapping[str, Any]], name: str, padding: float) -> Tensor:
    dtype = torch.float32 if isinstance(padding, float) else torch.long
    out_BT = torch.full(batch["labels"].shape, padding, dtype=dtype)
    for example, (row, span) in zip(examples, places(batch, examples), strict=True):
        values, count = example[name], len(example["input_ids"])
        if len(values) != count:
            raise UserError(f"column {name} holds {len(values)} values for a row of {count} tokens; give one for each")
        out_BT[row, span] = torch.as_tensor(values, dtype=dtype)
    return out_BT


def cut_extras(dataset: Any, limit: int | None, *, keep_end: bool, packed: bool) -> Any:
    """A set whose extra columns are cut like the ids that they stand beside; TRL cuts ids and labels only.

    Raises:
        UserError: The rows will be packed, which leaves the reference out.
    """
    names = [name for name in EXTRAS if name in column_names(dataset)]
    if packed and REFERENCE in names:
        raise UserError(f"packing keeps no column {REFERENCE}; leave out packing, or the column")
    if not names or limit is None:
        return dataset
    kept = within(limit, keep_end=keep_end)
    return dataset.map(lambda row: {name: row[name][kept] for name in names})


def check_groups(batches: Sequence[Tensor], count: int) -> None:
    """Refuse a group that has no weight.

    Raises:
        UserError: A number is below 0, or not below the count.
    """
    for groups_BT in batches:
        odd_N = groups_BT[(groups_BT < 0) | (groups_BT >= count)]
        if len(odd_N):
            odd = int(odd_N[0])
            raise UserError(
                f"column {GROUPS} holds {odd}; there are {count} group_weights, for groups 0 to {count - 1}"
            )


def counted_labels(labels_BT: Tensor, reduction: str) -> Tensor:
    """Labels at what a loss is divided by: every response token, or the first of each response; else -100."""
    if reduction == "token":
        return labels_BT
    first_BT = torch.nn.functional.pad(turn_positions(labels_BT[:, 1:] != IGNORED) == 0, (1, 0))
    return torch.where(first_BT, labels_BT, IGNORED)


def reduction_scale(positions_BT: Tensor, reduction: str, *, by_tokens: bool) -> Tensor | None:
    """Factor of each token that makes a sum over tokens the reduction's; None where it is 1.

    Args:
        positions_BT: From `turn_positions`.
        reduction: What is to be averaged.
        by_tokens: Whether the sum is divided by tokens, and not by what `counted_labels` counts.
    """
    if reduction == "token":
        return None
    scale_BT = torch.ones_like(positions_BT, dtype=torch.float32)
    if reduction == "sequence_mean":
        scale_BT /= turn_lengths(positions_BT).clamp(min=1)
    if by_tokens:
        scale_BT *= (positions_BT >= 0).sum() / (positions_BT == 0).sum().clamp(min=1)
    return scale_BT
