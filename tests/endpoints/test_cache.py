"""Replies on disk: keyed by content, shared by processes."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from pathlib import Path

from deepalign.endpoints.cache import ReplyCache, key_of
from deepalign.endpoints.exchange import Request


def test_keys_are_of_the_content_alone() -> None:
    one = Request(body={"model": "m", "messages": [], "temperature": 0.0})
    assert key_of(one) == key_of(Request(body={"temperature": 0.0, "messages": [], "model": "m"}, prefix="other"))
    others = [
        Request(body={**one.body, "model": "n"}),
        Request(body={**one.body, "temperature": 1.0}),
        Request(body={**one.body, "messages": [{}]}),
        Request(body=one.body, path="completions"),
    ]
    assert len({key_of(other) for other in [one, *others]}) == 5


def test_replies_come_back_and_only_hashes_of_requests_are_kept(tmp_path: Path) -> None:
    cache = ReplyCache(tmp_path / "c.sqlite")
    keys = [f"{i:064x}" for i in range(1200)]
    for key in keys[:3]:
        cache.put(key, {"text": f"é \ud83d {key[-1]}"})
    assert cache.get(keys) == {key: {"text": f"é \ud83d {key[-1]}"} for key in keys[:3]}
    cache.put(keys[0], {"text": "newer"})
    assert cache.get(keys[:1]) == {keys[0]: {"text": "newer"}}
    assert (tmp_path / "c.sqlite").stat().st_mode & 0o077 == 0


def test_a_reply_that_is_no_json_is_not_there(tmp_path: Path) -> None:
    cache = ReplyCache(tmp_path / "c.sqlite")
    cache.put("a", {})
    cache.close()
    with sqlite3.connect(tmp_path / "c.sqlite") as connection:
        connection.execute("UPDATE replies SET reply = '{half'")
    assert cache.get(["a"]) == {}


def test_no_path_remembers_nothing() -> None:
    cache = ReplyCache(None)
    cache.put("a", {"x": 1})
    assert cache.get(["a"]) == {}


def test_several_processes_write_one_file(tmp_path: Path) -> None:
    path = tmp_path / "c.sqlite"
    code = (
        "import sys; from pathlib import Path; from deepalign.endpoints.cache import ReplyCache\n"
        "cache = ReplyCache(Path(sys.argv[1]))\n"
        "for i in range(50): cache.put(f'{sys.argv[2]}-{i}', {'i': i})\n"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", code, str(path), name], stderr=subprocess.PIPE)
        for name in ("a", "b", "c")
    ]
    assert [process.communicate()[1] for process in running] == [b"", b"", b""]
    assert len(ReplyCache(path).get([f"{name}-{i}" for name in "abc" for i in range(50)])) == 150
