"""What a model is still good for: each task once, on the loaded model, its samples and numbers kept as it finishes."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import logging
import re
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from deepalign.batching import is_out_of_memory
from deepalign.chat import PLAIN_TEMPLATE, ChatTemplate
from deepalign.config import settings_of
from deepalign.config_utility import UtilityConfig
from deepalign.errors import UserError, first_line
from deepalign.models import LoadedModel, load_model
from deepalign.progress import Progress, silent
from deepalign.runs import RunFolder, RunResult, named_folder
from deepalign.utility.catalogue import COUNTED_APART, TASKS
from deepalign.utility.harness import Asked, Leaf, Tasks, Way, run_task
from deepalign.utility.scores import FinishedTask, task_scores, with_main_first
from deepalign.utility.summary import overall, task_row
from deepalign.workflows.models import model_card
from deepalign.workflows.reporting import write_section

FINISHED, SAMPLES = "tasks.jsonl", "samples"
_NO_TEMPLATE = "none"

logger = logging.getLogger("deepalign")


def measure_utility(config: UtilityConfig, progress: Progress = silent) -> RunResult:
    """Run tasks of lm-evaluation-harness on a model; the same settings go on where an earlier run stopped.

    Raises:
        UserError: A task, its data, or the model cannot be used; one line with the remedy.
    """
    names = list(dict.fromkeys(config.tasks))
    data = config.local_data()
    tasks = Tasks(names, config.task_folder)
    asked = [tasks.asked(name) for name in names]
    _check_data(data, asked)
    binding = settings_of(config, ("output", "batch"))
    run = RunFolder(config.output or named_folder(config.model, binding, "utility"))
    way = Way(
        chat=False,
        system_prompt=config.system_prompt,
        num_fewshot=config.num_fewshot,
        limit=config.limit,
        seed=config.seed,
        run_code=config.run_code,
    )
    todo = [leaf for one in asked for leaf in one.leaves if leaf.name not in _finished(run)]
    built = _built(tasks, todo, asked, data, way, progress)
    loaded = _load(config, progress)
    way = dataclasses.replace(way, chat=_asks_as_chat(config, loaded))
    with run.writing():
        _claim(run, config, binding, data, loaded, way)
        logger.info("run folder %s", run.path)
        logger.info("asked %s", _asked_words(loaded, way))
        _run_all(run, loaded, built, data, asked, way, config.batch, progress)
        section = _section(run, config, loaded, asked, way)
        found = write_section(run, section, [config.model], "none", redact=True)
        return RunResult(run=run.path, metrics=found)


def _finished(run: RunFolder) -> dict[str, FinishedTask]:
    """The tasks that have their numbers; a failed one is tried again."""
    return {one.task: one for one in run.records(FINISHED, FinishedTask) if not one.failed}


def _check_data(data: Mapping[str, Path], asked: Sequence[Asked]) -> None:
    for name, path in data.items():
        one = next((one for one in asked if name in (one.name, *(leaf.name for leaf in one.leaves))), None)
        if one is None:
            known = ", ".join(one.name for one in asked)
            raise UserError(f"--task-data {name}={path} is for no task that is asked; there are {known}")
        if not path.exists():
            raise UserError(f"--task-data {name}={path}: there is no such file or folder")
        if one.name == name and len(one.leaves) > 1 and path.is_file():
            raise UserError(
                f"--task-data {name}={path} is one file, but {name} has {len(one.leaves)} tasks; give a folder with a "
                f"subfolder or file for each, or name one task, such as {one.leaves[0].name}={path}"
            )


def _built(
    tasks: Tasks, todo: Sequence[Leaf], asked: Sequence[Asked], data: Mapping[str, Path], way: Way, progress: Progress
) -> dict[str, Any]:
    """Every task that is to be run, with its data: what cannot be had is told before a model is loaded."""
    built: dict[str, Any] = {}
    for leaf in todo:
        progress("reading tasks", len(built), len(todo))
        if leaf.name not in built:
            built[leaf.name] = tasks.build(leaf, _data_of(leaf.name, asked, data), way)
    progress("reading tasks", len(todo), len(todo))
    return built


def _data_of(name: str, asked: Sequence[Asked], data: Mapping[str, Path]) -> Path | None:
    groups = [one.name for one in asked if name in (leaf.name for leaf in one.leaves)]
    return next((data[one] for one in (name, *groups) if one in data), None)


def _load(config: UtilityConfig, progress: Progress) -> LoadedModel:
    progress("loading model", 0, 1)
    loaded = load_model(
        config.model,
        revision=config.revision,
        dtype=config.dtype,
        device=config.device,
        quantize=config.quantize,
        chat_template=config.chat_template,
        adapter_base=config.adapter_base,
        # A base model has none; it is then asked as text.
        fallback_template=ChatTemplate(text=PLAIN_TEMPLATE, source=_NO_TEMPLATE),
    )
    progress("loading model", 1, 1)
    return loaded


def _asks_as_chat(config: UtilityConfig, loaded: LoadedModel) -> bool:
    has_template = loaded.template.source != _NO_TEMPLATE
    if config.ask_as == "chat" and not has_template:
        raise UserError(f"{config.model} has no chat template; give --chat-template, or --ask-as text")
    return has_template if config.ask_as == "auto" else config.ask_as == "chat"


def _asked_words(loaded: LoadedModel, way: Way) -> str:
    return f"through the chat template ({loaded.template.source})" if way.chat else "as bare text, without a template"


def _claim(
    run: RunFolder,
    config: UtilityConfig,
    binding: Mapping[str, Any],
    data: Mapping[str, Path],
    loaded: LoadedModel,
    way: Way,
) -> None:
    hashes: dict[str, str] = {}
    if data:
        rows = importlib.import_module("deepalign.utility.rows")
        hashes = {f"data_hash_{name}": rows.local_hash(path) for name, path in data.items()}
    run.claim(
        dict(binding) | hashes | {"model_fingerprint": loaded.fingerprint},
        {
            "command": "utility",
            "models": {"target": model_card(loaded)},
            "asked": _asked_words(loaded, way),
            "lm_eval": metadata.version("lm_eval"),
        },
    )


def _run_all(
    run: RunFolder,
    loaded: LoadedModel,
    built: Mapping[str, Any],
    data: Mapping[str, Path],
    asked: Sequence[Asked],
    way: Way,
    batch: int,
    progress: Progress,
) -> None:
    (run / SAMPLES).mkdir(exist_ok=True)
    with run.appender(FINISHED) as out:
        for name, task in built.items():
            started = time.monotonic()
            one = next(one for one in asked if name in (leaf.name for leaf in one.leaves))
            path = _data_of(name, asked, data)
            found = _run_one(run, loaded, name, task, one, way, batch, progress)
            out.append([
                dataclasses.replace(
                    found,
                    source=str(path) if path else _source(task),
                    seconds=round(time.monotonic() - started, 1),
                )
            ])  # fmt: skip
            if found.failed:
                logger.warning("%s failed: %s", name, found.failed)


def _run_one(
    run: RunFolder,
    loaded: LoadedModel,
    name: str,
    task: Any,
    asked: Asked,
    way: Way,
    batch: int,
    progress: Progress,
) -> FinishedTask:
    """One task; smaller batches where memory does not hold them, and a failure as data."""
    held = importlib.import_module("deepalign.utility.language_model").HeldModel
    model, reason = None, ""
    result: Any = None
    while batch and result is None:
        try:
            model = held(loaded, batch)
            model.follow(name, progress)
            result = run_task(model, loaded, name, task, way)
        except UserError:
            raise
        except Exception as error:
            # Tasks are other people's code on any model: one that fails is told, and the others go on.
            reason = f"{type(error).__name__}: {first_line(error)}"
            batch = batch // 2 if is_out_of_memory(error) else 0
    available = len(task.eval_docs)
    kept = FinishedTask(
        task=name,
        version=str(task.VERSION),
        source="",
        data_hash="",
        num_fewshot=task.get_config("num_fewshot") or 0,
        num_items=min(available, way.limit or available),
        num_available=available,
        failed=reason,
    )
    if result is None:
        return kept
    samples = result["samples"][name]
    run.write_text(f"{SAMPLES}/{_file_name(name)}.jsonl", "".join(_as_line(sample) for sample in samples))
    scores = task_scores(samples, task.aggregation(), task.higher_is_better(), COUNTED_APART)
    hashes = sorted({(sample["doc_id"], sample["doc_hash"]) for sample in samples})
    return dataclasses.replace(
        kept,
        failed="",
        data_hash=hashlib.sha256(json.dumps(hashes).encode()).hexdigest()[:16],
        num_items=len(hashes),
        scores=tuple(with_main_first(scores, asked.metric or _own_metric(name), asked.filter)),
        num_cut=model.num_cut if model is not None else 0,
    )


def _own_metric(name: str) -> str | None:
    return next((one.metric for one in TASKS.values() if one.task == name), None)


def _source(task: Any) -> str:
    path, subset = task.get_config("dataset_path"), task.get_config("dataset_name")
    return f"hub: {path}{f' ({subset})' if subset else ''}" if path else "built in"


def _file_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name)


def _as_line(sample: Mapping[str, Any]) -> str:
    return json.dumps(sample, ensure_ascii=False, default=str, separators=(",", ":")) + "\n"


def _section(
    run: RunFolder, config: UtilityConfig, loaded: LoadedModel, asked: Sequence[Asked], way: Way
) -> dict[str, Any]:
    last = {one.task: one for one in run.records(FINISHED, FinishedTask)}
    rows = [task_row(one, [last[leaf.name] for leaf in one.leaves if leaf.name in last]) for one in asked]
    return {
        "models": run.manifest["models"],
        "utility": {
            "asked_as": "chat" if way.chat else "text",
            "asked": _asked_words(loaded, way),
            "system_prompt": config.system_prompt,
            "limit": config.limit,
            "lm_eval": run.manifest["lm_eval"],
            "tasks": rows,
            "overall": overall(rows),
        },
    }
