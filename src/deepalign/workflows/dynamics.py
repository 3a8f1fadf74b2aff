"""One fine-tuning run, looked into at given steps (paper section 2.5, Figs. 3 and 5).

At each step: cross-entropy of the training rows by response position; the norm of each single-token loss's gradient;
KL of the tuned model from its start, on the tuned model's own answers; and how many should-refuse prompts it answers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from deepalign.chat import Rendered, render
from deepalign.config import settings_of
from deepalign.config_diagnosis import DynamicsConfig
from deepalign.depth import kl_profiles
from deepalign.errors import UserError
from deepalign.finetuning import PLAIN, rate_of, way_title
from deepalign.gradients import token_gradients
from deepalign.judges import get_judge, make_ready
from deepalign.metrics import mean_json
from deepalign.models import Dtype, LoadedModel, load_model
from deepalign.perplexity import token_losses
from deepalign.progress import Progress, silent
from deepalign.records import Attempt, Completion, Sampling
from deepalign.runs import RunFolder, RunResult, named_folder
from deepalign.training.objective import IGNORED
from deepalign.workflows.cell_sets import Sets
from deepalign.workflows.cells import Bench, cell_trainer, measured, told, tuned_model
from deepalign.workflows.models import KL_FLOAT32_LIMIT
from deepalign.workflows.reporting import write_section
from deepalign.workflows.steps import ATTEMPTS, COMPLETIONS
from deepalign.workflows.trainers import require_training, train

STEP = "step.json"

logger = logging.getLogger(__name__)


def dynamics(config: DynamicsConfig, progress: Progress = silent) -> RunResult:
    """Tune a copy of a model and measure it at the given steps; steps that are measured are not measured again.

    Raises:
        UserError: A setting, file, set or model cannot be used; one line with the remedy.
    """
    require_training()
    binding = settings_of(config, ("output", "show_completions"))
    run = RunFolder(config.output or named_folder(config.model, binding, "dynamics"))
    sets = Sets(run, config.grid, progress)
    judge = get_judge(config.judge)
    make_ready(judge, device=config.device, dtype=config.dtype)
    progress("loading models", 0, 2)
    loaded = _load(config)
    progress("loading models", 1, 2)
    start = _load(config)
    progress("loading models", 2, 2)
    with run.writing():
        run.claim(binding | sets.hashes | {"model_fingerprint": loaded.fingerprint}, {"command": "dynamics"})
        logger.info("run folder %s", run.path)
        sets.sample()
        (_, cell) = config.grid.cells(attacks=sets.attacks)
        bench = Bench(
            settings=config,
            judge=judge,
            prompts=sets.test_prompts.prompts,
            sampling=Sampling(max_new_tokens=config.max_new_tokens),
            control=None,
            reference_cache=run / "reference",
        )
        tuned_on = sets.get(config.set, loaded)
        tuned_on = dataclasses.replace(tuned_on, test=())
        trainer = cell_trainer(run, cell, loaded, tuned_on, bench)
        look = _Look(run, config, trainer, loaded, start, lambda folder, now: measured(folder, now, tuned_on, bench))
        trainer.add_callback(look.callback(progress))
        train(trainer, run, progress)
        last = trainer.state.global_step
        steps = [step for step in sorted(config.steps) if step <= last]
        if len(steps) < len(config.steps):
            logger.warning("training ended after %d steps; later ones are not measured", last)
        found = {"dynamics": _section(run, config, steps, len(look.rows))}
        data = write_section(run, found, [config.model], bench.judge.name, redact=not config.show_completions)
    return RunResult(run=run.path, metrics=data)


def _load(config: DynamicsConfig) -> LoadedModel:
    """The model in float32 unless it is large: what is measured are small differences."""
    dtype: Dtype = config.dtype
    loaded = load_model(
        config.model,
        revision=config.revision,
        dtype="float32" if dtype == "auto" else dtype,
        device=config.device,
        chat_template=config.chat_template,
    )
    if dtype == "auto" and loaded.num_parameters > KL_FLOAT32_LIMIT:
        loaded.model.to(torch.bfloat16)
    return loaded


class _Look:
    """Measures a trainer's model at given steps, each into a folder of its own."""

    def __init__(
        self,
        run: RunFolder,
        config: DynamicsConfig,
        trainer: Any,
        loaded: LoadedModel,
        start: LoadedModel,
        ask: Any,
    ) -> None:
        self._run, self._config, self._trainer = run, config, trainer
        self._loaded, self._start, self._ask = loaded, start, ask
        self.rows = [_rendered(row) for row in trainer.train_dataset]

    def callback(self, progress: Progress) -> Any:
        """The trainer's callback that measures."""
        from transformers import TrainerCallback

        wanted, count = frozenset(self._config.steps), len(self._config.steps)
        done: list[int] = []

        def measure(step: int) -> None:
            if step in wanted and step not in done:
                self.measure(step)
                done.append(step)
                progress("steps measured", len(done), count)

        class Measure(TrainerCallback):  # type: ignore[misc]
            """Measures before the first step and after each that is wanted."""

            def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                measure(0)

            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                measure(state.global_step)

        return Measure()

    def measure(self, step: int) -> None:
        """Everything at one step; nothing where its folder is finished."""
        folder = RunFolder(self._run / "steps" / f"{step:05d}")
        if (folder / STEP).exists():
            return
        folder.path.mkdir(parents=True, exist_ok=True)
        config, model = self._config, tuned_model(self._trainer)
        now = dataclasses.replace(self._loaded, model=model)
        losses = [row[: config.positions] for row in token_losses(model, self.rows)]
        outcomes = self._ask(folder, now)["outcomes"]
        found = {
            "step": step,
            "loss": losses,
            "gradients": self._gradients(model),
            "kl": self._divergence(folder, now) if step else None,
            "outcomes": outcomes,
        }
        folder.write_json(STEP, found)
        logger.info("step %d: %s", step, told(outcomes[PLAIN]))

    def _gradients(self, model: Any) -> list[list[float]]:
        config = self._config
        if not config.gradient_rows:
            return []
        with _weights_not_adapters(model):
            made = token_gradients(
                model,
                self.rows[: config.gradient_rows],
                num_positions=config.gradient_positions,
                last_blocks=config.last_blocks,
            )
            return [list(one.norms()) for one in made]

    def _divergence(self, folder: RunFolder, now: LoadedModel) -> list[list[float | None]]:
        """KL of the tuned model from its start at each position of the answers that it just wrote."""
        written = {one.key: one for one in folder.records(COMPLETIONS, Completion)}
        items = []
        for attempt in folder.records(ATTEMPTS, Attempt):
            ids = written[attempt.key].token_ids[: self._config.positions]
            if attempt.variant == PLAIN and ids:
                items.append((attempt.prompt_id, render(now.tokenizer, now.template, attempt.messages, ids)))
        profiles = kl_profiles(
            now.model,
            self._start.model,
            items,
            vocab_size=now.vocab_size,
            max_positions=self._config.positions,
        )
        return [list(profile.forward) for profile in profiles]


def _rendered(row: Any) -> Rendered:
    return Rendered(ids=tuple(row["input_ids"]), response_mask=tuple(label != IGNORED for label in row["labels"]))


@contextlib.contextmanager
def _weights_not_adapters(model: Any) -> Iterator[None]:
    """Let gradients be those of the model's own weights, as the paper's are, where an adapter is trained."""
    asked = {name: weight.requires_grad for name, weight in model.named_parameters()}
    is_adapted = any(".lora_" in name for name in asked)
    if is_adapted:
        for name, weight in model.named_parameters():
            weight.requires_grad_(".lora_" not in name and weight.is_floating_point())
    try:
        yield
    finally:
        for name, weight in model.named_parameters():
            weight.requires_grad_(asked[name])


def _section(run: RunFolder, config: DynamicsConfig, steps: Sequence[int], num_rows: int) -> dict[str, Any]:
    found = [json.loads((run / "steps" / f"{step:05d}" / STEP).read_text(encoding="utf-8")) for step in steps]
    if not found:
        raise UserError(f"--steps {list(config.steps)} are all beyond the end of training; give smaller ones")
    return {
        "set": config.set,
        "way": way_title(config.way),
        "parameters": "all" if config.last_blocks is None else f"last {config.last_blocks} blocks and head",
        "num_rows": num_rows,
        "curves": [
            {
                "step": one["step"],
                "loss": _curve(one["loss"]),
                "grad_norm": _curve(one["gradients"]) or None,
                "kl": _curve(one["kl"]) if one["kl"] else None,
            }
            for one in found
        ],
        "asr": [{"step": one["step"], "asr": rate_of([one], PLAIN)} for one in found],
    }


def _curve(rows: Sequence[Sequence[float | None]]) -> list[dict[str, Any]]:
    """Mean with its interval at each position that some row reaches, over finite values."""
    longest = max((len(row) for row in rows), default=0)
    found = []
    for place in range(longest):
        here = [value for row in rows if place < len(row) and (value := row[place]) is not None and value == value]
        if here:
            found.append({"position": place, **mean_json(here)})
    return found
