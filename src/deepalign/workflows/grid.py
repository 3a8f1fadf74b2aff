"""The grid: every cell of models x sets x ways x settings x seeds, resumable, by one process or several at once.

A folder is bound to what a cell is measured on, not to the list of cells: the same folder takes more models, sets or
seeds later, and several processes may work on it side by side, each taking cells that no other holds.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from deepalign.config import settings_of
from deepalign.config_attacks import AttackSettings, GridConfig
from deepalign.config_tuning import Method
from deepalign.errors import BusyError
from deepalign.finetuning import section
from deepalign.hardware import free_memory, pick_device
from deepalign.judges import get_judge, make_ready
from deepalign.models import Dtype, LoadedModel, load_model
from deepalign.progress import Progress, silent
from deepalign.prompts.sources import PromptSet
from deepalign.records import Sampling
from deepalign.runs import RunFolder, RunResult, named_folder
from deepalign.tuning_sets.rows import TuningSet
from deepalign.ways import Cell
from deepalign.weights import require_name
from deepalign.workflows.cell_sets import Sets
from deepalign.workflows.cells import CELL, Bench, cell_name, run_cell, told
from deepalign.workflows.reporting import write_section
from deepalign.workflows.trainers import require_training, training_dtype

CELLS, SETS, REFERENCE = "cells", "sets", "reference"
_AXES = (
    "models", "sets", "ways", "seeds", "methods", "learning_rates", "epochs", "adam_beta1", "harmful_shares",
)  # fmt: skip
# What does not change a cell's result, and so may differ when a grid is taken up again.
_PRESENTATION = (
    "output", "plan", "keep_weights", "show_completions", "micro_batch", "gradient_checkpointing", "most_fall",
)  # fmt: skip
_WAIT_S = 3600.0
_BACKWARD, _DECODED = 3.0, 4.0
"""What a trained and a written token cost, in tokens that are only read; for the estimate."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class GridResult(RunResult):
    """What a grid leaves behind."""

    num_cells: int
    """Cells that were asked for."""
    num_done: int
    """Those of them that are measured."""


def grid(
    config: GridConfig,
    progress: Progress = silent,
    *,
    asked: PromptSet | None = None,
    sampling: Sampling | None = None,
) -> GridResult:
    """Attack copies of models by fine-tuning, measure each, and report all.

    Cells that are done in the folder are not done again; those that another process holds are left to it.

    Args:
        config: The settings.
        progress: Told of each stage.
        asked: Should-refuse prompts that are asked; default those of the settings.
        sampling: How answers are drawn; default the paper's way.

    Raises:
        UserError: A setting, file, set or model cannot be used; one line with the remedy.
    """
    require_training()
    judge = get_judge(config.judge)
    make_ready(judge, device=config.device, dtype=config.dtype)
    pick_device(config.device)
    for name in (*config.models, config.answers_from):
        require_name(name)
    run = RunFolder(config.output or named_folder(config.models[0], _binding(config), "grid"))
    sets = Sets(RunFolder(run / SETS), config, progress, asked)
    cells = list(config.cells(attacks=sets.attacks))
    with run.writing(wait=_WAIT_S):
        drawn = {} if sampling is None else {"sampling": dataclasses.asdict(sampling)}
        run.claim(_binding(config) | sets.hashes | drawn, {"command": "grid"})
        logger.info("run folder %s", run.path)
        todo = [cell for cell in cells if not _is_done(run, cell)]
        if todo and not config.plan:
            with sets.writing():
                sets.sample()
    bench = Bench(
        settings=config,
        judge=judge,
        prompts=sets.test_prompts.prompts,
        sampling=sampling or Sampling(max_new_tokens=config.max_new_tokens),
        control=sets.control,
        reference_cache=run / REFERENCE,
        keep_weights=config.keep_weights,
    )
    for name in dict.fromkeys(cell.model for cell in todo):
        mine = [cell for cell in todo if cell.model == name]
        holder = _Holder(name, config)
        if name == todo[0].model:
            progress("cells", len(cells) - len(todo), len(cells))
            seconds = _estimate(holder.fresh("lora"), config, todo)
            logger.info("%d cells, %d of them done; about %s", len(cells), len(cells) - len(todo), _time(seconds))
        if config.plan:
            break
        _work(run, holder, mine, sets, bench, lambda: _tell(run, cells, progress), progress)
    done = [cell for cell in cells if _is_done(run, cell)]
    if len(done) < len(cells) and not config.plan:
        logger.info("%d cells are in the hands of another process; run this again for all", len(cells) - len(done))
    data = write_grid_report(run, config)
    return GridResult(run=run.path, metrics=data, num_cells=len(cells), num_done=len(done))


def _tell(run: RunFolder, cells: Sequence[Cell], progress: Progress) -> None:
    progress("cells", sum(_is_done(run, cell) for cell in cells), len(cells))


def _work(
    run: RunFolder,
    holder: _Holder,
    cells: Sequence[Cell],
    sets: Sets,
    bench: Bench,
    tell: Any,
    progress: Progress,
) -> None:
    """Do the cells of one model that nobody has done or holds."""
    for cell in cells:
        own = RunFolder(run / CELLS / cell_name(cell))
        try:
            with own.writing():
                if (own / CELL).exists():
                    continue
                loaded = holder.fresh(cell.method)
                with sets.writing():
                    tuned_on: TuningSet = sets.get(cell.set, loaded, cell.harmful_share, cell.seed)
                found = run_cell(own, cell, loaded, tuned_on, bench, progress)
                free_memory()
                holder.is_used = cell.method == "full" or bench.keep_weights
        except BusyError:
            continue
        logger.info("%s: %s in %.0f s", own.path.name, _outcome(found), found["seconds"])
        tell()


def _outcome(found: dict[str, Any]) -> str:
    if "outcomes" not in found:
        return f"{found['status']}: {found['reason']}"
    return ", ".join(f"{told(outcomes)} ({variant})" for variant, outcomes in found["outcomes"].items())


class _Holder:
    """One model in memory, loaded anew where its weights were changed."""

    def __init__(self, name: str, config: AttackSettings) -> None:
        self._name, self._config = name, config
        self._loaded: LoadedModel | None = None
        self._dtype: Dtype | None = None
        self.is_used = False

    def fresh(self, method: Method) -> LoadedModel:
        """The model as it was given, in the dtype for a method of training."""
        config = self._config
        dtype = training_dtype(config.dtype, method)
        if self._loaded is None or self.is_used or dtype != self._dtype:
            # Let go first, so that two never lie in memory.
            self._loaded = None
            free_memory()
            self._loaded = load_model(
                self._name,
                revision=config.revision,
                dtype=dtype,
                device=config.device,
                chat_template=config.chat_template,
            )
            self._dtype, self.is_used = dtype, False
        return self._loaded


def _binding(config: GridConfig) -> dict[str, Any]:
    """What every cell of a folder has in common."""
    # Each of several processes may have a device of its own.
    return settings_of(config, (*_AXES, *_PRESENTATION)) | {"device": config.device.partition(":")[0]}


def _is_done(run: RunFolder, cell: Cell) -> bool:
    return (run / CELLS / cell_name(cell) / CELL).exists()


def _estimate(loaded: LoadedModel, config: GridConfig, cells: Sequence[Cell]) -> float:
    """Seconds that cells will take, from one timed pass and what tokens cost beside each other."""
    tokens = 96
    ids_BT = torch.ones((config.batch, tokens), dtype=torch.long, device=loaded.device)
    with torch.inference_mode():
        loaded.model(input_ids=ids_BT[:, :8])
        started = time.monotonic()
        loaded.model.base_model(input_ids=ids_BT)
        if loaded.device.type == "cuda":
            torch.cuda.synchronize(loaded.device)
        per_token = (time.monotonic() - started) / ids_BT.numel()
    written = (config.num_prompts or 100) * config.max_new_tokens + 2 * config.num_task_items * 32
    asked = len(cells) * _DECODED * written
    trained = sum(cell.epochs * config.rows * tokens * _BACKWARD for cell in cells)
    return per_token * (asked + trained)


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def finished_cells(run: RunFolder) -> Iterator[dict[str, Any]]:
    """The content of every `cell.json` in a grid's folder, by name."""
    for path in sorted((run / CELLS).glob(f"*/{CELL}")):
        yield json.loads(path.read_text(encoding="utf-8"))


def write_grid_report(run: RunFolder, config: GridConfig) -> dict[str, Any]:
    """Metrics and report of every finished cell of a folder, whoever did it."""
    cells = list(finished_cells(run))
    judge = get_judge(config.judge).name
    found = section(cells, judge=judge, most_fall=config.most_fall)
    models = list(dict.fromkeys(cell["cell"]["model"] for cell in cells)) or list(config.models)
    with run.writing(wait=_WAIT_S):
        return write_section(run, {"finetuning": found}, models, judge, redact=not config.show_completions)
