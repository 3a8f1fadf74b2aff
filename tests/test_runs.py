"""The run folder under every disturbance: another configuration, strangers, kills, a full disk, a second writer."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepalign.errors import UserError
from deepalign.provenance import environment
from deepalign.records import Message, Prompt, to_json
from deepalign.runs import MANIFEST, Appender, RunFolder, clear_disk_errors, write_atomically

CONFIG = {"model": "m", "depths": (0, 5), "base": None, "seed": 0}
ONE, TWO, THREE = (Message(role="user", content=content) for content in ("one", "twö", "three"))


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A claimed run folder."""
    folder = RunFolder(tmp_path / "run")
    with folder.writing():
        folder.claim(CONFIG, {"num_prompts": 3})
    return folder


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_claim_writes_settings_facts_and_environment(run: RunFolder) -> None:
    manifest = run.manifest
    assert manifest["config"] == {"model": "m", "depths": [0, 5], "base": None, "seed": 0}
    assert manifest["num_prompts"] == 3
    assert manifest["schema_version"] == 1
    assert {"torch", "transformers", "python"} <= set(manifest["environment"]["versions"])
    assert names(run.path) <= {MANIFEST, ".lock"}


def test_the_same_settings_resume_and_keep_the_first_facts(run: RunFolder) -> None:
    with run.writing():
        assert run.claim(dict(CONFIG), {"num_prompts": 99})["num_prompts"] == 3


@pytest.mark.parametrize(
    ("field", "value"), [("model", "other"), ("depths", (0, 6)), ("base", "b"), ("seed", 1), ("new", 1)]
)
def test_other_settings_are_refused_by_field(run: RunFolder, field: str, value: Any) -> None:
    before = (run / MANIFEST).read_bytes()
    with pytest.raises(UserError, match=f" {field}=.*--output") as caught:
        run.claim({**CONFIG, field: value}, {})
    assert str(run.path) in str(caught.value)
    assert (run / MANIFEST).read_bytes() == before


def test_a_missing_setting_is_refused_too(run: RunFolder) -> None:
    with pytest.raises(UserError, match="seed=0, not None"):
        run.claim({name: value for name, value in CONFIG.items() if name != "seed"}, {})


@pytest.mark.parametrize("stranger", ["notes.txt", ".git", "completions.jsonl"])
def test_a_folder_with_other_files_is_refused_by_name(tmp_path: Path, stranger: str) -> None:
    (tmp_path / stranger).write_text("mine")
    run = RunFolder(tmp_path)
    with pytest.raises(UserError, match=f"not empty .{stranger}.*--output"), run.writing():
        run.claim(CONFIG, {})
    assert (tmp_path / stranger).read_text() == "mine"
    assert MANIFEST not in names(tmp_path)


def test_a_kill_during_the_first_manifest_does_not_bar_the_folder(tmp_path: Path) -> None:
    (tmp_path / f".{MANIFEST}.4242").write_text('{"schema_ver')
    run = RunFolder(tmp_path)
    with run.writing():
        run.claim(CONFIG, {})
    assert run.manifest["config"]["model"] == "m"


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", '{"manifest_version": 3, "name": "a browser extension"}', '{"config": []}', "\ud800"],
)
def test_a_manifest_that_is_no_runs_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / MANIFEST).write_bytes(content.encode("utf-8", "surrogatepass"))
    run = RunFolder(tmp_path)
    for use in (lambda: run.manifest, lambda: run.claim(CONFIG, {})):
        with pytest.raises(UserError, match=MANIFEST) as caught:
            use()
        assert "\n" not in str(caught.value)


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no manifest"):
        _ = RunFolder(tmp_path).manifest
    with pytest.raises(UserError, match="does not exist"):
        _ = RunFolder(tmp_path / "nowhere").manifest
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="file"):
        _ = RunFolder(tmp_path / "file").manifest


def test_notes_merge_one_level_deep(run: RunFolder) -> None:
    run.note(seconds={"prefill": 1.0}, answers="a")
    run.note(seconds={"kl": 2.0}, answers="b")
    assert run.manifest["seconds"] == {"prefill": 1.0, "kl": 2.0}
    assert run.manifest["answers"] == "b"
    assert run.manifest["config"]["model"] == "m"


def test_appended_records_come_back_in_order(run: RunFolder) -> None:
    with run.appender("m.jsonl") as out:
        out.append([ONE, TWO])
    with run.appender("m.jsonl") as out:
        out.append([])
        out.append([THREE])
    assert run.records("m.jsonl", Message) == [ONE, TWO, THREE]
    assert run.records("absent.jsonl", Message) == []


@given(kept=st.integers(0, 120), padding=st.sampled_from([0, 65_530, 65_536, 70_000, 140_000]))
@settings(max_examples=60, deadline=None)
def test_a_half_written_last_line_is_cut_on_opening(kept: int, padding: int) -> None:
    import tempfile

    whole = "".join(
        to_json(message) + "\n" for message in (ONE, Message(role="é", content="x" * padding), TWO)
    ).encode()
    cut = whole[: max(0, len(whole) - kept)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.jsonl"
        path.write_bytes(cut)
        with Appender(path) as out:
            assert path.read_bytes() == cut[: cut.rfind(b"\n") + 1]
            out.append([THREE])
        assert path.read_bytes() == cut[: cut.rfind(b"\n") + 1] + to_json(THREE).encode() + b"\n"


def test_a_malformed_line_inside_is_named_with_the_remedy(run: RunFolder) -> None:
    (run / "m.jsonl").write_text(f"{to_json(ONE)}\n{{oops\n{to_json(TWO)}\n")
    with pytest.raises(UserError, match=r"m\.jsonl, line 2: .*delete that line"):
        run.records("m.jsonl", Message)


def test_a_whole_file_is_replaced_and_leaves_nothing_beside_it(run: RunFolder) -> None:
    run.write_records("m.jsonl", [ONE])
    run.write_json("x.json", {"é": 1})
    run.write_records("m.jsonl", [TWO])
    assert run.records("m.jsonl", Message) == [TWO]
    assert json.loads((run / "x.json").read_bytes()) == {"é": 1}
    assert names(run.path) - {".lock"} == {MANIFEST, "m.jsonl", "x.json"}


def test_json_that_no_one_could_read_is_not_written(run: RunFolder) -> None:
    with pytest.raises(ValueError, match="JSON"):
        run.write_json("x.json", {"rate": float("nan")})
    assert "x.json" not in names(run.path)


def test_a_failed_rename_keeps_the_old_file_and_leaves_nothing(tmp_path: Path, monkeypatch: Any) -> None:
    path = tmp_path / "x.json"
    path.write_text("old")

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="space"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert names(tmp_path) == {"x.json"}


def half_full_write(room: int) -> Callable[[int, bytes], int]:
    """`os.write` on a disk with room for so many more bytes."""
    left = [room]
    real = os.write

    def write(descriptor: int, data: bytes) -> int:
        if left[0] == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = real(descriptor, data[: left[0]])
        left[0] -= written
        return written

    return write


@pytest.mark.parametrize("room", [0, 1, 40, 41, 60])
def test_a_full_disk_takes_the_part_back_and_says_so(run: RunFolder, room: int, monkeypatch: Any) -> None:
    with run.appender("m.jsonl") as out:
        out.append([ONE])
    before = (run / "m.jsonl").read_bytes()
    monkeypatch.setattr(os, "write", half_full_write(room))
    with (
        pytest.raises(UserError, match=r"disk is full.*free space.*kept"),
        run.writing(),
        run.appender("m.jsonl") as out,
    ):
        out.append([TWO, THREE])
    monkeypatch.undo()
    assert (run / "m.jsonl").read_bytes() == before
    with run.writing(), run.appender("m.jsonl") as out:
        out.append([TWO, THREE])
    assert run.records("m.jsonl", Message) == [ONE, TWO, THREE]


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 64 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(disk)], capture_output=True, check=False
    )
    if done.returncode != 0:
        pytest.skip("mounting a small file system is not allowed here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def fill(run: RunFolder, kept: list[Message]) -> None:
    """Append records for as long as the disk takes them."""
    batch = [Message(role="user", content="x" * 1000)] * 3
    with run.writing():
        run.claim(CONFIG, {})
        with run.appender("m.jsonl") as out:
            while True:
                out.append(batch)
                kept += batch


def test_a_really_full_disk_loses_nothing_and_is_resumed(tiny_disk: Path) -> None:
    run = RunFolder(tiny_disk / "run")
    kept: list[Message] = []
    with pytest.raises(UserError, match="disk is full"):
        fill(run, kept)
    assert len(kept) > 9
    assert run.records("m.jsonl", Message) == kept
    with pytest.raises(UserError, match="disk is full"), run.writing():
        run.write_text("report.html", "y" * 60_000)
    assert names(run.path) - {".lock"} == {MANIFEST, "m.jsonl"}
    subprocess.run(["mount", "-o", "remount,size=1m", str(tiny_disk)], check=True)
    with run.writing():
        run.claim(CONFIG, {})
        with run.appender("m.jsonl") as out:
            out.append([ONE])
    assert run.records("m.jsonl", Message) == [*kept, ONE]


HOLDER = """
import sys, time
from pathlib import Path
from deepalign.runs import RunFolder
with RunFolder(Path(sys.argv[1])).writing():
    print("held", flush=True)
    sys.stdin.readline()
"""


def test_a_second_process_is_refused_until_the_first_is_gone(run: RunFolder) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(run.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="another process") as caught, run.writing():
            pass
        assert str(run.path) in str(caught.value)
        assert run.manifest["config"]["model"] == "m", "reading needs no lock"
    finally:
        holder.kill()
        holder.wait()
    with run.writing():
        run.note(after="the kill")
    assert run.manifest["after"] == "the kill"


@pytest.mark.parametrize("below", [False, True])
def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path, below: bool) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("x")
    run = RunFolder(blocker / "deep" / "run" if below else blocker)
    with pytest.raises(UserError, match=r"cannot be written.*--output"), run.writing():
        pytest.fail("nothing can be written there")
    assert blocker.read_text() == "x"


@pytest.mark.parametrize(
    ("code", "told"),
    [
        (errno.ENOSPC, "disk is full"),
        (errno.EDQUOT, "disk is full"),
        (errno.EACCES, "cannot be written"),
        (errno.EROFS, "cannot be written"),
        (errno.ENAMETOOLONG, "cannot be written"),
        (errno.EISDIR, "cannot be written"),
    ],
)
def test_errors_of_the_disk_are_clear(code: int, told: str) -> None:
    with pytest.raises(UserError, match=f"{told}.*the/place|the/place.*{told}"), clear_disk_errors(Path("the/place")):
        raise OSError(code, os.strerror(code))


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(ConnectionResetError), clear_disk_errors(Path("x")):
        raise ConnectionResetError(errno.ECONNRESET, "reset")


def test_the_environment_is_json_and_names_the_machine() -> None:
    told = json.loads(json.dumps(environment()))
    assert "cores" in told["hardware"]
    assert told["started"].endswith("+00:00")


def test_the_file_form_is_stable(run: RunFolder) -> None:
    """Other tools read these files line by line."""
    run.write_records("prompts.jsonl", [Prompt(prompt_id="a", text="t")])
    assert json.loads((run / "prompts.jsonl").read_text()) == {
        "prompt_id": "a",
        "text": "t",
        "category": "uncategorised",
        "behaviour": "",
        "style": "",
        "answer": None,
    }
