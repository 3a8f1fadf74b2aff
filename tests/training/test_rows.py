"""Rows: what is counted, what is refused, how extra columns are laid out, and what losses are divided by."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from datasets import Dataset

from deepalign.errors import UserError
from deepalign.training.rows import (
    ExtraColumns,
    RowCounts,
    check_groups,
    count_rows,
    counted_labels,
    cut_extras,
    has_response,
    tell,
)

LONG = {"input_ids": list(range(10, 20)), "labels": [-100] * 4 + list(range(14, 20))}
SHORT = {"input_ids": [10, 11, 12], "labels": [-100, 11, 12]}
MASKED = {"input_ids": [10, 11, 12], "labels": [-100] * 3}
FIRST_ONLY = {"input_ids": [10, 11, 12], "labels": [10, -100, -100]}
EARLY = {"input_ids": list(range(10, 20)), "labels": [-100, 11, *[-100] * 8]}


def counts(rows: list[Any], limit: int | None = None, **changes: Any) -> RowCounts:
    settings = {"keep_end": False, "packed": False, "name": "train", **changes}
    return count_rows(Dataset.from_list(rows), limit, **settings)


def test_whole_rows_are_counted() -> None:
    """The first token of a row is predicted by nothing, so a label on it alone is no response."""
    found = counts([LONG, SHORT, MASKED, FIRST_ONLY])
    assert (found.num_rows, found.num_tokens, found.num_response_tokens) == (4, 19, 8)
    assert (found.num_without_response, found.num_too_long, found.num_cut_tokens, found.num_lost) == (2, 0, 0, 0)
    assert found.left_out == 2


@pytest.mark.parametrize(
    ("limit", "changes", "num_cut", "num_lost"),
    [
        (10, {}, 0, 0),
        (8, {}, 2, 0),
        (4, {}, 6, 1),
        (5, {"keep_end": True}, 3, 1),
        (9, {"keep_end": True}, 1, 1),
        (8, {"packed": True}, 2, 0),
        (8, {"packed": True, "keep_end": True}, 2, 0),
    ],
)
def test_what_a_limit_cuts_off_is_counted(limit: int, changes: Any, num_cut: int, num_lost: int) -> None:
    """Kept from the end, a row's first token is no longer predicted; packing keeps the beginning in any case."""
    found = counts([LONG, EARLY, SHORT], limit, **changes)
    assert (found.num_too_long, found.num_cut_tokens, found.num_lost) == (2 if limit < 10 else 0, num_cut, num_lost)


@pytest.mark.parametrize("keep_end", [False, True])
@pytest.mark.parametrize("limit", range(2, 11))
def test_counts_are_those_of_cutting(limit: int, keep_end: bool) -> None:
    rows = [LONG, EARLY, SHORT]
    cut = [row["labels"][-limit:] if keep_end else row["labels"][:limit] for row in rows]
    left = [sum(label != -100 for label in labels[1:]) for labels in cut]
    found = counts(rows, limit, keep_end=keep_end)
    assert found.num_response_tokens - found.num_cut_tokens == sum(left)
    assert found.num_lost == left.count(0)
    assert [has_response(labels) for labels in cut] == [number > 0 for number in left]


@pytest.mark.parametrize(
    ("rows", "limit", "words"),
    [
        ([MASKED, FIRST_ONLY], None, "train: all 2 rows are without a response token; check the columns"),
        ([LONG, MASKED], 4, "train: all 2 rows are longer than max_length=4 before their response begins; raise it"),
        ([SHORT, {"input_ids": [1, 2], "labels": ["a", "b"]}], None, "labels hold str"),
        ([{"input_ids": [1, 2], "labels": [1.0, 2.0]}], None, "train, row 0: labels hold float; give a list"),
        ([{"input_ids": [1, 2], "labels": None}], None, "labels hold NoneType"),
        ([{"input_ids": [1, 2], "labels": "ab"}], None, "labels hold str"),
        ([SHORT, {"input_ids": [1, 2], "labels": [1, 2, 3]}], None, "row 1: 3 labels for 2 input_ids"),
        ([SHORT, SHORT, {"input_ids": [1, 2], "labels": [-100, -1]}], None, "row 2: the label -1 is no token id"),
    ],
)
def test_rows_that_cannot_be_meant_are_refused(rows: list[Any], limit: int | None, words: str) -> None:
    class Listed:
        """A data set that holds what no column of one type can."""

        def __len__(self) -> int:
            return len(rows)

        def __getitem__(self, part: slice) -> dict[str, Any]:
            return {name: [row[name] for row in rows[part]] for name in ("input_ids", "labels")}

    with pytest.raises(UserError, match=words) as caught:
        count_rows(Listed(), limit, keep_end=False, packed=False, name="train")
    assert "\n" not in str(caught.value)


def test_what_is_left_out_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="deepalign"):
        tell(counts([SHORT, SHORT], 8), 8, "train")
        assert not caplog.messages
        tell(counts([LONG, EARLY, SHORT, MASKED], 4), 4, "train")
    assert caplog.messages == [
        "train: 1 of 4 rows have no response token",
        "train: 2 of 4 rows are longer than max_length=4; 6 of 9 response tokens are cut off, and 1 rows that have "
        "none left are left out",
    ]


def padded(examples: list[dict[str, Any]], side: str = "right") -> dict[str, Any]:
    width = max(len(example["labels"]) for example in examples)
    out = {}
    for name, padding in (("input_ids", 0), ("labels", -100)):
        fill = [[padding] * (width - len(example[name])) for example in examples]
        rows = [example[name] for example in examples]
        pairs = zip(rows, fill, strict=True) if side == "right" else zip(fill, rows, strict=True)
        out[name] = torch.tensor([[*one, *other] for one, other in pairs])
    return out


def laid_out(examples: list[dict[str, Any]], multiple: int = 1) -> dict[str, Any]:
    flat = {name: [one for example in examples for one in example[name]] for name in ("input_ids", "labels")}
    extra = -len(flat["labels"]) % multiple
    return {
        name: torch.tensor([[*values, *[-100 if name == "labels" else 0] * extra]]) for name, values in flat.items()
    }


def with_columns(row: dict[str, Any], start: int) -> dict[str, Any]:
    length = len(row["input_ids"])
    return {**row, "groups": list(range(start, start + length)), "reference_log_probs": [-0.5] * length}


def test_extra_columns_are_padded_like_the_ids() -> None:
    examples = [with_columns(SHORT, 1), with_columns(EARLY, 20)]
    batch = ExtraColumns(padded)(examples)
    assert batch["groups"].tolist() == [[1, 2, 3, 0, 0, 0, 0, 0, 0, 0], list(range(20, 30))]
    assert batch["reference_log_probs"][0].tolist() == [-0.5] * 3 + [0.0] * 7
    assert batch["reference_log_probs"].dtype == torch.float32
    left = ExtraColumns(lambda rows: padded(rows, "left"))(examples)
    assert left["groups"].tolist() == [[0, 0, 0, 0, 0, 0, 0, 1, 2, 3], list(range(20, 30))]
    assert "groups" not in ExtraColumns(padded)([SHORT])


@pytest.mark.parametrize("multiple", [1, 8])
def test_extra_columns_of_packed_rows_lie_one_after_another(multiple: int) -> None:
    batch = ExtraColumns(lambda rows: laid_out(rows, multiple))([with_columns(SHORT, 1), with_columns(EARLY, 20)])
    assert batch["groups"].tolist() == [[1, 2, 3, *range(20, 30), *[0] * (-13 % multiple)]]


def test_a_collator_that_changes_the_tokens_is_refused() -> None:
    def reversing(examples: list[dict[str, Any]]) -> dict[str, Any]:
        return {name: values.flip(1) for name, values in padded(examples).items()}

    with pytest.raises(UserError, match="data_collator"):
        ExtraColumns(reversing)([with_columns(SHORT, 1), with_columns(EARLY, 20)])


@pytest.mark.parametrize("length", [2, 4])
def test_a_value_for_each_token_is_asked_for(length: int) -> None:
    """Too few would be taken for the first tokens', in silence."""
    with pytest.raises(UserError, match=f"groups.* {length} values .*3"):
        ExtraColumns(padded)([{**SHORT, "groups": [1] * length}, {**LONG, "groups": [1] * 10}])


@pytest.mark.parametrize("keep_end", [False, True])
def test_extra_columns_are_cut_with_the_ids(keep_end: bool) -> None:
    dataset = Dataset.from_list([with_columns(SHORT, 1), with_columns(EARLY, 20)])
    cut = cut_extras(dataset, 4, keep_end=keep_end, packed=False)
    assert cut["groups"][:] == [[1, 2, 3], [26, 27, 28, 29] if keep_end else [20, 21, 22, 23]]
    assert len(cut["reference_log_probs"][1]) == 4
    assert cut_extras(dataset, None, keep_end=keep_end, packed=False) is dataset
    plain = Dataset.from_list([SHORT])
    assert cut_extras(plain, 2, keep_end=keep_end, packed=True) is plain


@pytest.mark.parametrize("odd", [-1, 2])
def test_a_group_without_a_weight_is_refused(odd: int) -> None:
    check_groups([torch.tensor([[0, 1]]), torch.tensor([[1, 0]])], 2)
    with pytest.raises(UserError, match=f"groups holds {odd}; there are 2 group_weights"):
        check_groups([torch.tensor([[0, 1]]), torch.tensor([[odd, 0]])], 2)


def test_the_inner_collator_is_still_at_hand() -> None:
    def inner(examples: list[dict[str, Any]]) -> dict[str, Any]:
        return padded(examples)

    inner.padding_free = True  # type: ignore[attr-defined]
    assert ExtraColumns(inner).padding_free is True
    with pytest.raises(AttributeError):
        ExtraColumns(inner).nothing  # noqa: B018


def test_losses_are_divided_by_tokens_or_by_responses() -> None:
    """A response that begins with the row's first token is counted from the second, which is predicted."""
    labels = torch.tensor([[-100, 5, 6, -100, 7, -100], [5, 6, 7, -100, -100, -100], [5, -100, -100, -100, -100, 9]])
    assert torch.equal(counted_labels(labels, "token"), labels)
    for reduction in ("sequence_sum", "sequence_mean"):
        expected = [[-100, 5, -100, -100, 7, -100], [-100, 6, -100, -100, -100, -100], [-100] * 5 + [9]]
        assert counted_labels(labels, reduction).tolist() == expected
