"""How work is split, and how a launcher's variables name a part of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepalign.config import AuditConfig
from deepalign.errors import UserError
from deepalign.shards import Shard, chosen_shard, parse_shard, whole_folder

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
SRUN = {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}
ARRAY = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "5"}


@given(st.lists(st.text(max_size=5), unique=True, max_size=40), st.integers(1, 9), st.integers(0, 9), st.randoms())
def test_every_item_once_in_equal_parts_whatever_the_order(names: list[str], count: int, before: int, dice) -> None:  # type: ignore[no-untyped-def]
    shards = Shard(index=1, count=count).all()
    shares = [shard.share(names, names, before) for shard in shards]
    assert sorted(name for share in shares for name in share) == sorted(names)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    for share in shares:
        assert list(share) == [name for name in names if name in share], "the order of the list is kept"
    mixed = dice.sample(names, len(names))
    assert [set(shard.share(mixed, mixed, before)) for shard in shards] == [set(share) for share in shares]


def test_odd_items_of_many_lists_go_to_different_parts() -> None:
    shards = Shard(index=1, count=4).all()
    dealt = [len(shard.share("abcde", "abcde")) + len(shard.share("vwxyz", "vwxyz", 5)) for shard in shards]
    assert sorted(dealt) == [2, 2, 3, 3]


def test_the_split_is_the_same_tomorrow() -> None:
    """Folders of an earlier version go on only as long as this holds; a change needs a note in the CHANGELOG."""
    names = [f"p{number}" for number in range(8)]
    assert [Shard(index=index, count=3).share(names, names) for index in (1, 2, 3)] == EXPECTED


# By `printf p0 | sha256sum` and so on, sorted and dealt to three.
EXPECTED = [("p3", "p4", "p7"), ("p0", "p1", "p5"), ("p2", "p6")]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("3/2", "shards are counted from 1, so that the last one here is 2/2"),
        ("0/2", "shards are counted from 1"),
        ("1/0", "shards are counted from 1"),
        ("2", "neither I/N"),
        ("1/2/3", "neither I/N"),
        ("-1/2", "neither I/N"),
        ("a/b", "neither I/N"),
        ("", "neither I/N"),
        ("1.0/2", "neither I/N"),
        ("automatic", "nor auto"),
    ],
)
def test_what_is_no_shard(text: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        parse_shard(text)
    with pytest.raises(UserError, match=told):
        AuditConfig(model="m", shard=text)


@pytest.mark.parametrize(
    ("environment", "shard"),
    [
        (TORCHRUN, Shard(index=4, count=8, local=1, together=True)),
        (SRUN, Shard(index=1, count=4, local=0, together=True)),
        (ARRAY, Shard(index=3, count=4)),
        ({**ARRAY, "SLURM_ARRAY_TASK_STEP": "2"}, Shard(index=2, count=4)),
        # Ranks that SLURM started and torchrun numbers; an array of which each task is launched alone.
        ({**SRUN, **TORCHRUN}, Shard(index=4, count=8, local=1, together=True)),
        ({**ARRAY, "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, Shard(index=3, count=4)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, None),
    ],
)
def test_launchers(environment: dict[str, str], shard: Shard | None) -> None:
    assert chosen_shard("auto", environment) == shard
    assert chosen_shard("2/3", environment) == Shard(index=2, count=3)
    assert chosen_shard(None, environment) is None


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({}, "neither torchrun nor accelerate"),
        ({"RANK": "1"}, "neither torchrun nor accelerate"),
        ({"RANK": "9", "WORLD_SIZE": "8"}, "RANK=9 is none of 8 parts"),
        ({"RANK": "x", "WORLD_SIZE": "8"}, "RANK='x' is not a number"),
        ({**ARRAY, "SLURM_ARRAY_TASK_ID": "99"}, "SLURM_ARRAY_TASK_ID=99, _COUNT=4 is none of 4 parts"),
        ({**ARRAY, "SLURM_ARRAY_TASK_ID": "4"}, "none of 4 parts"),
        ({"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "1"}, "an array of one task"),
        ({"SLURM_ARRAY_TASK_ID": "3"}, "SLURM_ARRAY_TASK_COUNT='' is not a number"),
    ],
)
def test_launchers_that_make_no_shard(environment: dict[str, str], told: str) -> None:
    with pytest.raises(UserError, match=told):
        chosen_shard("auto", environment)


def test_folders_are_named_beside_the_whole() -> None:
    folder = Shard(index=2, count=4).folder(Path("runs/m-1f"))
    assert folder == Path("runs/m-1f-shard-2-of-4")
    assert whole_folder(folder) == Path("runs/m-1f")
    assert whole_folder(Path("runs/mine")) is None
