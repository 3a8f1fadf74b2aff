"""Which weights a spec names, and what a user reads who cannot have them."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest

from deepalign.errors import UserError
from deepalign.judges import get_judge, make_ready
from deepalign.judges.guards import GUARDS
from deepalign.judges.guards.runner import GuardJudge
from deepalign.judges.guards.sources import Weights, content_hash, find

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SIZES = {
    "1b": Weights(hub_id="owner/guard-1b", revision=COMMIT),
    "9b": Weights(hub_id="owner/guard-9b", revision="f" * 40, gated=True),
}
ADAPTER = {"1b": Weights(hub_id="owner/adapter", revision=COMMIT, base=Weights(hub_id="owner/base", revision="b" * 40))}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, str | None]]:
    """A hub with everything; returns what was asked of it."""
    asked: list[tuple[str, str | None]] = []

    def download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        assert not [pattern for pattern in allow_patterns if pattern.endswith((".py", ".bin", ".pt", ".pkl", "*"))]
        asked.append((name, revision))
        folder = (
            tmp_path
            / name.replace("/", "--")
            / "snapshots"
            / (revision if revision and len(revision) == 40 else COMMIT)
        )
        folder.mkdir(parents=True, exist_ok=True)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return asked


def test_the_default_and_the_sizes_are_pinned_and_fetched_when_needed(hub: list[tuple[str, str | None]]) -> None:
    default, large = find("guard", "", SIZES), find("guard", "9B", SIZES)
    assert hub == []
    assert (default.identity, default.suffix) == (f"owner/guard-1b@{COMMIT}", "")
    assert (large.identity, large.suffix) == (f"owner/guard-9b@{'f' * 40}", "9b")
    folder, base = large.folders("guard")
    assert (folder.name, base) == ("f" * 40, None)
    assert hub == [("owner/guard-9b", "f" * 40)]


def test_any_hub_id_is_known_by_its_commit(hub: list[tuple[str, str | None]]) -> None:
    branch, bare = find("guard", "me/mine@dev", SIZES), find("guard", "me/mine", SIZES)
    assert hub == [("me/mine", "dev"), ("me/mine", None)]
    assert branch.identity == bare.identity == f"me/mine@{COMMIT}"
    assert branch.suffix != bare.suffix, "two specs are two judges"
    assert branch.suffix.startswith("mine-")
    commit = find("guard", f"me/mine@{'c' * 40}", SIZES)
    assert commit.identity == f"me/mine@{'c' * 40}"
    assert len(hub) == 2, "a commit needs no asking"


def test_an_adapter_brings_its_pinned_base(hub: list[tuple[str, str | None]]) -> None:
    source = find("guard", "", ADAPTER)
    assert source.identity == f"owner/adapter@{COMMIT}+owner/base@{'b' * 40}"
    assert source.folders("guard")[1] is not None
    assert hub == [("owner/adapter", COMMIT), ("owner/base", "b" * 40)]
    assert find("guard", "", ADAPTER, base="me/other").identity.endswith(f"+me/other@{COMMIT}")


def test_a_folder_is_known_by_its_content(tmp_path: Path, hub: list[tuple[str, str | None]]) -> None:
    folder = tmp_path / "odd name!"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"a" * 200_000)
    first = find("guard", str(folder), SIZES)
    assert first.folders("guard") == (folder, None)
    assert first.identity == f"odd name!#{content_hash(folder)}"
    assert first.suffix.startswith("odd-name-")
    (folder / "notes.md").write_text("not read by the loader")
    assert content_hash(folder) == first.identity.partition("#")[2]
    (folder / "model.safetensors").write_bytes(b"a" * 199_999 + b"b")
    assert find("guard", str(folder), SIZES).identity != first.identity
    assert hub == []


def test_a_bare_adapter_in_a_folder_takes_the_pinned_base(tmp_path: Path, hub: list[tuple[str, str | None]]) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    assert find("guard", str(folder), ADAPTER).identity.endswith(f"+owner/base@{'b' * 40}")
    base = tmp_path / "base"
    base.mkdir()
    local = find("guard", str(folder), ADAPTER, base=str(base))
    assert local.folders("guard") == (folder, base)
    assert hub == []


@pytest.mark.parametrize("spec", ["14b", "-", "0.6", "a@b"])
def test_a_mistyped_size_is_one_line(spec: str, hub: list[tuple[str, str | None]]) -> None:
    with pytest.raises(UserError) as error:
        find("guard", spec, SIZES)
    assert "give 1b, 9b, owner/name or a folder" in str(error.value)
    assert "\n" not in str(error.value)
    assert hub == []


@pytest.mark.parametrize("spec", ["", "9b", "me/mine"])
def test_weights_that_cannot_be_had(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> str:
        raise OSError("401: you are not on the list\nlong trace")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(UserError) as error:
        find("guard", spec, SIZES).folders("guard")
    text = str(error.value)
    assert "\n" not in text
    assert "401: you are not on the list" in text
    assert "give a local copy with --judge guard:FOLDER" in text
    assert ("ask for access at https://huggingface.co/owner/guard-9b" in text) == (spec == "9b")


@pytest.mark.parametrize("name", sorted(GUARDS))
def test_every_guard_has_pinned_weights_and_one_line(name: str, hub: list[tuple[str, str | None]]) -> None:
    judge, again = get_judge(name), get_judge(name)
    assert isinstance(judge, GuardJudge)
    assert isinstance(again, GuardJudge)
    assert (judge.name, again.version) == (name, judge.version)
    assert hub == [], "naming a judge costs nothing"
    make_ready(judge, device="cpu", dtype="float32")
    assert hub
    assert all(revision and len(revision) == 40 and set(revision) <= set("0123456789abcdef") for _, revision in hub)
    assert GUARDS[name].says
    assert "\n" not in GUARDS[name].says
    for size in judge._guard.about.sizes:
        assert size in GUARDS[name].says or name in ("qwen3guard-strict", "harmbench", "strongreject-ft"), size
        sized = get_judge(f"{name}:{size}")
        assert sized.name in (name, f"{name}-{size}")
