"""The reference model: what the tuned model was when it began, or another that the caller names.

Three ways to its log-probabilities: the adapter switched off, where a fresh adapter is trained; the trainable weights
as they were, put back for the length of a pass; or every row of the data read once beforehand and kept by content.
None of them holds a second model.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepalign.errors import UserError
from deepalign.models import fingerprint
from deepalign.training.objective import IGNORED
from deepalign.training.rows import REFERENCE

logger = logging.getLogger(__name__)


class StartingPoint:
    """A model as it is now, to be had back for a moment while it is being trained.

    Args:
        model: The model before training, with an adapter or without.
    """

    def __init__(self, model: Any) -> None:
        self._fresh_adapter = _is_fresh_adapter(model)
        self._held: dict[str, Tensor] = {}
        self._model = model
        self.fingerprint = fingerprint(model.get_base_model() if self._fresh_adapter else model)
        """The same for the same weights; a fresh adapter, which changes nothing yet, is left out."""

    def hold(self) -> None:
        """Keep the trainable weights; needed before `restored` unless the adapter can be switched off."""
        if not self._fresh_adapter and not self._held:
            self._held = {
                name: weight.detach().clone() for name, weight in self._model.named_parameters() if weight.requires_grad
            }

    @contextlib.contextmanager
    def restored(self, model: Any) -> Iterator[None]:
        """The model as it was, in evaluation mode."""
        training = model.training
        model.eval()
        try:
            with model.disable_adapter() if self._fresh_adapter else self._swapped(model):
                yield
        finally:
            model.train(training)

    @contextlib.contextmanager
    def _swapped(self, model: Any) -> Iterator[None]:
        now = {name: weight for name, weight in model.named_parameters() if name in self._held}
        tuned = {name: weight.data for name, weight in now.items()}
        try:
            for name, weight in now.items():
                weight.data = self._held[name].to(weight.device)
            yield
        finally:
            for name, weight in now.items():
                weight.data = tuned[name]


def _is_fresh_adapter(model: Any) -> bool:
    """Whether the trainable weights are a LoRA adapter that changes nothing yet, so that off is where it started."""
    if not hasattr(model, "peft_config"):
        return False
    trained = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    settings = [model.peft_config[name] for name in model.active_adapters]
    # Other ways to begin (PiSSA, OLoRA) change the base's own weights.
    plain = all(getattr(one, "init_lora_weights", None) in (True, "gaussian") for one in settings)
    known = all(".lora_A." in name or ".lora_B." in name for name, _ in trained)
    still = all(not bool(weight.any()) for name, weight in trained if ".lora_B." in name)
    return bool(trained) and plain and known and still


def check_reference(model: Any, reference: Any) -> None:
    """Refuse a reference model whose log-probabilities are of other tokens.

    Raises:
        UserError: The vocabularies differ.
    """
    mine, its = (int(one.get_output_embeddings().weight.shape[0]) for one in (model, reference))
    if mine != its:
        raise UserError(
            f"the reference model has {its} output tokens and the tuned one {mine}; give the model that it started from"
        )


class Reference:
    """Log-probabilities under the reference, read at each step or beforehand.

    Args:
        trainer: Gives the settings, the devices and the way a model scores a batch.
        other: A model to read instead of the tuned one's start; it is not changed.

    Raises:
        UserError: The other model is over other tokens.
    """

    def __init__(self, trainer: Any, other: Any = None) -> None:
        self._trainer = trainer
        self._other = None
        if other is not None:
            check_reference(trainer.model, other)
            self._other = copy.copy(other).eval()
        self.start = StartingPoint(trainer.model if other is None else other)

    def log_probs(self, model: Any, inputs: Mapping[str, Any]) -> Tensor:
        """Log-probabilities of a batch's labels, [B, T - 1]; 0 where there is no loss."""
        accelerator = self._trainer.accelerator
        with torch.no_grad(), accelerator.autocast():
            if self._other is not None:
                return self._other_log_probs(dict(inputs))
            whole = accelerator.unwrap_model(model)
            with self.start.restored(whole):
                found: Tensor = self._trainer.plain_log_probs(whole, dict(inputs))
                return found

    def _other_log_probs(self, inputs: dict[str, Any]) -> Tensor:
        assert self._other is not None
        labels_BT = inputs.pop("labels")[:, 1:]
        other = self._other.to(labels_BT.device)
        logits_BTV = other(**{**inputs, "use_cache": False}).logits[:, :-1].float()
        chosen_BT = logits_BTV.gather(2, labels_BT.clamp(min=0).unsqueeze(2)).squeeze(2)
        return torch.where(labels_BT == IGNORED, 0.0, chosen_BT - logits_BTV.logsumexp(dim=-1))

    def added_to(self, dataset: Any, name: str) -> Any:
        """The data set with a column of the reference's log-probabilities, kept by content for the next time."""
        args = self._trainer.args
        rows, labels = list(dataset["input_ids"]), list(dataset["labels"])
        # Packed rows are read as the documents that they hold.
        packed = list(dataset["seq_lengths"]) if "seq_lengths" in dataset.column_names else []
        mark = f"{self.start.fingerprint} {self._trainer.model.dtype} {args.bf16} {args.fp16} {packed}"
        folder = Path(args.reference_cache or Path(args.output_dir) / "reference")
        found = kept_or_computed(
            folder / f"{content_key(mark, rows, labels)}.safetensors",
            [len(row) for row in rows],
            lambda: self._read_rows(dataset, name),
            writes=self._trainer.is_world_process_zero(),
        )
        return dataset.add_column(REFERENCE, found)

    def _read_rows(self, dataset: Any, name: str) -> list[list[float]]:
        """The value of every token of every row; 0 where there is no loss. Each process reads its share."""
        from accelerate.utils import gather_object

        args = self._trainer.args
        lengths = [len(row) for row in dataset["input_ids"]]
        order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
        size = args.per_device_eval_batch_size
        parts = [order[start : start + size] for start in range(0, len(order), size)]
        found: list[tuple[int, list[float]]] = []
        keep = [column for column in ("input_ids", "labels", "seq_lengths") if column in dataset.column_names]
        for part in parts[args.process_index :: args.world_size]:
            examples = [{column: dataset[number][column] for column in keep} for number in part]
            inputs = self._trainer._prepare_inputs(self._trainer.data_collator(examples))
            logps_BT = torch.nn.functional.pad(self.log_probs(self._trainer.model, inputs).float().cpu(), (1, 0))
            # Without padding, the rows lie one after another.
            laid_out = len(logps_BT) != len(part)
            rows = torch.split(logps_BT[0], [lengths[number] for number in part]) if laid_out else logps_BT
            found += [(number, row[: lengths[number]].tolist()) for number, row in zip(part, rows, strict=True)]
        if args.world_size > 1:
            found = gather_object(found)
        logger.info("read the reference on %d rows of %s", len(lengths), name)
        return [row for _, row in sorted(found)]


def content_key(mark: str, rows: Sequence[Sequence[int]], labels: Sequence[Sequence[int]]) -> str:
    """16 hex digits over a model's fingerprint and the ids and labels of all rows, in order."""
    digest = hashlib.sha256(mark.encode())
    for ids, targets in zip(rows, labels, strict=True):
        for part in (ids, targets):
            digest.update(torch.tensor([len(part), *part], dtype=torch.int64).numpy().tobytes())
    return digest.hexdigest()[:16]


def kept_or_computed(
    file: Path, lengths: Sequence[int], compute: Callable[[], list[list[float]]], *, writes: bool
) -> list[list[float]]:
    """Log-probabilities of every row, from a file of that content or computed and written there.

    Args:
        file: Named after the content, so that it never holds another model's or another data set's.
        lengths: Tokens of each row.
        compute: Gives them anew.
        writes: Whether this process is the one that writes.

    Raises:
        UserError: A computed value is no finite number.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file

    if file.is_file():
        try:
            flat = load_file(file)["log_probs"]
            if len(flat) == sum(lengths):
                return [part.tolist() for part in flat.split(list(lengths))]
        except (SafetensorError, KeyError, OSError):
            logger.info("%s cannot be read and is made anew", file)
    rows = compute()
    for number, row in enumerate(rows):
        if not all(abs(value) < float("inf") for value in row):
            raise UserError(f"the reference model gives no finite log-probability in row {number}; try another dtype")
    if writes:
        file.parent.mkdir(parents=True, exist_ok=True)
        beside = file.with_suffix(".part")
        save_file({"log_probs": torch.tensor([value for row in rows for value in row], dtype=torch.float32)}, beside)
        beside.replace(file)
    return rows
