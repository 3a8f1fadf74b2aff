"""An audit in shards, merged, is the audit of one process."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import deepalign
from deepalign import AuditConfig, MergeConfig
from deepalign.attacks.suffix import Suffix
from deepalign.records import to_jsonl
from deepalign.shards import Shard
from deepalign.workflows import reporting

PROFILES = ("kl", "kl_reverse", "refusal_onset", "harmful_rank")
"""Sections that another batch rounds differently; the first decimals are the same."""
COUNT = 3


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def approximately(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: approximately(one) for name, one in value.items()}
    if isinstance(value, list):
        return [approximately(one) for one in value]
    return pytest.approx(value, rel=1e-3, abs=1e-5) if isinstance(value, float) else value


def timeless(metrics: dict[str, Any]) -> dict[str, Any]:
    card = {name: value for name, value in metrics["run_card"].items() if name not in ("seconds", "started")}
    return {**metrics, "run_card": card}


def assert_same_audit(merged: Path, straight: Path) -> None:
    mine, theirs = (timeless(json.loads((run / "metrics.json").read_bytes())) for run in (merged, straight))
    assert list(mine) == list(theirs)
    for section in mine:
        if section not in PROFILES:
            assert mine[section] == theirs[section], section
        else:
            assert mine[section] == approximately(theirs[section]), section
    for name in ("prompts.jsonl", "attempts.jsonl", "skipped.jsonl"):
        assert (merged / name).read_bytes() == (straight / name).read_bytes(), name
    for name in ("completions.jsonl", "verdicts.refusal.jsonl", "rap.jsonl"):
        assert sorted(map(str, rows(merged / name))) == sorted(map(str, rows(straight / name))), name
    names = [{path.name for path in run.iterdir() if not path.name.startswith(".")} for run in (merged, straight)]
    assert names[0] == names[1]
    manifests = [json.loads((run / "manifest.json").read_bytes()) for run in (merged, straight)]
    assert manifests[0]["config"] == manifests[1]["config"]
    assert set(manifests[0]) - {"merged"} == set(manifests[1])


@pytest.fixture(autouse=True)
def quick_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """No page is drawn, which takes seconds for each run."""
    monkeypatch.setattr(reporting, "render_page", lambda *_, **__: "<html></html>")


@pytest.fixture
def everything(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every probe that shards can do, with two answers to be sampled and one too short for the deepest prefill."""
    root = tmp_path_factory.getbasetemp() / "sharded-inputs"
    root.mkdir(exist_ok=True)
    lines = Path(settings["prompts"]).read_text(encoding="utf-8").splitlines()
    without = [line.partition('"')[0] for line in lines[-2:]]
    (root / "mine.csv").write_text(
        "\n".join([*lines[:-3], 'h3,"Why?",fraud,"Yes."', *without]) + "\n", encoding="utf-8"
    )
    (root / "suffixes.jsonl").write_text(to_jsonl([Suffix(name="u", text="! ! now")]), encoding="utf-8")
    (root / "asked.jsonl").write_text(
        "".join(f'{{"goal": "Do {n}.", "prompt": "Say {n}."}}\n' for n in range(5)), encoding="utf-8"
    )
    probes = ("prefill", "onset", "ranks", "rap", "decoding", "jailbreaks", "suffix", "any-depth", "abliteration")
    return {
        **settings,
        "prompts": str(root / "mine.csv"),
        "suffix": root / "suffixes.jsonl",
        "jailbreaks": (*settings["jailbreaks"], str(root / "asked.jsonl")),
        "probes": (*probes, "refusal-prefix", "kl", "over-refusal"),
        "any_depth_every": 5,
        "samples": 2,
        "temperature": 1.3,
        "top_p": 1.0,
    }


@pytest.fixture
def straight(everything: dict[str, Any], tmp_path_factory: pytest.TempPathFactory, quick_figures: None) -> Path:
    """The audit of one process, made once."""
    folder = tmp_path_factory.getbasetemp() / "sharded-straight"
    if not (folder / "report.html").exists():
        deepalign.audit(AuditConfig(**everything, output=folder))
    return folder


@pytest.fixture
def shards(everything: dict[str, Any], tmp_path_factory: pytest.TempPathFactory, quick_figures: None) -> list[Path]:
    """Its shards, made once; copy before changing anything in them."""
    whole = tmp_path_factory.getbasetemp() / "sharded"
    folders = [shard.folder(whole) for shard in Shard(index=1, count=COUNT).all()]
    for number, folder in enumerate(folders, start=1):
        if not folder.exists():
            deepalign.audit(AuditConfig(**everything, output=whole, shard=f"{number}/{COUNT}"))
    return folders


@pytest.fixture
def copies(shards: list[Path], tmp_path: Path) -> list[Path]:
    return [Path(shutil.copytree(folder, tmp_path / folder.name)) for folder in shards]


@pytest.fixture
def merged(shards: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The merged run, made once."""
    folder = tmp_path_factory.getbasetemp() / "sharded-merged"
    if not folder.exists():
        found = deepalign.merge_shards(MergeConfig(shards=tuple(reversed(shards)), output=folder))
        assert (found.run, found.shard) == (folder, None)
    return folder


def test_merged_as_if_by_one_process(merged: Path, straight: Path) -> None:
    assert_same_audit(merged, straight)
    assert (merged / "report.html").exists()


def test_greedy_and_another_split(settings: dict[str, Any], tmp_path: Path) -> None:
    settings = {**settings, "temperature": 0.0, "probes": ("prefill", "decoding", "over-refusal")}
    alone = deepalign.audit(AuditConfig(**settings, output=tmp_path / "alone"))
    folders = []
    for number in (1, 2):
        part = deepalign.audit(AuditConfig(**settings, output=tmp_path / "whole", shard=f"{number}/2"))
        folders.append(part.run)
    merged = deepalign.merge_shards(MergeConfig(shards=tuple(folders)))
    assert merged.run == tmp_path / "whole"
    assert timeless(merged.metrics) == timeless(alone.metrics)


def test_a_shard_has_no_metrics_and_says_so(shards: list[Path], everything: dict[str, Any], mistake: Any) -> None:
    for folder in shards:
        assert not list(folder.glob("metrics*"))
        assert not (folder / "report.html").exists()
    again = deepalign.audit(AuditConfig(**everything, output=shards[1].parent / "sharded", shard=f"2/{COUNT}"))
    assert (again.run, again.metrics, again.shard) == (shards[1], {}, f"2/{COUNT}")
    for command in ("judge", "report"):
        assert f"is shard 2/{COUNT} of an audit and has no metrics; deepalign merge" in mistake(command, shards[1])


def test_each_prompt_is_in_one_shard_with_all_its_attempts(shards: list[Path], straight: Path) -> None:
    sizes = []
    for folder in shards:
        own = {row["prompt_id"] for row in rows(folder / "prompts.jsonl")}
        sizes.append(len(own))
        for name in ("kl.jsonl", "onset.jsonl", "ranks.jsonl", "rap.jsonl"):
            assert {row["prompt_id"] for row in rows(folder / name)} <= own
    assert sizes == [2, 2, 2]


def test_what_all_prompts_decide_is_the_same_in_each(shards: list[Path], straight: Path) -> None:
    manifests = [json.loads((folder / "manifest.json").read_bytes()) for folder in (*shards, straight)]
    for name in ("swap_check", "onset_openings", "abliteration", "num_prompts", "first_ids"):
        assert all(manifest[name] == manifests[-1][name] for manifest in manifests), name


def test_the_whole_audit_finds_the_merged_run_complete(
    merged: Path, everything: dict[str, Any], tmp_path: Path
) -> None:
    shutil.copytree(merged, tmp_path / "merged")
    kept = {path.name: path.read_bytes() for path in merged.glob("*.jsonl")}
    whole = deepalign.audit(AuditConfig(**everything, output=tmp_path / "merged"))
    assert {path.name: path.read_bytes() for path in whole.run.glob("*.jsonl")} == kept
    assert timeless(whole.metrics) == timeless(json.loads((merged / "metrics.json").read_bytes()))


def test_shards_without_verdicts_are_judged_by_the_merge(copies: list[Path], straight: Path, tmp_path: Path) -> None:
    """One was stopped before its judging, one in it, and one was judged by an older version of the judge."""
    first, second, third = (folder / "verdicts.refusal.jsonl" for folder in copies)
    first.unlink()
    second.write_bytes(b"".join(second.read_bytes().splitlines(keepends=True)[:7]) + b'{"prompt_id": "h')
    manifest = json.loads((copies[2] / "manifest.json").read_bytes())
    manifest["judges"]["refusal"] = "0"
    (copies[2] / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    third.write_bytes(third.read_bytes().replace(b'"status":"refused"', b'"status":"complied"'))
    config = MergeConfig(shards=tuple(copies), output=tmp_path / "merged")
    merged = deepalign.merge_shards(config)
    assert_same_audit(merged.run, straight)
    kept = (merged.run / "verdicts.refusal.jsonl").read_bytes()
    again = deepalign.merge_shards(config)
    assert again.metrics == merged.metrics
    assert set((again.run / "verdicts.refusal.jsonl").read_bytes().splitlines()) == set(kept.splitlines())


def test_servers_of_all_shards_stand_in_the_merged_run(copies: list[Path], tmp_path: Path) -> None:
    for number, folder in enumerate(copies):
        # Rounding may make one of the trial's texts another.
        changed(
            folder,
            engine={
                "told": [f"t{number % 2}"],
                "servers": [{"url": f"http://{number % 2}", "greedy": [[1], [number]]}],
            },
        )
    run = deepalign.merge_shards(MergeConfig(shards=tuple(copies), output=tmp_path / "merged")).run
    engine = json.loads((run / "manifest.json").read_bytes())["engine"]
    assert (engine["told"], [server["url"] for server in engine["servers"]]) == (["t0", "t1"], ["http://0", "http://1"])


def test_nothing_to_merge(mistake: Any) -> None:
    with pytest.raises(deepalign.UserError, match="give the run folders of the shards"):
        deepalign.merge_shards(MergeConfig(shards=()))
    assert "--shards requires an argument" in mistake("merge")


def test_what_judging_cost_is_summed_once(copies: list[Path], tmp_path: Path) -> None:
    for folder, calls in zip(copies, (3, 4, None), strict=True):
        if calls is not None:
            spent = {"model": "m", "calls": calls, "prompt_tokens": 10 * calls, "cost": 0.5}
            changed(folder, judge_spending={"graded": spent})
    config = MergeConfig(shards=tuple(copies), output=tmp_path / "merged")
    for _ in range(2):
        run = deepalign.merge_shards(config).run
        noted = json.loads((run / "manifest.json").read_bytes())["judge_spending"]
        assert noted == {"graded": {"model": "m", "calls": 7, "prompt_tokens": 70, "cost": 1.0}}


def changed(folder: Path, **fields: Any) -> None:
    """Change a manifest; "config.seed" means the field inside."""
    manifest = json.loads((folder / "manifest.json").read_bytes())
    for name, value in fields.items():
        place, inner = manifest, name.split("__")
        for step in inner[:-1]:
            place = place[step]
        place[inner[-1]] = value
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def cut(path: Path, keep: int) -> None:
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:keep]))


def doubled(folder: Path) -> None:
    path = folder / "completions.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[1], *lines[1:]]))


def garbled(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'{"prompt_id"', b"{prompt_id", 1))


BROKEN: dict[str, tuple[Callable[[list[Path]], list[Path]], str]] = {}


def broken(told: str) -> Callable[[Callable[[list[Path]], Any]], None]:
    def keep(change: Callable[[list[Path]], Any]) -> None:
        BROKEN[change.__name__] = (change, told)

    return keep


@broken("1 of 3 shards are missing: 2/3 .*sharded-shard-2-of-3.*--shard 2/3")
def one_missing(found: list[Path]) -> None:
    found.pop(1)


@broken("2 of 3 shards are missing: 1/3, 3/3")
def two_missing(found: list[Path]) -> None:
    found[:] = found[1:2]


@broken("shard 2/3 is given twice, .* and .*; leave one out")
def twice(found: list[Path]) -> None:
    found[2] = found[1]


@broken("is not a run folder: it does not exist")
def not_there(found: list[Path]) -> None:
    found[0] = found[0] / "none"


@broken("is not finished; run its audit again")
def unfinished(found: list[Path]) -> None:
    changed(found[2], shard={"index": 3, "count": 3})


@broken("is shard 1/3 and .* is shard 3/4; merge shards that were split alike")
def split_otherwise(found: list[Path]) -> None:
    changed(found[2], shard__count=4)


@broken("differ in setting seed: 0 in .*shard-1-of-3, 5 in .*shard-2-of-3")
def other_settings(found: list[Path]) -> None:
    changed(found[1], config__seed=5)


@broken("differ in setting model_fingerprint: '.*' in .*, 'abc' in")
def other_weights(found: list[Path]) -> None:
    changed(found[1], config__model_fingerprint="abc")


@broken("differ in target.revision: nothing in .*, 'main' in")
def other_revision(found: list[Path]) -> None:
    changed(found[1], models__target__revision="main")


@broken("differ in version of torch: '.*' in .*, '1.0' in")
def other_version(found: list[Path]) -> None:
    changed(found[1], environment__versions__torch="1.0")


@broken("differ in version of deepalign's commit: .*, 'abc' in")
def other_commit(found: list[Path]) -> None:
    changed(found[1], environment__commit="abc")


@broken(
    "servers of .*shard-1-of-3 .http://one. and of .*shard-2-of-3 .http://two. answer the same tokens in other ways"
)
def other_weights_on_servers(found: list[Path]) -> None:
    for folder, url, ids in ((found[0], "http://one", [[1, 2], [3]]), (found[1], "http://two", [[2, 1], [4]])):
        changed(folder, engine={"servers": [{"url": url, "greedy": ids}]})


@broken(r"differ in onset_openings: .* in .*, \[\[1, 2, 3\]\] in")
def other_openings(found: list[Path]) -> None:
    changed(found[1], onset_openings=[[1, 2, 3]])


@broken(r"kl.jsonl \(shard 2/3\) holds 1 whole lines and not the 2 that it was finished with")
def lost_profile(found: list[Path]) -> None:
    cut(found[1] / "kl.jsonl", 1)


@broken(r"onset.jsonl \(shard 1/3\) holds 0 whole lines")
def lost_file(found: list[Path]) -> None:
    (found[0] / "onset.jsonl").unlink()


@broken("prompt_id=.* comes twice in the shards' completions.jsonl")
def doubled_line(found: list[Path]) -> None:
    doubled(found[1])


@broken("completions.jsonl, line 1: .*delete that line and run that shard's audit again")
def garbled_line(found: list[Path]) -> None:
    garbled(found[1] / "completions.jsonl")


@broken("suffixes.jsonl and .* differ; every shard needs the same")
def other_suffixes(found: list[Path]) -> None:
    path = found[1] / "suffixes.jsonl"
    path.write_bytes(path.read_bytes().replace(b"now", b"then"))


@broken("prompt_id=.* comes twice in the shards' [a-z]+.jsonl")
def another_part_under_the_same_number(found: list[Path]) -> None:
    shutil.rmtree(found[1])
    shutil.copytree(found[0], found[1])
    changed(found[1], shard__index=2)


@pytest.mark.parametrize("name", sorted(BROKEN))
def test_what_is_not_merged(name: str, copies: list[Path], tmp_path: Path, mistake: Any) -> None:
    change, told = BROKEN[name]
    change(copies)
    line = mistake("merge", *copies, "--output", tmp_path / "merged")
    assert re.search(told, line), line
    assert not list((tmp_path / "merged").glob("metrics*"))


def test_a_completion_that_is_missing_is_named(copies: list[Path], tmp_path: Path, mistake: Any) -> None:
    path = copies[1] / "completions.jsonl"
    kept = path.read_bytes().splitlines(keepends=True)
    cut(path, len(kept) - 3)
    finished = json.loads((copies[1] / "manifest.json").read_bytes())["shard"]["finished"]
    changed(copies[1], shard__finished={**finished, "completions.jsonl": len(kept) - 3})
    line = mistake("merge", *copies, "--output", tmp_path / "merged")
    lost = json.loads(kept[-1])
    assert f"(shard 2/3) lacks 3 of {len(kept)} attempts, such as prompt_id=" in line
    assert "run its audit again" in line
    assert lost["prompt_id"]


def test_only_shards_are_merged_and_only_into_their_own_run(
    copies: list[Path], straight: Path, tmp_path: Path, mistake: Any
) -> None:
    assert "is a run of its own and no shard" in mistake("merge", straight, *copies, "--output", tmp_path / "merged")
    whole = shutil.copytree(straight, tmp_path / "alone")
    assert "holds a run that was not merged from shards" in mistake("merge", *copies, "--output", whole)
    odd = copies[0].rename(tmp_path / "odd")
    assert "give --output DIR" in mistake("merge", odd, *copies[1:])


def test_a_folder_belongs_to_its_shard(shards: list[Path], everything: dict[str, Any], tmp_path: Path) -> None:
    shutil.copytree(shards[0], tmp_path / "whole-shard-2-of-3")
    config = AuditConfig(**everything, output=tmp_path / "whole", shard="2/3")
    with pytest.raises(deepalign.UserError, match="holds a run with shard='1/3', not '2/3'"):
        deepalign.audit(config)
    shutil.copytree(shards[1], tmp_path / "other-shard-2-of-3")
    with pytest.raises(deepalign.UserError, match="holds a run with seed=0, not 1"):
        deepalign.audit(AuditConfig(**{**everything, "seed": 1}, output=tmp_path / "other", shard="2/3"))


def test_more_shards_than_prompts_and_a_search_in_shards(settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(deepalign.UserError, match="there are only 6 prompts; give at most 6 shards"):
        deepalign.audit(AuditConfig(**settings, output=tmp_path / "run", shard="1/7"))
    with pytest.raises(deepalign.UserError, match=r"one suffix for all shards.*--suffix FILE"):
        deepalign.audit(AuditConfig(**{**settings, "probes": ("suffix",)}, output=tmp_path / "run", shard="1/2"))
