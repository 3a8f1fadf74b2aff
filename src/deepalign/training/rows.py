"""Tokenised training rows: what is wrong with them, what a length limit does to them, and how they become a batch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deepalign.errors import UserError
from deepalign.losses import turn_positions
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


def has_response(labels: Sequence[int]) -> bool:
    """Whether a row holds a token that is predicted and carries loss."""
    return any(label != IGNORED for label in labels[1:])


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
        labels_BT = batch["labels"]
        for name, padding in EXTRAS.items():
            if name in examples[0]:
                batch[name] = _like(labels_BT, [example[name] for example in examples], padding, name)
        return batch


def _like(labels_BT: Tensor, rows: list[Sequence[float]], padding: float, name: str) -> Tensor:
    if len(labels_BT) != len(rows):
        # Rows laid one after another.
        rows = [[value for row in rows for value in row]]
    out_BT = torch.full(labels_BT.shape, padding, dtype=torch.float32 if isinstance(padding, float) else torch.long)
    for place, row in enumerate(rows):
        if len(row) > out_BT.shape[1]:
            raise UserError(f"column {name} holds {len(row)} values for a row of at most {out_BT.shape[1]} tokens")
        out_BT[place, : len(row)] = torch.as_tensor(row, dtype=out_BT.dtype)
    return out_BT


def counted_labels(labels_BT: Tensor, reduction: str) -> Tensor:
    """Labels at what a loss is divided by: every response token, or the first of each response; else -100."""
    if reduction == "token":
        return labels_BT
    first_BT = torch.nn.functional.pad(turn_positions(labels_BT[:, 1:] != IGNORED) == 0, (1, 0))
    return torch.where(first_BT, labels_BT, IGNORED)
