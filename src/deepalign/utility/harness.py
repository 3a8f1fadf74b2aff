"""Finding tasks in lm-evaluation-harness, giving them local data, and running one of them on a model.

The harness is the `utility` extra. Its index of all tasks takes seconds and is read only where a name is not built in.
Nothing is seeded for good: examples are drawn by the task's own generator, sampled answers under a forked one.
"""

from __future__ import annotations

import difflib
import importlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from deepalign.errors import UserError, first_line
from deepalign.generation import evaluation_mode
from deepalign.models import LoadedModel
from deepalign.utility.catalogue import TASKS

INSTALL = "pip install 'deepalign[utility]'"
_BUILTIN = Path(str(resources.files("deepalign.utility"))) / "tasks"

logger = logging.getLogger("deepalign")


@dataclass(frozen=True, kw_only=True, slots=True)
class Leaf:
    """One task that is run by itself, and what a group of it changes."""

    name: str
    overrides: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """One name that the user gave: the tasks behind it, and how they become one number."""

    name: str
    leaves: tuple[Leaf, ...]
    is_group: bool
    metric: str | None = None
    filter: str | None = None
    by_size: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Way:
    """How items are asked."""

    chat: bool
    system_prompt: str | None
    num_fewshot: int | None
    limit: int | None
    seed: int
    run_code: bool


class Tasks:
    """The tasks of the harness, ours, and those of the user's folder."""

    def __init__(self, names: Sequence[str], folder: Path | None = None) -> None:
        """Index what is needed for some names.

        Raises:
            UserError: The harness is not installed, or the folder is none.
        """
        if folder is not None and not folder.is_dir():
            raise UserError(f"--task-folder {folder} is no folder; give one with lm-eval task files (YAML)")
        paths = [str(_BUILTIN), *([str(folder)] if folder else [])]
        manager = _manager()
        self._manager = manager(include_path=paths, include_defaults=False)
        wanted = [TASKS[name].task if name in TASKS else name for name in names]
        if any(name not in self._manager.task_index for name in wanted):
            self._manager = manager(include_path=paths)

    def asked(self, name: str) -> Asked:
        """The tasks behind a name.

        Raises:
            UserError: There is no such task.
        """
        known = TASKS.get(name)
        task = known.task if known else name
        index = self._manager.task_index
        if task not in index:
            near = difflib.get_close_matches(name, [*TASKS, *index], n=4, cutoff=0.5)
            meant = f"; did you mean {', '.join(near)}?" if near else "; see `deepalign list tasks`"
            raise UserError(f"no task {name!r} in the harness{meant}")
        leaves = tuple({leaf.name: leaf for leaf in self._leaves(task, {})}.values())
        config = index[task].cfg or {}
        rules = config.get("aggregate_metric_list") or [{}]
        rule = rules[0] if isinstance(rules, list) else rules
        is_group = "group" in config or index[task].yaml_path is None
        return Asked(
            name=name,
            leaves=leaves,
            is_group=is_group,
            metric=known.metric if known else rule.get("metric") if is_group else None,
            filter=known.filter if known else None,
            by_size=rule.get("weight_by_size", True),
        )

    def _leaves(self, name: str, overrides: Mapping[str, Any]) -> Iterator[Leaf]:
        entry = self._manager.task_index.get(name)
        if entry is None:
            return
        if entry.yaml_path is None and entry.tags:
            for tagged in sorted(entry.tags):
                yield from self._leaves(tagged, overrides)
        elif entry.cfg and "group" in entry.cfg:
            yield from self._members(entry.cfg, overrides)
        else:
            yield Leaf(name=name, overrides=overrides)

    def _members(self, group: Mapping[str, Any], overrides: Mapping[str, Any]) -> Iterator[Leaf]:
        members = group.get("task") or []
        for member in [members] if isinstance(members, str) else members:
            if isinstance(member, str):
                yield from self._leaves(member, overrides)
            elif "group" in member and member["group"] not in self._manager.task_index:
                yield from self._members(member, overrides)
            else:
                more = {key: value for key, value in member.items() if key not in ("group", "task")}
                yield from self._leaves(member.get("group") or member["task"], {**overrides, **more})

    def build(self, leaf: Leaf, data: Path | None, way: Way) -> Any:
        """The task of a leaf with its data, read from a local path where one is given.

        Raises:
            UserError: The data cannot be had or does not fit, a library of the task's is missing, or it runs code.
        """
        config = self._config(leaf)
        if config.get("unsafe_code") and not way.run_code:
            raise UserError(f"{leaf.name} runs code that the model wrote; allow it with --run-code, or leave it out")
        overrides = dict(leaf.overrides)
        if data is not None:
            overrides |= {"custom_dataset": _local(leaf.name, data, config, way), "dataset_kwargs": None}
        try:
            member = {"task": leaf.name, **overrides}
            built = self._manager.load({"group": "deepalign", "task": [member]})["tasks"]
        except UserError:
            raise
        except Exception as error:
            raise UserError(_why_not(leaf.name, config, data, error)) from error
        (task,) = built.values()
        if not len(task.eval_docs):
            raise UserError(f"{leaf.name} has no items; {_local_remedy(leaf.name)}")
        _set_examples(task, way)
        _check_items(leaf.name, task, data, way.limit)
        return task

    def _config(self, leaf: Leaf) -> dict[str, Any]:
        return {**(self._manager.task_index[leaf.name].cfg or {}), **leaf.overrides}


def run_task(model: Any, loaded: LoadedModel, name: str, task: Any, way: Way) -> Any:
    """Evaluate one task: the harness's results, with every sample."""
    evaluator = importlib.import_module("lm_eval.evaluator")
    devices = [loaded.device] if loaded.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), evaluation_mode(loaded.model), torch.inference_mode():
        torch.manual_seed(way.seed)
        return evaluator.evaluate(
            lm=model,
            task_dict={"tasks": {name: task}},
            limit=way.limit,
            bootstrap_iters=0,
            log_samples=True,
            system_instruction=way.system_prompt,
            apply_chat_template=way.chat,
            fewshot_as_multiturn=way.chat,
            confirm_run_unsafe_code=way.run_code,
        )


def _manager() -> Any:
    try:
        return importlib.import_module("lm_eval.tasks").TaskManager
    except ImportError as error:
        raise UserError(f"utility needs lm-evaluation-harness: {INSTALL}") from error


def _local(name: str, data: Path, config: Mapping[str, Any], way: Way) -> Any:
    """What the harness calls for a task's data: reads the user's files."""
    rows = importlib.import_module("deepalign.utility.rows")
    examples = config.get("fewshot_config") or {}
    tested = config.get("test_split") or config.get("validation_split") or config.get("training_split")
    fewshot = config.get("fewshot_split") or (examples.get("split") if isinstance(examples, Mapping) else None)
    wanted = way.num_fewshot if way.num_fewshot is not None else config.get("num_fewshot") or 0
    splits = [config.get(f"{split}_split") for split in ("training", "validation", "test")]

    def load(**_: Any) -> Any:
        found = rows.local_splits(data, config.get("dataset_name"), tested, fewshot)
        shown = fewshot or next((split for split in splits if split and split != tested), tested)
        if wanted and shown not in found and not examples.get("samples"):
            raise UserError(
                f"{name} shows {wanted} examples of the split {shown!r}, which {data} does not have; give a folder "
                f"with {shown}* and {tested}* files, or --num-fewshot 0"
            )
        # A split that nothing is taken from has to be there all the same.
        empty = found[tested].select([])
        return {split: found.get(split, empty) for split in {tested, fewshot, *splits} if split}

    return load


def _set_examples(task: Any, way: Way) -> None:
    # As the harness's `simple_evaluate`, which also seeds global generators: a task that fixes 0 keeps it.
    own = task.get_config("num_fewshot")
    if own is None or (way.num_fewshot is not None and own != 0):
        task.set_config(key="num_fewshot", value=way.num_fewshot or 0)
    task.set_fewshot_seed(seed=way.seed)


def _check_items(name: str, task: Any, data: Path | None, limit: int | None) -> None:
    """Render every item of local data, so that a bad row is told before a model is loaded."""
    if data is None:
        return
    for number, doc in enumerate(task.eval_docs, start=1):
        if limit is not None and number > limit:
            return
        try:
            task.doc_to_text(doc)
            target = task.doc_to_target(doc)
            choices = task.doc_to_choice(doc) if task.config.doc_to_choice is not None else None
        except Exception as error:
            raise UserError(f"{data}, row {number} does not fit {name}: {first_line(error)}; mend it") from error
        if choices is not None and isinstance(target, int) and not 0 <= target < len(choices):
            raise UserError(f"{data}, row {number}: answer {target} is none of its {len(choices)} choices; mend it")


def _why_not(name: str, config: Mapping[str, Any], data: Path | None, error: Exception) -> str:
    """One line on why a task could not be made, with its remedy."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UserError):
            return str(cause)
        if isinstance(cause, ModuleNotFoundError):
            extra = next((one for one in ("ifeval", "math") if one in name), None)
            command = f"pip install 'lm-eval[{extra}]'" if extra else f"pip install {cause.name}"
            return f"{name} needs the library {cause.name}: {command}"
        cause = cause.__cause__ or cause.__context__
    if data is not None:
        return (
            f"{data} does not fit {name} ({first_line(error)}); its rows need the columns of "
            f"{config.get('dataset_path') or name}"
        )
    return (
        f"{name}: its data set {config.get('dataset_path') or 'of its own'} could not be had "
        f"({type(error).__name__}: {first_line(error)}); {_local_remedy(name)}"
    )


def _local_remedy(name: str) -> str:
    return f"give a local copy with --task-data {name}=FILE_OR_FOLDER"
