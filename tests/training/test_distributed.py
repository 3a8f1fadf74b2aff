"""Two processes do what one does: the same losses and weights on the same global batches, for each way to train."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import distributed_script
import pytest
from safetensors.torch import load_file

COMPARED = ("loss", "num_tokens", "constraint/objective", "constraint/log_ratio", "constraint/weight_early")


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@pytest.fixture(scope="module")
def by_two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Where the two processes were let loose; filled by the first test that asks."""
    return {"folder": tmp_path_factory.mktemp("given"), "out": tmp_path_factory.mktemp("two")}


@pytest.fixture
def trained_by_two(by_two: dict[str, Path], tiny_llama: Any, tiny_tokenizer: Any, make_rows: Any) -> tuple[Path, Path]:
    """Folder of the model and its rows, and the folder of the results of two processes, which run once for all."""
    folder, out = by_two["folder"], by_two["out"]
    if not (folder / "rows.json").exists():
        tiny_llama().save_pretrained(folder / "model")
        tiny_llama(3).save_pretrained(folder / "other")
        tiny_tokenizer.save_pretrained(folder / "model")
        rows = [{**row, "groups": [place % 2 for place in range(len(row["labels"]))]} for row in make_rows(13)]
        (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
        command = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_addr", "127.0.0.1"]
        command += ["--master_port", str(free_port()), distributed_script.__file__, str(folder), str(out)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        done = subprocess.run(
            [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=240, check=False
        )
        (out / "stderr.txt").write_text(done.stderr, encoding="utf-8")
    return folder, out


def results(out: Path, name: str) -> tuple[int, dict[str, list[float]], dict[str, Any]]:
    found = json.loads((out / f"{name}.json").read_text(encoding="utf-8"))
    logged = {key: [entry[key] for entry in found["logs"] if key in entry] for key in COMPARED}
    return found["world_size"], logged, load_file(out / f"{name}.safetensors")


@pytest.mark.parametrize("name", distributed_script.SCENARIOS)
def test_two_processes_train_like_one(name: str, trained_by_two: tuple[Path, Path], tmp_path: Path) -> None:
    folder, out = trained_by_two
    assert (out / f"{name}.json").exists(), (out / "stderr.txt").read_text(encoding="utf-8")[-3000:]
    distributed_script.train(name, folder, tmp_path)
    (one, alone, weights), (two, shared, others) = results(tmp_path, name), results(out, name)
    assert (one, two) == (1, 2)
    assert len(alone["loss"]) == 3
    for key in COMPARED:
        assert shared[key] == pytest.approx(alone[key], rel=1e-4, abs=1e-6), key
    assert alone["constraint/weight_early"][2] != pytest.approx(1.0, abs=1e-3)
    assert weights.keys() == others.keys()
    assert max(float((weights[key] - others[key]).abs().max()) for key in weights) < 2e-5
