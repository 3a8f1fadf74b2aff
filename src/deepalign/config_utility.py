"""Settings of what a model is still good for, in the manner of `config.py`; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from deepalign.config_run import Whole, at_least
from deepalign.errors import UserError

DEFAULT_TASKS = ("knowledge", "arithmetic", "extraction", "instructions")


@dataclass(frozen=True, kw_only=True, slots=True)
class UtilityConfig:
    """Measure what a model is good for: tasks of lm-evaluation-harness, on the hub's data, on yours, or on ours."""

    model: str = field(kw_only=False)
    """Model: hub id, local folder, PEFT adapter folder, GGUF file, or a testbed name."""

    tasks: Annotated[tuple[str, ...], Parameter(name=("--task", "--tasks"))] = DEFAULT_TASKS
    """Built-in tasks, usual names (mmlu, bbh, math, gsm8k, humaneval, ifeval), or any task or group of lm-eval."""

    task_data: tuple[str, ...] = ()
    """NAME=PATH: a task's data from a local JSON, CSV or parquet file, or a folder of them, in the task's columns."""

    task_folder: Path | None = None
    """Folder with lm-eval task files (YAML) of your own; their functions are run."""

    output: Path | None = None
    """Run folder; default one under runs/, which is printed. The same command resumes it."""

    limit: Whole | None = None
    """Use only the first so many items of each task; a group counts each of its tasks."""

    num_fewshot: Whole | None = None
    """Worked examples before each item; default the task's own number."""

    ask_as: Literal["auto", "chat", "text"] = "auto"
    """Ask through the chat template or as bare text; auto is chat where the model has a template."""

    system_prompt: str | None = None
    """System prompt; default none. With --ask-as text it stands before the item."""

    run_code: bool = False
    """Let tasks such as humaneval run code that the model wrote, in a process of its own with limits."""

    batch: Whole = 32
    """Most sequences at a time; less is taken where memory asks for it."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Weights; auto is bfloat16 where the hardware is fast at it."""

    device: str = "auto"
    """Where to run: auto, cpu, cuda, cuda:1, mps; sharded spreads a large model over all GPUs, then the CPU."""

    quantize: Literal["none", "8bit", "4bit"] = "none"
    """Bits to which weights are rounded while loading; needs bitsandbytes."""

    chat_template: str | None = None
    """Jinja file with a chat template, or `plain`; default the model's own."""

    revision: str | None = None
    """Branch, tag or commit of the model on the hub."""

    adapter_base: str | None = None
    """Model that an adapter sits on, where its own record is wrong."""

    seed: Whole = 0
    """Seed of drawn examples and of sampled answers."""

    def __post_init__(self) -> None:
        """Refuse values that cannot be meant."""
        if not self.tasks:
            raise UserError("--tasks is empty; leave it out for the built-in ones, or see `deepalign list tasks`")
        for option in ("limit", "batch"):
            if getattr(self, option) is not None:
                at_least(option, getattr(self, option), 1)
        if self.num_fewshot is not None:
            at_least("num-fewshot", self.num_fewshot, 0)
        at_least("seed", self.seed, 0)
        self.local_data()
        if self.ask_as == "text" and self.chat_template is not None:
            raise UserError("--ask-as text asks without a template; leave out --chat-template, or ask as chat")

    def local_data(self) -> dict[str, Path]:
        """The paths of --task-data by the name of their task.

        Raises:
            UserError: One is not NAME=PATH, or a name stands twice.
        """
        found: dict[str, Path] = {}
        for given in self.task_data:
            name, mark, path = given.partition("=")
            if not (name and mark and path):
                raise UserError(f"--task-data {given!r} is not NAME=PATH, such as gsm8k=test.jsonl")
            if name in found:
                raise UserError(f"--task-data names {name} twice; give each task one file or folder")
            found[name] = Path(path).expanduser()
        return found


@dataclass(frozen=True, kw_only=True, slots=True)
class WinrateConfig:
    """Let a judge choose between a model's answers and a reference's, in both orders (in place of AlpacaEval)."""

    model: str = field(kw_only=False)
    """Model: hub id, local folder, PEFT adapter folder, GGUF file, or a testbed name."""

    against: str = ""
    """The reference: another model, or a JSON file of its answers (prompt or instruction, and answer or output)."""

    judge_url: str = ""
    """Address of an OpenAI-compatible server, such as http://127.0.0.1:8080/v1; default OPENAI_BASE_URL."""

    judge_model: str = ""
    """Name of the judging model there; default the one that the server lists."""

    judge_key_env: str = "OPENAI_API_KEY"
    """Name of the environment variable that holds the key."""

    prompts: str = "benign"
    """Harmless prompts: a built-in set, or a CSV, JSONL or text file."""

    limit: Whole | None = None
    """Use only this many prompts, spread evenly over the categories."""

    max_new_tokens: Whole = 256
    """Most tokens of an answer."""

    output: Path | None = None
    """Run folder; default one under runs/, which is printed. The same command resumes it."""

    system_prompt: str | None = None
    """System prompt of both models; default none."""

    chat_template: str | None = None
    """Jinja file with a chat template, or `plain`; default each model's own."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Weights; auto is bfloat16 where the hardware is fast at it."""

    device: str = "auto"
    """Where to run: auto, cpu, cuda, cuda:1, mps; sharded spreads a large model over all GPUs, then the CPU."""

    quantize: Literal["none", "8bit", "4bit"] = "none"
    """Bits to which weights are rounded while loading; needs bitsandbytes."""

    max_batch: Whole = 160
    """Most sequences at a time; less is taken where memory asks for it."""

    concurrency: Whole = 16
    """Calls of the judge at a time."""

    def __post_init__(self) -> None:
        """Refuse values that cannot be meant."""
        if not self.against:
            raise UserError("--against is missing; give a reference model, or a JSON file of its answers")
        if self.against == self.model:
            raise UserError(f"--against {self.against} is the model itself; give another")
        for option in ("max-new-tokens", "max-batch", "concurrency"):
            at_least(option, getattr(self, option.replace("-", "_")), 1)
        if self.limit is not None:
            at_least("limit", self.limit, 1)
