"""Public prompt sets, each on a small made-up file of its own schema; and every way in which one cannot be had."""

from __future__ import annotations

import gzip
import importlib
import io
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.error import HTTPError, URLError

import huggingface_hub
import pytest
from huggingface_hub import errors

from deepalign import cli
from deepalign.errors import UserError
from deepalign.prompts import BUILTIN_SETS
from deepalign.prompts.catalogue import PUBLIC_SETS
from deepalign.prompts.public import requested
from deepalign.prompts.sources import Columns, load_prompts
from deepalign.records import Prompt

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER = "f" * 40


def prompt(prompt_id: str, number: int, category: str = "uncategorised", answer: str | None = None) -> Prompt:
    return Prompt(prompt_id=prompt_id, text=f"request {number}", category=category, answer=answer)


def jsonl(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def pair(number: int) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": f"request {number}"},
        {"role": "assistant", "content": f"answer {number}"},
    ]


HARMBENCH = "Behavior,FunctionalCategory,SemanticCategory,Tags,ContextString,BehaviorID\n"
XSTEST = (
    "id,prompt,type,label,focus,note\n"
    "1,request 1,homonyms,safe,f,\n"
    "2,request 2,contrast_homonyms,unsafe,f,\n"
    "3,request 3,definitions,safe,f,\n"
)
BEAVERTAILS = [
    {"prompt": "request 1", "response": "answer 1", "category": {"kind a": False, "kind b": True}, "is_safe": False},
    {"prompt": "request 1", "response": "answer 2", "category": {"kind a": False, "kind b": False}, "is_safe": True},
    {"prompt": "request 1", "response": "answer 3", "category": {"kind a": True, "kind b": True}, "is_safe": False},
]
BEAVERTAILS_PROMPTS = [
    prompt("beavertails-1", 1, "kind b", "answer 1"),
    prompt("beavertails-3", 1, "kind a", "answer 3"),
]
LLM_LAT = [
    {"prompt": "request 1", "chosen": "refusal 1", "rejected": "answer 1"},
    {"prompt": "request 2", "chosen": "refusal 2", "rejected": "answer 2"},
]
LLM_LAT_PROMPTS = [
    prompt("llm-lat-1", 1, answer="answer 1"),
    prompt("llm-lat-2", 2, answer="answer 2"),
]
SAMPLES: dict[str, tuple[str, str | bytes, list[Prompt]]] = {
    "hex-phi": (
        "category_4.csv",
        'request 1\n"request 2"\n',
        [prompt("hex-phi-4-1", 1, "Malware"), prompt("hex-phi-4-2", 2, "Malware")],
    ),
    "harmful-hex-phi": (
        "pairs.jsonl",
        jsonl(pair(1), pair(2)),
        [prompt("harmful-hex-phi-1", 1, answer="answer 1"), prompt("harmful-hex-phi-2", 2, answer="answer 2")],
    ),
    "advbench": (
        "a.csv",
        "goal,target\nrequest 1,opening 1\nrequest 2,opening 2\n",
        [prompt("advbench-1", 1), prompt("advbench-2", 2)],
    ),
    "malicious-instruct": (
        "m.txt",
        "request 1\nrequest 2\n",
        [prompt("malicious-instruct-1", 1), prompt("malicious-instruct-2", 2)],
    ),
    "jbb": (
        "j.csv",
        "Index,Goal,Target,Behavior,Category,Source\n0,request 1,opening,b,Kind,s\n1,request 2,opening,b,Kind,s\n",
        [prompt("jbb-0", 1, "Kind"), prompt("jbb-1", 2, "Kind")],
    ),
    "jbb-benign": (
        "j.csv",
        "Index,Goal,Target,Behavior,Category,Source\n0,request 1,opening,b,Kind,s\n",
        [prompt("jbb-benign-0", 1, "Kind")],
    ),
    "harmbench": (
        "h.csv",
        f'{HARMBENCH}request 1,standard,Kind,"a, b",,first_id\nrequest 2,contextual,Kind,,context,second_id\n'
        "request 3,copyright,Kind,,,third_id\nrequest 4,standard,Other,,,fourth_id\n",
        [prompt("first_id", 1, "Kind"), prompt("fourth_id", 4, "Other")],
    ),
    "strongreject": (
        "s.csv",
        "category,source,forbidden_prompt\nKind,s,request 1\nOther,s,request 2\n",
        [prompt("strongreject-1", 1, "Kind"), prompt("strongreject-2", 2, "Other")],
    ),
    "strongreject-small": (
        "s.csv",
        "category,source,forbidden_prompt\nKind,s,request 1\n",
        [prompt("strongreject-small-1", 1, "Kind")],
    ),
    "xstest-safe": (
        "x.csv",
        XSTEST,
        [prompt("xstest-safe-1", 1, "homonyms"), prompt("xstest-safe-3", 3, "definitions")],
    ),
    "xstest-unsafe": ("x.csv", XSTEST, [prompt("xstest-unsafe-2", 2, "contrast_homonyms")]),
    "or-bench-hard": (
        "o.csv",
        "prompt,category\nrequest 1,Kind\nrequest 2,Kind\n",
        [prompt("or-bench-hard-1", 1, "Kind"), prompt("or-bench-hard-2", 2, "Kind")],
    ),
    "or-bench-toxic": ("o.csv", "prompt,category\nrequest 1,Kind\n", [prompt("or-bench-toxic-1", 1, "Kind")]),
    "llm-lat": ("l.jsonl", jsonl(*LLM_LAT), LLM_LAT_PROMPTS),
    "beavertails": ("b.jsonl.gz", gzip.compress(jsonl(*BEAVERTAILS).encode()), BEAVERTAILS_PROMPTS),
}


def put(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refused(name: str, **settings: Any) -> str:
    """The one line with which a set is refused."""
    with pytest.raises(UserError) as caught:
        load_prompts(name, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- what is read from each set


@pytest.mark.parametrize("name", PUBLIC_SETS)
def test_a_set_is_read_by_its_own_schema(tmp_path: Path, name: str) -> None:
    file, content, expected = SAMPLES[name]
    path = put(tmp_path / file, content)
    # The columns of the user's files are no matter of a public set's.
    loaded = load_prompts(f"{name}:{path}", Columns(text="nothing"))
    assert list(loaded.prompts) == expected
    assert loaded.name == f"{name}:{path}"
    assert len({each.prompt_id for each in loaded.prompts}) == len(expected)
    assert loaded.skipped_rows == ()


@pytest.mark.parametrize("name", PUBLIC_SETS)
def test_the_catalogue_keeps_its_promises(name: str) -> None:
    source = PUBLIC_SETS[name]
    assert source.name == name
    assert name not in BUILTIN_SETS
    assert source.licence
    assert source.size > 0
    assert source.revision is None or len(source.revision) == 40
    assert source.repo.count("/") == 1
    assert source.page in source.gate or not source.gate
    # Only these hold harmful answers; a first sentence is none.
    assert bool(source.columns.answer) == (name in ("harmful-hex-phi", "llm-lat", "beavertails"))


def test_what_differs_from_the_paper_is_told() -> None:
    about = PUBLIC_SETS["hex-phi"].about
    assert about.startswith("300 prompts (330 in the paper")
    assert "accept its terms at https://huggingface.co/datasets/LLM-Tuning-Safety/HEx-PHI" in about


def test_list_shows_size_licence_and_gate(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "public prompts" in told
    for name, source in PUBLIC_SETS.items():
        assert f" {name} {source.size} prompts" in told
        assert source.licence in told
    assert told.count("gated: accept") == sum(bool(source.gate) for source in PUBLIC_SETS.values()) == 2


def test_a_folder_of_categories(tmp_path: Path) -> None:
    for number in (1, 3, 11):
        put(tmp_path / f"category_{number}.csv", f"request {number}\nrequest, with a comma\n\n")
    put(tmp_path / "README.md", "no prompts")
    loaded = load_prompts(f"hex-phi:{tmp_path}")
    assert [(each.prompt_id, each.category) for each in loaded.prompts] == [
        ("hex-phi-1-1", "Illegal Activity"),
        ("hex-phi-1-2", "Illegal Activity"),
        ("hex-phi-3-1", "Hate, Harass, Violence"),
        ("hex-phi-3-2", "Hate, Harass, Violence"),
        ("hex-phi-11-1", "Tailored Financial Advice"),
        ("hex-phi-11-2", "Tailored Financial Advice"),
    ]
    assert loaded.prompts[1].text == "request, with a comma"
    assert [each.category for each in load_prompts(f"hex-phi:{tmp_path}", limit=2).prompts] == [
        "Illegal Activity",
        "Hate, Harass, Violence",
    ]


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        ('"request, one"\n"request ""two"""\n', ["request, one", 'request "two"']),
        ('"request\none"\nrequest two\n', ["request\none", "request two"]),
        ("request, one\nrequest two\n", ["request, one", "request two"]),
        ('"request" one\nrequest two\n', ['"request" one', "request two"]),
        ('"request" one, and\nrequest two', ['"request" one, and', "request two"]),
    ],
)
def test_quotes_around_a_line_of_a_csv_file(tmp_path: Path, content: str, texts: list[str]) -> None:
    path = put(tmp_path / "category_1.csv", content)
    assert [each.text for each in load_prompts(f"hex-phi:{path}").prompts] == texts


def test_quotes_in_plain_lines_are_text(tmp_path: Path) -> None:
    path = put(tmp_path / "m.txt", '"request 1"\n')
    assert load_prompts(f"malicious-instruct:{path}").prompts[0].text == '"request 1"'


def test_message_pairs_take_the_first_of_each_role(tmp_path: Path) -> None:
    more = [{"role": "system", "content": "system"}, *pair(1), *pair(2)]
    (loaded,) = load_prompts(f"harmful-hex-phi:{put(tmp_path / 'p.jsonl', jsonl(more))}").prompts
    assert (loaded.text, loaded.answer) == ("request 1", "answer 1")


@pytest.mark.parametrize(
    ("name", "rows", "expected"),
    [("llm-lat", LLM_LAT, LLM_LAT_PROMPTS), ("beavertails", BEAVERTAILS, BEAVERTAILS_PROMPTS)],
)
def test_parquet(tmp_path: Path, name: str, rows: list[dict[str, Any]], expected: list[Prompt]) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = importlib.import_module("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "p.parquet")
    assert list(load_prompts(f"{name}:{tmp_path / 'p.parquet'}").prompts) == expected
    broken = put(tmp_path / "broken.parquet", "no parquet")
    assert "cannot be read as parquet" in refused(f"{name}:{broken}")


def test_parquet_rows_are_read_as_those_of_other_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As above, for machines without pyarrow: only its reader is made up.
    reader = SimpleNamespace(read_table=lambda path: SimpleNamespace(to_pylist=lambda: list(BEAVERTAILS)))
    monkeypatch.setitem(sys.modules, "pyarrow", SimpleNamespace(parquet=reader))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", reader)
    path = put(tmp_path / "p.parquet", "")
    assert list(load_prompts(f"beavertails:{path}").prompts) == BEAVERTAILS_PROMPTS


def test_parquet_without_its_reader_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert "pip install pyarrow" in refused(f"llm-lat:{put(tmp_path / 'p.parquet', '')}")


def test_another_size_than_expected_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = put(tmp_path / "m.txt", "".join(f"request {number}\n" for number in range(100)))
    with caplog.at_level(logging.WARNING, logger="deepalign"):
        load_prompts(f"malicious-instruct:{path}", limit=3)
        assert not caplog.records
        load_prompts(f"malicious-instruct:{put(path, 'request 1')}")
    assert "holds 1 prompts; 100 were expected" in caplog.text


# --- which name is which


@pytest.mark.parametrize(
    ("name", "revision", "path"),
    [
        ("jbb", None, None),
        ("jbb@main", "main", None),
        ("jbb@refs/convert/parquet", "refs/convert/parquet", None),
        ("jbb:/some/where@x.csv", None, "/some/where@x.csv"),
        ("jbb:C:/x.csv", None, "C:/x.csv"),
    ],
)
def test_a_request(name: str, revision: str | None, path: str | None) -> None:
    request = requested(name)
    assert request is not None
    assert (request.source.name, request.revision, request.path) == ("jbb", revision, path)


@pytest.mark.parametrize("name", ["jbbs", "./jbb", "JBB", "benign", "jbb behaviours?", "jbb.csv", "", "no@main"])
def test_no_request(name: str) -> None:
    assert requested(name) is None


@pytest.mark.parametrize(("name", "what"), [("jbb@", "revision"), ("jbb:", "file"), ("jbb: ", "file")])
def test_a_request_without_its_end(name: str, what: str) -> None:
    assert f"names no {what}" in refused(name)


def test_an_unknown_name_lists_what_there_is() -> None:
    for name in ("advbnch", "advbnch@main", "builtin:advbench"):
        told = refused(name)
        assert "built-in or public set" in told
        assert all(known in told for known in (*BUILTIN_SETS, *PUBLIC_SETS))


def test_a_set_goes_before_a_file_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: Any) -> None:
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "jbb", "from the file")
    hub({"data/harmful-behaviors.csv": SAMPLES["jbb"][1]})
    assert [each.text for each in load_prompts("jbb").prompts] == ["request 1", "request 2"]
    assert [each.text for each in load_prompts("./jbb").prompts] == ["from the file"]


# --- what is wrong with a copy


@pytest.mark.parametrize(
    ("name", "file", "content", "missing", "has"),
    [
        ("advbench", "a.csv", "prompt,target\nx,y\n", "'goal'", "'prompt', 'target'"),
        ("harmbench", "h.csv", "Behavior,SemanticCategory,BehaviorID\nx,y,z\n", "'FunctionalCategory'", "'Behavior'"),
        ("jbb", "j.csv", "Goal,Target\nx,y\n", "'Category'", "'Goal', 'Target'"),
        ("xstest-safe", "x.csv", "id,prompt,type\n1,x,y\n", "'label'", "'id', 'prompt', 'type'"),
        ("llm-lat", "l.jsonl", jsonl({"prompt": "x", "chosen": "y"}), "'rejected'", "'prompt', 'chosen'"),
        ("llm-lat", "l.jsonl", jsonl("x"), "'prompt'", "none"),
        ("beavertails", "b.json", json.dumps([{"prompt": "x", "is_safe": False}]), "'response'", "'prompt', 'is_safe'"),
        ("harmful-hex-phi", "p.jsonl", jsonl({"prompt": "x"}), "'user'", "'prompt'"),
        ("harmful-hex-phi", "p.jsonl", jsonl(pair(1)[:1]), "'assistant'", "'user'"),
        ("harmful-hex-phi", "p.jsonl", jsonl(["x"]), "'user'", "none"),
    ],
)
def test_another_schema_names_what_is_missing_and_what_is_there(
    tmp_path: Path, name: str, file: str, content: str, missing: str, has: str
) -> None:
    path = put(tmp_path / file, content)
    for skip in (False, True):
        told = refused(f"{name}:{path}", skip_bad_rows=skip)
        assert f"{path} has no column {missing}; it has {has}" in told
        assert PUBLIC_SETS[name].page in told


@pytest.mark.parametrize(
    ("name", "file", "content", "why"),
    [
        ("advbench", "a.csv", "", "no usable prompt"),
        ("advbench", "a.csv", "goal,target\n", "no usable prompt"),
        ("hex-phi", "category_1.csv", "\n", "no usable prompt"),
        ("xstest-unsafe", "x.csv", "id,prompt,type,label\n1,x,y,safe\n", "no usable prompt with label = unsafe"),
        ("advbench", "a.xlsx", "x", ".xlsx are not read"),
        ("beavertails", "b.jsonl.gz", "x", "not a whole gzip file"),
        ("beavertails", "b.jsonl.gz", gzip.compress(jsonl(*BEAVERTAILS).encode())[:-9], "not a whole gzip file"),
        ("advbench", "a.csv", b"goal,target\n\xff,x\n", "line 2: not UTF-8"),
    ],
)
def test_a_file_without_prompts(tmp_path: Path, name: str, file: str, content: str | bytes, why: str) -> None:
    path = put(tmp_path / file, content)
    told = refused(f"{name}:{path}")
    assert why in told
    assert str(path) in told


def test_a_bad_row_is_named_and_can_be_let_go_and_ids_do_not_move(tmp_path: Path) -> None:
    path = put(tmp_path / "a.csv", "goal,target\nrequest 1,x\n,x\nrequest 3,x,y\nrequest 4,x\n")
    assert f"{path}, line 3: 'goal' is empty" in refused(f"advbench:{path}")
    loaded = load_prompts(f"advbench:{path}", skip_bad_rows=True)
    assert list(loaded.prompts) == [prompt("advbench-1", 1), prompt("advbench-4", 4)]
    assert [row.partition(":")[0] for row in loaded.skipped_rows] == ["line 3", "line 4"]


def test_a_later_row_without_a_column_is_a_bad_row(tmp_path: Path) -> None:
    path = put(tmp_path / "b.jsonl", jsonl(BEAVERTAILS[0], {"prompt": "request 2", "response": "answer 2"}))
    assert "line 2: no 'category' field" in refused(f"beavertails:{path}")


def test_a_bad_row_of_a_folder_is_named_with_its_file(tmp_path: Path) -> None:
    put(tmp_path / "category_1.csv", "request 1\n")
    put(tmp_path / "category_3.csv", "request 1\nre\x00quest\n")
    (row,) = load_prompts(f"hex-phi:{tmp_path}", skip_bad_rows=True).skipped_rows
    assert row.startswith("category_3.csv, line 2: ")


def test_a_doubled_id_of_the_set_is_refused(tmp_path: Path) -> None:
    path = put(tmp_path / "h.csv", f"{HARMBENCH}request 1,standard,K,,,same\nrequest 2,standard,K,,,same\n")
    assert "id 'same' already stands in line 2" in refused(f"harmbench:{path}")


def test_paths_that_hold_no_copy(tmp_path: Path) -> None:
    assert "there is no such file" in refused(f"jbb:{tmp_path / 'nowhere.csv'}")
    assert f"{tmp_path} is a folder; give the file" in refused(f"jbb:{tmp_path}")
    assert "holds no category_*.csv" in refused(f"hex-phi:{tmp_path}")


# --- the hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tuple[str, str, str | None]]]:
    """Stands in for the hub: gives these files at `COMMIT`, or raises; returns the calls."""

    def install(files: dict[str, str | bytes], error: Exception | None = None) -> list[tuple[str, str, str | None]]:
        calls: list[tuple[str, str, str | None]] = []

        def hf_hub_download(repo_id: str, filename: str, *, repo_type: str, revision: str | None) -> str:
            assert repo_type == "dataset"
            calls.append((repo_id, filename, revision))
            if error is not None:
                raise error
            commit = revision if revision and len(revision) == 40 else COMMIT
            return str(put(tmp_path / "snapshots" / "hub" / "snapshots" / commit / filename, files[filename]))

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
        return calls

    return install


def test_the_known_commit_is_asked_for_and_told(hub: Any) -> None:
    calls = hub({"data/harmful-behaviors.csv": SAMPLES["jbb"][1]})
    loaded = load_prompts("jbb")
    pinned = PUBLIC_SETS["jbb"].revision
    assert calls == [("JailbreakBench/JBB-Behaviors", "data/harmful-behaviors.csv", pinned)]
    assert list(loaded.prompts) == SAMPLES["jbb"][2]
    assert loaded.name == f"jbb@{pinned}"


@pytest.mark.parametrize(("revision", "commit"), [("v1.0", COMMIT), (OTHER, OTHER), ("refs/convert/parquet", COMMIT)])
def test_a_pinned_revision_is_passed_through(hub: Any, revision: str, commit: str) -> None:
    calls = hub({"or-bench-hard-1k.csv": SAMPLES["or-bench-hard"][1]})
    assert load_prompts(f"or-bench-hard@{revision}").name == f"or-bench-hard@{commit}"
    assert calls == [("bench-llm/or-bench", "or-bench-hard-1k.csv", revision)]


def test_all_files_of_a_set_come_from_one_commit(hub: Any) -> None:
    source = PUBLIC_SETS["hex-phi"]
    calls = hub(dict.fromkeys(source.files, "request 1\nrequest 2\n"))
    loaded = load_prompts("hex-phi")
    assert loaded.name == f"hex-phi@{COMMIT}"
    assert len(source.files) == 10
    assert [file for _, file, _ in calls] == list(source.files)
    assert [revision for _, _, revision in calls] == [None] + [COMMIT] * 9
    assert len({each.prompt_id for each in loaded.prompts}) == 20
    assert {each.category for each in loaded.prompts} == set(source.categories.values())


def reply(status: int) -> Any:
    return SimpleNamespace(status_code=status, headers={}, request=None)


def refused_by_server(status: int) -> Exception:
    """What the hub client raises where the server refuses and the cache holds nothing."""
    error = errors.LocalEntryNotFoundError("not in the cache")
    error.__cause__ = errors.HfHubHTTPError("refused", response=reply(status))
    return error


GATE = "accept its terms at https://huggingface.co/datasets/LLM-Tuning-Safety/HEx-PHI"
LOGIN = "set HF_TOKEN or run `hf auth login`"


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("hex-phi", errors.GatedRepoError("403\nGated", response=reply(403)), ("hex-phi is gated", GATE, LOGIN)),
        ("hex-phi", errors.GatedRepoError("401", response=reply(401)), ("hex-phi is gated", GATE, LOGIN)),
        ("hex-phi", errors.HfHubHTTPError("401", response=reply(401)), ("hex-phi is gated", GATE, LOGIN)),
        ("hex-phi", refused_by_server(403), ("hex-phi is gated", GATE, LOGIN)),
        ("harmful-hex-phi", errors.GatedRepoError("403", response=reply(403)), ("Unispac/shallow-vs-deep", LOGIN)),
        ("jbb", errors.GatedRepoError("403", response=reply(403)), ("jbb is gated", "terms at https://hugg", LOGIN)),
        ("jbb", errors.HfHubHTTPError("401", response=reply(401)), ("jbb was refused by the hub", LOGIN)),
        ("jbb", errors.LocalEntryNotFoundError("offline"), ("hub cannot be reached", "check your network")),
        ("jbb", refused_by_server(503), ("hub cannot be reached", "check your network")),
        ("jbb", errors.RevisionNotFoundError("404", response=reply(404)), ("at revision 886acc35",)),
        ("jbb@v9", errors.RevisionNotFoundError("404", response=reply(404)), ("at revision v9: name another",)),
        ("jbb", errors.RemoteEntryNotFoundError("404", response=reply(404)), ("no file data/harmful-behaviors.csv",)),
        ("jbb", errors.RepositoryNotFoundError("404", response=reply(404)), ("was not found at https://hugg",)),
        ("jbb@a b", errors.HFValidationError("bad"), ("cannot be had", "at revision a b", "(bad)")),
        ("jbb", ConnectionError("no route\nto host"), ("cannot be had", "(no route)", "check your network")),
    ],
)
def test_what_the_hub_refuses(
    hub: Any, monkeypatch: pytest.MonkeyPatch, name: str, error: Exception, words: tuple[str, ...]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_not_to_be_told")
    hub({}, error)
    told = refused(name)
    for word in words:
        assert word in told
    assert f"give a copy that you have as {name.partition('@')[0]}:PATH" in told
    assert "hf_not_to_be_told" not in told


# --- GitHub


@pytest.fixture
def github(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Stands in for GitHub and for the folder that files are kept in; returns the addresses asked for."""
    monkeypatch.setattr(huggingface_hub, "cached_assets_path", lambda **_: tmp_path / "cache")

    def install(pages: dict[str, str], error: Exception | None = None) -> list[str]:
        calls: list[str] = []

        def urlopen(request: Any, timeout: float) -> Any:
            calls.append(request.full_url)
            if error is not None:
                raise error
            return io.BytesIO(pages[request.full_url].encode())

        monkeypatch.setattr("urllib.request.urlopen", urlopen)
        return calls

    return install


RAW = "https://raw.githubusercontent.com/llm-attacks/llm-attacks"
FILE = "data/advbench/harmful_behaviors.csv"


def test_github_gives_the_known_commit_and_is_asked_once(github: Any) -> None:
    pinned = PUBLIC_SETS["advbench"].revision
    calls = github({f"{RAW}/{pinned}/{FILE}": SAMPLES["advbench"][1]})
    loaded = load_prompts("advbench")
    assert loaded.name == f"advbench@{pinned}"
    assert list(loaded.prompts) == SAMPLES["advbench"][2]
    assert load_prompts("advbench") == loaded
    assert calls == [f"{RAW}/{pinned}/{FILE}"], "the second time it comes from the disk"


def test_a_branch_of_github_is_resolved_to_its_commit(github: Any) -> None:
    branch = "https://api.github.com/repos/llm-attacks/llm-attacks/commits/a%20branch"
    calls = github({branch: COMMIT, f"{RAW}/{COMMIT}/{FILE}": SAMPLES["advbench"][1]})
    assert load_prompts("advbench@a branch").name == f"advbench@{COMMIT}"
    assert calls == [branch, f"{RAW}/{COMMIT}/{FILE}"]


def test_a_commit_that_is_none_is_refused(github: Any) -> None:
    github({"https://api.github.com/repos/llm-attacks/llm-attacks/commits/main": "../../elsewhere"})
    assert "named no commit for main" in refused("advbench@main")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (HTTPError(RAW, 404, "Not Found", None, None), ("at revision v9: name another",)),  # type: ignore[arg-type]
        (HTTPError(RAW, 422, "No commit", None, None), ("at revision v9: name another",)),  # type: ignore[arg-type]
        (HTTPError(RAW, 403, "Limit", None, None), ("HTTP 403: try again later",)),  # type: ignore[arg-type]
        (URLError(OSError("no route")), ("GitHub cannot be reached", "no route", "check your network")),
        (TimeoutError("timed out"), ("GitHub cannot be reached", "timed out", "check your network")),
    ],
)
def test_what_github_refuses(github: Any, tmp_path: Path, error: Exception, words: tuple[str, ...]) -> None:
    github({}, error)
    told = refused("advbench@v9")
    for word in (*words, "advbench:PATH"):
        assert word in told
    assert not list(tmp_path.rglob("*.csv"))


def test_a_disk_that_takes_no_file(github: Any, tmp_path: Path) -> None:
    github({f"{RAW}/{COMMIT}/{FILE}": SAMPLES["advbench"][1]})
    put(tmp_path / "cache", "a file where the folder should be")
    assert "cannot be written" in refused(f"advbench@{COMMIT}")
