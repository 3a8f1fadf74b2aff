"""`utility` on a tiny model: the harness's own numbers, resumed, on local data, and one line for each mistake."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import deepalign
from deepalign.errors import UserError
from deepalign.report.page import render_page
from deepalign.utility import harness
from deepalign.utility.harness import Tasks
from deepalign.utility.scores import FinishedTask
from deepalign.utility.tasks.functions import score_code
from deepalign.workflows import utility as workflow

GROUP = """group: pair
task:
  - {0}_one
  - {0}_two
aggregate_metric_list:
  - metric: acc
    weight_by_size: true
"""
CHOICE = """task: {name}
dataset_path: nobody/nothing
dataset_name: {subset}
output_type: multiple_choice
test_split: test
fewshot_split: train
doc_to_text: "Question: {{{{q}}}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 3.0
"""
ROWS = [{"q": f"Is it {number}?", "choices": ["one", "two", "bread"], "answer": number % 3} for number in range(7)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Tasks and data of a stranger's: a group of two multiple-choice tasks, in the hub's layout."""
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "pair.yaml").write_text(GROUP.format("choice"), encoding="utf-8")
    for name, rows in (("one", ROWS[:5]), ("two", ROWS[5:])):
        (tasks / f"{name}.yaml").write_text(CHOICE.format(name=f"choice_{name}", subset=name), encoding="utf-8")
        data = tmp_path / "data" / name
        data.mkdir(parents=True)
        (data / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        (data / "train.jsonl").write_text(json.dumps(ROWS[0]) + "\n", encoding="utf-8")
    return tmp_path


@pytest.fixture
def settings(folder: Path, tiny_model_folder: Callable[..., Path]) -> dict[str, Any]:
    return {
        "model": str(tiny_model_folder("model", max_position_embeddings=1024)),
        "tasks": ("pair",),
        "task_folder": folder / "tasks",
        "task_data": (f"pair={folder / 'data'}",),
        "dtype": "float32",
        "device": "cpu",
        "batch": 4,
        "output": folder / "run",
    }


def run(settings: dict[str, Any], **changes: Any) -> deepalign.RunResult:
    return deepalign.measure_utility(deepalign.UtilityConfig(**{**settings, **changes}))


def samples(run_folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_folder / "samples" / f"{name}.jsonl").read_text().splitlines()]


def test_the_number_is_the_textbooks_and_a_group_is_its_tasks(settings: dict[str, Any]) -> None:
    result = run(settings)
    (row,) = result.metrics["utility"]["tasks"]
    loaded = deepalign.load_model(settings["model"], dtype="float32", device="cpu")
    right = 0
    for item in ROWS:
        turns = [{"role": "user", "content": f"Question: {item['q']}\nAnswer:"}]
        start = loaded.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False).rstrip("\n")
        totals = []
        for choice in item["choices"]:
            before = loaded.tokenizer(start, add_special_tokens=False)["input_ids"]
            ids = loaded.tokenizer(f"{start}\n{choice}", add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logps_TV = loaded.model(torch.tensor([ids])).logits[0].log_softmax(dim=-1)
            totals.append(sum(float(logps_TV[place - 1, ids[place]]) for place in range(len(before), len(ids))))
        right += totals.index(max(totals)) == item["answer"]
    assert (row["score"]["numerator"], row["score"]["denominator"]) == (right, 7)
    assert row["score"]["chance"] == pytest.approx(1 / 3)
    assert (row["num_items"], row["num_available"], row["version"]) == (7, 7, ["3.0"])
    assert [len(samples(result.run, f"choice_{name}")) for name in ("one", "two")] == [5, 2]
    assert result.metrics["utility"]["asked_as"] == "chat"
    manifest = json.loads((result.run / "manifest.json").read_text())
    assert manifest["lm_eval"] == "0.4.13"
    assert manifest["models"]["target"]["fingerprint"] == loaded.fingerprint
    assert manifest["config"]["data_hash_pair"]


def test_a_killed_run_goes_on_and_asks_no_finished_task_again(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    straight = workflow.run_task

    def counting(model: Any, loaded: Any, name: str, task: Any, way: Any) -> Any:
        asked.append(name)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return straight(model, loaded, name, task, way)

    monkeypatch.setattr(workflow, "run_task", counting)
    with pytest.raises(KeyboardInterrupt):
        run(settings)
    resumed = run(settings).metrics["utility"]["tasks"]
    assert asked == ["choice_one", "choice_two", "choice_two"]
    monkeypatch.undo()
    assert run(settings, output=settings["output"].with_name("straight")).metrics["utility"]["tasks"] == resumed


def test_a_failure_is_told_and_not_a_score(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    straight, batches = workflow.run_task, []

    def failing(model: Any, loaded: Any, name: str, task: Any, way: Any) -> Any:
        batches.append(model.batch_size)
        if name == "choice_one":
            raise torch.OutOfMemoryError("out of memory")
        return straight(model, loaded, name, task, way)

    monkeypatch.setattr(workflow, "run_task", failing)
    result = run(settings)
    (row,) = result.metrics["utility"]["tasks"]
    assert batches == [4, 2, 1, 4], "smaller batches were tried first"
    assert (row["num_failed"], row["score"]["denominator"]) == (1, 2)
    assert row["failed"] == "choice_one: OutOfMemoryError: out of memory"
    assert result.metrics["utility"]["overall"] is None, "a group with a hole is in no mean"
    assert "choice_one: OutOfMemoryError" in (result.run / "report.html").read_text()
    monkeypatch.undo()
    assert run(settings).metrics["utility"]["tasks"][0]["num_failed"] == 0, "the same command tries it again"


def test_built_in_tasks_run_and_the_report_shows_them(settings: dict[str, Any]) -> None:
    changes = {"tasks": ("extraction", "instructions", "knowledge"), "task_data": (), "limit": 2}
    result = run(settings, **changes)
    rows = {row["task"]: row for row in result.metrics["utility"]["tasks"]}
    assert [row["score"]["denominator"] for row in rows.values()] == [2, 2, 2]
    assert rows["knowledge"]["metric"] == "acc_norm"
    assert rows["instructions"]["metric"] == "all_kept"
    page = render_page([result.metrics], [])
    assert "What is" in page
    assert "Utility by task" in page
    assert "extraction" in page
    assert "<strong>The judge</strong>" not in page, "nothing was judged"


def test_neither_the_model_nor_its_tokenizer_is_changed(
    folder: Path, tiny_llama: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    from deepalign.models import from_objects
    from deepalign.utility.language_model import HeldModel

    model = tiny_llama().train()
    tiny_tokenizer.padding_side, tiny_tokenizer.pad_token = "right", None
    loaded = from_objects(model, tiny_tokenizer, name="mine")
    tasks = Tasks(["choice_one"], folder / "tasks")
    way = workflow.Way(chat=True, system_prompt=None, num_fewshot=1, limit=None, seed=0, run_code=False)
    task = tasks.build(tasks.asked("choice_one").leaves[0], folder / "data", way)
    before = torch.random.get_rng_state()
    seen = []
    held = HeldModel(loaded, 2)
    held.follow("choice_one", lambda stage, done, total: seen.append((stage, done, total)))
    workflow.run_task(held, loaded, "choice_one", task, way)
    assert model.training
    assert (tiny_tokenizer.padding_side, tiny_tokenizer.pad_token) == ("right", None)
    assert torch.equal(before, torch.random.get_rng_state())
    assert seen[-1] == ("choice_one", 15, 15)


def test_a_model_without_a_template_is_asked_as_text(
    settings: dict[str, Any], tiny_tokenizer: Any, tiny_llama: Callable[..., Any], tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    tiny_llama(max_position_embeddings=1024).save_pretrained(bare)
    tiny_tokenizer.chat_template = None
    tiny_tokenizer.save_pretrained(bare)
    result = run(settings, model=str(bare))
    assert result.metrics["utility"]["asked"] == "as bare text, without a template"
    context = samples(result.run, "choice_one")[0]["arguments"][0][0]
    assert context == "Question: Is it 0?\nAnswer:"
    with pytest.raises(UserError, match="has no chat template"):
        run(settings, model=str(bare), ask_as="chat", output=tmp_path / "other")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"tasks": ("knowlege",)}, "no task 'knowlege' in the harness; did you mean knowledge"),
        ({"task_data": ("pair",)}, "--task-data 'pair' is not NAME=PATH"),
        ({"task_data": ("mmlu=x",)}, "--task-data mmlu=x is for no task that is asked; there are pair"),
        ({"task_data": ("pair=/nowhere",)}, "there is no such file or folder"),
        ({"num_fewshot": -1}, "--num-fewshot -1 is too small"),
        ({"tasks": ()}, "--tasks is empty"),
        ({"task_folder": Path("/nowhere")}, "--task-folder /nowhere is no folder"),
        ({"limit": 0}, "--limit 0 is too small"),
    ],
)
def test_a_mistake_is_one_line(
    settings: dict[str, Any], changes: dict[str, Any], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.tasks import TaskManager

    # The index of all tasks of the harness takes seconds; ours is enough to miss a name in.
    monkeypatch.setattr(
        harness,
        "_manager",
        lambda: (
            lambda include_path, include_defaults=True: TaskManager(include_path=include_path, include_defaults=False)
        ),
    )
    with pytest.raises(UserError, match=told):
        run(settings, **changes)


def test_rows_that_do_not_fit_are_told_by_number(settings: dict[str, Any], folder: Path) -> None:
    file = folder / "bad.jsonl"
    one = {"tasks": ("choice_one",), "task_data": (f"choice_one={file}",)}
    file.write_text(json.dumps({**ROWS[0], "answer": 0}) + "\n" + json.dumps({**ROWS[1], "answer": 9}) + "\n")
    with pytest.raises(UserError, match=r"bad.jsonl, row 2: answer 9 is none of its 3 choices"):
        run(settings, **one)
    file.write_text(json.dumps({"question": "x"}) + "\n")
    with pytest.raises(UserError, match="does not fit choice_one"):
        run(settings, **one)
    file.write_text(json.dumps(ROWS[0]) + "\n")
    with pytest.raises(UserError, match=r"shows 2 examples of the split 'train', which .* does not have"):
        run(settings, **one, num_fewshot=2)
    with pytest.raises(UserError, match="is one file, but pair has 2 tasks"):
        run(settings, task_data=(f"pair={file}",))


def test_code_is_run_with_consent_alone(settings: dict[str, Any], folder: Path) -> None:
    row = {"prompt": "def one():\n", "test": "def check(f):\n    assert f() == 1", "entry_point": "one"}
    file = folder / "code.jsonl"
    file.write_text(json.dumps({"task_id": "x/0", **row}) + "\n", encoding="utf-8")
    code = {"tasks": ("humaneval",), "task_data": (f"humaneval={file}",)}
    with pytest.raises(UserError, match="humaneval runs code that the model wrote; allow it with --run-code"):
        run(settings, **code)
    (found,) = run(settings, **code, run_code=True).metrics["utility"]["tasks"]
    assert (found["metric"], found["score"]["numerator"], found["score"]["denominator"]) == ("passed", 0, 1)
    assert score_code(row, ["    return 1\n```\nThat is it."])["passed"] == 1.0
    assert score_code(row, ["    return 2"])["passed"] == 0.0


def test_a_missing_harness_names_the_command(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(UserError, match=r"pip install 'deepalign\[utility\]'"):
        run(settings)


def test_what_is_kept_of_a_task_survives_a_round_trip(settings: dict[str, Any]) -> None:
    result = run(settings)
    lines = (result.run / "tasks.jsonl").read_text().splitlines()
    first = FinishedTask(**json.loads(lines[0]))
    assert first.main is not None
    assert first.seconds >= 0.0  # in tenths: a tiny model may take none
    assert first.data_hash
