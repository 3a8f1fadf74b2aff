"""One audit over the processes of a launcher: two by torchrun, merged at the end; one that dies; a wait that ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import ranks_script
from test_merging import timeless

import deepalign
from conftest import options_of
from deepalign import AuditConfig
from deepalign.runs import RunFolder
from deepalign.shards import Shard
from deepalign.workflows import gathering, reporting

MANY = 64


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@pytest.fixture
def asked(settings: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """Prefills of many prompts and nothing else, drawn and not greedy, in small batches."""
    answer = Path(settings["prompts"]).read_text(encoding="utf-8").splitlines()[1].partition('"')[2].strip('"')
    rows = [f'm{number},How do I do the bad thing {number}?,fraud,"{answer}"' for number in range(MANY)]
    (tmp_path / "many.csv").write_text("\n".join(["prompt_id,text,category,answer", *rows]) + "\n", encoding="utf-8")
    kept = {name: settings[name] for name in ("model", "base", "dtype", "device", "max_new_tokens")}
    return {
        **kept,
        "prompts": str(tmp_path / "many.csv"),
        "probes": ("prefill", "kl"),
        "depths": (0, 5),
        "kl_positions": 8,
        "kl_dtype": "float32",
        "max_batch": 8,
    }


def launched(asked: dict[str, Any], output: Path, tmp_path: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_addr", "127.0.0.1"]
    command += ["--master_port", str(free_port()), ranks_script.__file__, "audit"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "agg"}
    return subprocess.Popen(
        [*command, *options_of(asked), "--output", str(output), "--shard", "auto"],
        env=environment,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def process_of(folder: Path, launcher: int) -> int:
    """The process that holds a shard's lock, by its command line and parent."""
    for found in Path("/proc").iterdir():
        if found.name.isdigit() and int(found.name) != os.getpid():
            try:
                parent = int((found / "stat").read_text().rpartition(")")[2].split()[1])
                holds = any(os.readlink(link) == str(folder / ".lock") for link in (found / "fd").iterdir())
            except OSError:
                continue
            if parent == launcher and holds:
                return int(found.name)
    raise AssertionError(f"nobody holds {folder}")


def lines_of(folder: Path) -> list[bytes]:
    path = folder / "completions.jsonl"
    data = path.read_bytes() if path.exists() else b""
    return data[: data.rfind(b"\n") + 1].splitlines()


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="finds a process by its open files")
def test_a_rank_dies_and_the_job_goes_on_when_started_again(
    asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "by-ranks"
    folders = [shard.folder(output) for shard in Shard(index=1, count=2).all()]
    with launched(asked, output, tmp_path) as job:
        deadline = time.monotonic() + 120
        while not lines_of(folders[1]):
            assert job.poll() is None, job.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(process_of(folders[1], job.pid), signal.SIGKILL)
        _, told = job.communicate(timeout=120)
        assert job.returncode != 0
    assert "stopped; what was finished is kept, and the same command goes on from there" in told
    assert not (output / "metrics.json").exists()
    kept = [lines_of(folder) for folder in folders]
    assert 0 < len(kept[1]) < MANY
    with launched(asked, output, tmp_path) as job:
        shown, told = job.communicate(timeout=240)
        assert job.returncode == 0, told
    assert "shard 2/2 is finished" in shown
    for folder, before in zip(folders, kept, strict=True):
        assert lines_of(folder)[: len(before)] == before
        assert len(lines_of(folder)) == MANY
    monkeypatch.setattr(reporting, "render_page", lambda *_, **__: "<html></html>")
    alone = deepalign.audit(AuditConfig(**asked, output=tmp_path / "alone"))
    mine, theirs = (timeless(json.loads((run / "metrics.json").read_bytes())) for run in (output, alone.run))
    for name in mine:
        if not name.startswith("kl"):
            assert mine[name] == theirs[name], name
    for row, other in zip(mine["kl"], theirs["kl"], strict=True):
        assert row["mean"] == pytest.approx(other["mean"], rel=1e-3, abs=1e-5)


@pytest.fixture
def quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathering, "_POLL_SECONDS", 0.02)
    monkeypatch.setattr(gathering, "START_SECONDS", 0.3)


@pytest.fixture
def half_done(settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The first of two shards, finished; its whole run's folder."""
    monkeypatch.setattr(reporting, "render_page", lambda *_, **__: "<html></html>")
    chosen = {**settings, "probes": ("prefill",), "depths": (0, 5)}
    deepalign.audit(AuditConfig(**chosen, output=tmp_path / "whole", shard="1/2"))
    return tmp_path / "whole"


def gather(whole: Path) -> deepalign.AuditResult:
    shard = Shard(index=1, count=2, together=True)
    return gathering.gather(whole, shard, show_completions=False, progress=lambda *_: None)


def test_a_rank_that_never_begins(half_done: Path, quick_looks: None) -> None:
    with pytest.raises(deepalign.UserError, match=r"shard 2/2 did not begin within 0 seconds.*start the same command"):
        gather(half_done)


def test_a_rank_that_ends_early(half_done: Path, quick_looks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    other = Shard(index=2, count=2).folder(half_done)
    held = iter([True, True])
    with RunFolder(other).writing():
        pass
    monkeypatch.setattr(gathering, "START_SECONDS", 30.0)
    monkeypatch.setattr(gathering, "_is_held", lambda folder: next(held, False))
    with pytest.raises(deepalign.UserError, match=r"shard 2/2 ended before it was finished; .*kept in .*shard-2-of-2"):
        gather(half_done)


def test_a_folder_is_held_by_a_process(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    with run.writing():
        assert gathering._is_held(run.path)
    assert not gathering._is_held(run.path)


def test_ranks_one_after_the_other_in_one_process(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As srun numbers them; the last one here is the first rank, so that the others are done when it looks."""
    monkeypatch.setattr(reporting, "render_page", lambda *_, **__: "<html></html>")
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_NTASKS", "2")
    config = AuditConfig(**{**settings, "probes": ("prefill",)}, output=tmp_path / "whole", shard="auto")
    found = []
    for rank in (1, 0):
        monkeypatch.setenv("SLURM_PROCID", str(rank))
        found.append(deepalign.audit(config))
    assert [result.shard for result in found] == ["2/2", None]
    assert found[1].run == tmp_path / "whole"
    assert found[1].metrics["prefill"]
