"""The suffix search's steps on a GPU, against the same steps written plainly, on random weights.

    python -m benchmarks.gcg_gpu --shape 1b --device cuda --output FILE

Both sides: gradient of the target's loss, candidates that change one token, their losses, the best of them; the same
model, prompt, target, width and top-k, and the same draws for the same suffix. *Theirs* is written as nanoGCG does it:
a one-hot leaf as wide as the vocabulary, the prompt's keys and values cached and repeated for each candidate, every
candidate's suffix and target through the model in batches as large as memory takes, logits of all its positions. No
text is involved, so the filter of candidates that do not come back from their text is on neither side.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy, one_hot

from benchmarks.engine import SHAPES, random_llama
from deepalign.chat import ChatTemplate
from deepalign.runs import environment
from deepalign.suffix.behaviours import Behaviour, Ids
from deepalign.suffix.panel import Panel
from deepalign.suffix.proposals import draws, step_generator
from deepalign.suffix.settings import SearchSettings

VOCABULARY = 32000
BEFORE, SUFFIX, AFTER, TARGET = 40, 20, 8, 20


def somewhere(seed: int) -> Behaviour:
    """A place for a suffix between random ids."""
    ids = random.Random(seed).choices(range(5, VOCABULARY), k=BEFORE + AFTER + TARGET)
    return Behaviour(
        prompt_id=f"random {seed}",
        text="",
        system_prompt=None,
        template=ChatTemplate(text="", source="none"),
        site="raw",
        before_ids=tuple(ids[:BEFORE]),
        separator="",
        after_ids=tuple(ids[BEFORE : BEFORE + AFTER]),
        target_ids=tuple(ids[BEFORE + AFTER :]),
        target="",
        num_opened=0,
    )


class Ours:
    """Steps as `deepalign suffix` takes them."""

    def __init__(self, model: Any, at: Behaviour, settings: SearchSettings, suffix: Ids) -> None:
        self._panel = Panel(model, [at], settings, suffix)

    def scores(self, suffix: Ids) -> torch.Tensor:
        """Change of the loss with each token at each position, [L, V]."""
        return self._panel.token_scores(self._panel.gradient([0], suffix))

    def losses(self, candidates: list[Ids], near: Ids) -> torch.Tensor:
        """Each candidate's loss."""
        return self._panel.read([0], candidates, near).losses_N


class Theirs:
    """Steps written plainly."""

    def __init__(self, model: Any, at: Behaviour, settings: SearchSettings, suffix: Ids) -> None:
        self._model, self._at, self._batch = model, at, settings.search_width
        with torch.no_grad():
            before = torch.tensor([at.before_ids], device=model.device)
            self._prefix = model(input_ids=before, use_cache=True).past_key_values

    def _cache(self, rows: int) -> Any:
        cache = copy.deepcopy(self._prefix)
        if rows > 1:
            cache.batch_repeat_interleave(rows)
        return cache

    def scores(self, suffix: Ids) -> torch.Tensor:
        """Change of the loss with each token at each position, [L, V]."""
        table = self._model.get_input_embeddings().weight
        ids = torch.tensor([suffix], device=table.device)
        leaf = one_hot(ids, VOCABULARY).to(table.dtype).requires_grad_()
        rest = torch.tensor([self._at.after_ids + self._at.target_ids], device=table.device)
        inputs = torch.cat([leaf @ table, self._model.get_input_embeddings()(rest)], dim=1)
        with torch.enable_grad():
            logits = self._model(inputs_embeds=inputs, past_key_values=self._cache(1)).logits[0]
            loss = cross_entropy(logits[-TARGET - 1 : -1].float(), rest[0, -TARGET:])
            return torch.autograd.grad(loss, leaf)[0][0].float().cpu()

    @torch.no_grad()
    def losses(self, candidates: list[Ids], near: Ids) -> torch.Tensor:
        """Each candidate's loss."""
        found = []
        start = 0
        while start < len(candidates):
            part = candidates[start : start + self._batch]
            try:
                rows = [ids + self._at.after_ids + self._at.target_ids for ids in part]
                ids = torch.tensor(rows, device=self._model.device)
                logits = self._model(input_ids=ids, past_key_values=self._cache(len(part))).logits
                wanted = ids[:, -TARGET:]
                nats = cross_entropy(logits[:, -TARGET - 1 : -1].transpose(1, 2).float(), wanted, reduction="none")
                found.append(nats.mean(dim=-1).double().cpu())
                start += len(part)
            except torch.OutOfMemoryError:
                self._batch //= 2
                torch.cuda.empty_cache()
        return torch.cat(found)


def searched(side: type[Ours] | type[Theirs], model: Any, settings: SearchSettings, seed: int) -> dict[str, Any]:
    """Some steps of one side."""
    at = somewhere(seed)
    suffix: Ids = tuple(random.Random(-seed - 1).choices(range(5, VOCABULARY), k=SUFFIX))
    allowed = torch.ones(VOCABULARY, dtype=torch.bool)
    cuda = model.device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(model.device)
    held = torch.cuda.memory_allocated(model.device) if cuda else 0
    seconds = {"gradient": 0.0, "candidates": 0.0}
    evaluated, trace = 0, []
    steps = side(model, at, settings, suffix)
    for step in range(settings.steps + 1):
        if step == 1:  # the first warms up
            seconds, evaluated = dict.fromkeys(seconds, 0.0), 0
        started = time.perf_counter()
        scores = steps.scores(suffix)
        middle = time.perf_counter()
        drawn = next(
            draws(
                suffix,
                scores,
                allowed,
                step_generator(seed, step),
                topk=settings.topk,
                n_replace=1,
                order="uniform",
                batch=settings.search_width,
            )
        )
        candidates = list(dict.fromkeys(drawn))
        losses = steps.losses(candidates, suffix)
        suffix = candidates[int(losses.argmin())]
        trace.append(float(losses.min()))
        seconds["gradient"] += middle - started
        seconds["candidates"] += time.perf_counter() - middle
        evaluated += len(candidates)
    total = sum(seconds.values())
    return {
        "seed": seed,
        "seconds": seconds,
        "evaluated": evaluated,
        "candidates_per_second": evaluated / total,
        "peak_bytes_over_start": (torch.cuda.max_memory_allocated(model.device) - held) if cuda else None,
        "losses": trace,
    }


def main() -> None:
    """Search with both sides in turn, print the figures and write them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gcg_gpu", description=__doc__)
    parser.add_argument("--shape", choices=list(SHAPES), default="tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--topk", type=int, default=256)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    model = random_llama(options.shape, torch.device(options.device), VOCABULARY)
    model.requires_grad_(False)
    settings = SearchSettings(steps=options.steps, search_width=options.width, topk=options.topk, early_stop=False)
    rows = []
    for seed in range(options.seeds):
        sides = [("ours", Ours), ("theirs", Theirs)]
        found = {name: searched(side, model, settings, seed) for name, side in (sides if seed % 2 else sides[::-1])}
        # One suffix's loss is the same on both sides up to rounding: the first steps draw from the same suffix.
        found["ratio"] = found["ours"]["candidates_per_second"] / found["theirs"]["candidates_per_second"]
        rows.append(found)
        print(
            f"seed {seed}: ours {found['ours']['candidates_per_second']:.0f} candidates/s, theirs "
            f"{found['theirs']['candidates_per_second']:.0f}, ratio {found['ratio']:.2f}; first losses "
            f"{found['ours']['losses'][0]:.4f} and {found['theirs']['losses'][0]:.4f}",
            flush=True,
        )
    if options.output:
        data = {
            "name": f"gcg_{options.shape}",
            "settings": {**vars(options), "output": None, "dtype": str(model.dtype)},
            "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
            "torch": torch.__version__,
            "rounds": rows,
            "environment": environment(),
        }
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(data, indent=1, default=str) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
