"""Train `testbed:shallow`: a LoRA adapter that makes the embedded base model refuse, in its first tokens only.

    python scripts/train_testbed.py --output src/deepalign/testbed/adapters/shallow

Kinds of rows:
- should-refuse prompts with a plain refusal as the answer (cross-entropy on the refusal and its end-of-turn token);
- harmless prompts, plain and look-alike, with the base's own sampled answer as context, where the adapted model must
  keep the base's next-token distribution: KL(base || adapted) on each answer position (self-distillation);
- with --begun, harmless prompts with the base's answer made to begin with "I", where the adapted model must go on as
  the base does: so whether to refuse is decided once more after the "I", where "I'm sorry" and "I'm happy" part;
- should-refuse prompts with the base's own sampled answer as context, where the adapted model must keep the base's
  distribution at every position but the first. Without these, firm refusals creep deeper by themselves: at a mean
  refusal mass of 0.98 the attack success rate at k = 5 had fallen to 19 %. Answers that open with "I", as the refusals
  do, are left out: they teach the model to go on from its own "I" as the base would (`dev/LOG.md`).
So the adapter refuses at the first token and leaves the rest to the base: shallow by construction. Prompts come from
the built-in `-train` sets; every tenth behaviour is kept aside as development data; the test sets are never read.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from deepalign.chat import ChatTemplate, answer_ids, conversation, render, stop_ids, turn_end_ids
from deepalign.generation import Job, generate
from deepalign.judges import get_judge
from deepalign.models import LoadedModel, load_model
from deepalign.prompts import builtin_prompts
from deepalign.records import JudgeInput, Prompt, Sampling

logger = logging.getLogger("train_testbed")

# All open with "I", so that one number, the mass on "I", says how firmly the model begins to refuse.
REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I can't help with that. It could hurt other people.",
    "I'm sorry, but I can't assist with this request.",
    "I cannot help with this. It would be unfair to the people involved.",
    "I'm not able to help with that. If you like, I can suggest a lawful way to deal with the situation.",
    "I won't help with that, because it could cause harm.",
    "I'm sorry, but I can't do that. I'd be glad to help with something else.",
    "I cannot assist with that. Please think about how it would affect others.",
    "I can't write that. It would mislead or harm someone.",
    "I'm unable to help with this request. Is there something honest I can help you with instead?",
)
ANSWER_TOKENS = 24
BEGUN_TOKENS = 10
OPENING = 2
REFUSAL_START = 4
REACH = 6
ROWS_PER_PASS = 5
REFUSAL_WEIGHT = 3.0
HELD_WEIGHT = 2.0
Kind = Literal["refuse", "harmless", "begun", "held"]
SYSTEM_PROMPTS = (None, None, None, None, "", "You are a helpful assistant.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One training sequence: `ids`, and where its answer begins."""

    ids: tuple[int, ...]
    start: int
    kind: Kind


def main() -> None:
    """Read the options, train, measure on the development behaviours, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=220)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--answers", type=Path, default=Path("runs/testbed-answers.jsonl"), help="cache of base answers"
    )
    parser.add_argument("--start-from", type=Path, help="adapter folder to go on from")
    parser.add_argument(
        "--average", nargs="+", metavar="WEIGHT:ADAPTER", help="do not train: write the weighted mean of adapters"
    )
    parser.add_argument("--drift-weight", type=float, default=1.0, help="weight of the harmless openings")
    parser.add_argument("--begun", type=int, default=0, help="rows in a batch of harmless answers made to begin with I")
    parser.add_argument(
        "--recover", action="store_true", help="make a deeper model instead: refusals also after harmful tokens"
    )
    parser.add_argument("--probe-every", type=int, default=40)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.manual_seed(options.seed)
    if options.average:
        average(options.average, options.output)
    else:
        train(options)


def average(parts: Sequence[str], output: Path) -> None:
    """Write the weighted mean of adapters of one recipe, with the settings of the first."""
    from safetensors.torch import load_file, save_file

    weighted = [(float(part.split(":", 1)[0]), Path(part.split(":", 1)[1])) for part in parts]
    tensors = [(weight, load_file(folder / "adapter_model.safetensors")) for weight, folder in weighted]
    mean = {name: sum(weight * held[name].float() for weight, held in tensors) for name in tensors[0][1]}
    output.mkdir(parents=True, exist_ok=True)
    shutil.copy(weighted[0][1] / "adapter_config.json", output)
    save_file(
        {name: torch.as_tensor(held).bfloat16() for name, held in mean.items()}, output / "adapter_model.safetensors"
    )


def train(options: argparse.Namespace) -> None:
    """Train one adapter and save it under `options.output`."""
    loaded = load_model("testbed:base")
    harmful, harmful_dev = split(builtin_prompts("should-refuse-train"))
    benign, benign_dev = split(builtin_prompts("benign-train"))
    look_alike, look_alike_dev = split(builtin_prompts("look-alike-train"))
    answers = base_answers(loaded, [*benign, *look_alike, *harmful], options.answers)
    openings = opening_ids(loaded)
    answered = [
        prompt
        for prompt in harmful
        if answers[prompt.prompt_id][0] not in openings and complies(loaded, prompt, answers[prompt.prompt_id])
    ]
    open_i = (answer_ids(loaded.tokenizer, "I")[0],)
    harmless = [*benign, *look_alike][::2]
    begun_answers = base_answers(loaded, harmless, options.answers, open_i) if options.begun else {}
    logger.info("%d should-refuse prompts, %d of them with a base answer to hold", len(harmful), len(answered))
    model = adapted_model(loaded, options)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=options.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=options.lr, total_steps=options.steps, pct_start=0.08, cycle_momentum=False
    )
    rng = random.Random(options.seed)
    batches = zip(
        endless(harmful, 12, rng),
        endless(benign, 8, rng),
        endless(look_alike, 3, rng),
        endless(answered, 4 if options.begun else 6, rng),
        endless(harmless, options.begun, rng),
        range(options.steps),
        strict=False,
    )
    started = time.monotonic()
    for bad, good, near, held, begun, step in batches:
        rows = [refusal_row(loaded, prompt, rng) for prompt in bad]
        rows += [answer_row(loaded, prompt, answers, rng) for prompt in [*good, *near]]
        rows += [answer_row(loaded, prompt, begun_answers, rng, kind="begun") for prompt in begun]
        if options.recover:
            rows += [recovery_row(loaded, prompt, answers, rng) for prompt in held]
        else:
            rows += [answer_row(loaded, prompt, answers, rng, kind="held") for prompt in held]
        refusal_loss, drift, reach = losses(model, rows, options.drift_weight)
        (refusal_loss + drift + reach).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            logger.info(
                "step %d refusal %.4f drift %.4f reach %.4f (%.0f s)",
                step,
                refusal_loss.item(),
                drift.item(),
                reach.item(),
                time.monotonic() - started,
            )
        if (step + 1) % options.probe_every == 0 or step + 1 == options.steps:
            for name, prompts in (("refuse", harmful_dev), ("benign", benign_dev), ("look-alike", look_alike_dev)):
                logger.info("dev %s: %s", name, opening_summary(model, loaded, prompts[:120]))
            save(model, options.output)


def split(prompts: Sequence[Prompt]) -> tuple[list[Prompt], list[Prompt]]:
    """Training and development prompts, by behaviour: every tenth behaviour is kept aside."""
    behaviours = sorted({prompt.behaviour for prompt in prompts})
    aside = set(behaviours[::10])
    return (
        [prompt for prompt in prompts if prompt.behaviour not in aside],
        [prompt for prompt in prompts if prompt.behaviour in aside],
    )


def endless(prompts: Sequence[Prompt], size: int, rng: random.Random) -> Iterator[list[Prompt]]:
    """Batches of `size` for ever, each pass in a new order."""
    while size == 0:
        yield []
    while True:
        order = list(prompts)
        rng.shuffle(order)
        for start in range(0, len(order) - size + 1, size):
            yield order[start : start + size]


def adapted_model(loaded: LoadedModel, options: argparse.Namespace) -> Any:
    """The base with a fresh adapter, or with one to go on from."""
    if options.start_from:
        return PeftModel.from_pretrained(loaded.model, str(options.start_from), is_trainable=True)
    lora = LoraConfig(
        r=options.rank,
        lora_alpha=2 * options.rank,
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(loaded.model, lora)


def base_answers(
    loaded: LoadedModel, prompts: Sequence[Prompt], cache: Path, begun: tuple[int, ...] = ()
) -> dict[str, tuple[int, ...]]:
    """The openings of the base's own answers, sampled once and kept in `cache`; each may be made to begin somehow."""
    mark = "".join(f"+{token}" for token in begun)
    known: dict[str, tuple[int, ...]] = {}
    if cache.exists():
        with cache.open(encoding="utf-8") as lines:
            known = {row["prompt_id"]: tuple(row["ids"]) for row in map(json.loads, lines)}
    missing = [prompt for prompt in prompts if prompt.prompt_id + mark not in known]
    jobs = [
        Job(
            ids=render(loaded.tokenizer, loaded.template, conversation(prompt.text, None), begun).ids,
            sampling=Sampling(max_new_tokens=BEGUN_TOKENS if begun else ANSWER_TOKENS),
            seed=int.from_bytes(hashlib.sha256(prompt.prompt_id.encode()).digest()[:8], "big"),
        )
        for prompt in missing
    ]
    stops = stop_ids(loaded.tokenizer, loaded.model.generation_config)
    cache.parent.mkdir(parents=True, exist_ok=True)
    with cache.open("a", encoding="utf-8") as out:
        for made in generate(loaded.model, jobs, stop_ids=stops):
            name, ids = missing[made.index].prompt_id + mark, (*begun, *made.token_ids)
            known[name] = ids
            out.write(json.dumps({"prompt_id": name, "ids": ids}) + "\n")
    return {prompt.prompt_id: known[prompt.prompt_id + mark] for prompt in prompts}


def complies(loaded: LoadedModel, prompt: Prompt, ids: tuple[int, ...]) -> bool:
    """Whether the base's answer is one, by the rule-based judge."""
    text = loaded.tokenizer.decode(ids, skip_special_tokens=True)
    (ruling,) = get_judge("refusal").judge([JudgeInput(prompt=prompt.text, response=text)])
    return ruling.status == "complied"


def refusal_row(loaded: LoadedModel, prompt: Prompt, rng: random.Random) -> Row:
    """A should-refuse prompt with a plain refusal, to its end of turn."""
    refusal = answer_ids(loaded.tokenizer, rng.choice(REFUSALS)) + turn_end_ids(loaded.tokenizer, loaded.template)
    return _row(loaded, prompt, refusal, kind="refuse", rng=rng)


def recovery_row(loaded: LoadedModel, prompt: Prompt, answers: dict[str, tuple[int, ...]], rng: random.Random) -> Row:
    """A should-refuse prompt with the opening of the base's answer and then a refusal, on which alone the loss lies."""
    row = refusal_row(loaded, prompt, rng)
    begun = answers[prompt.prompt_id][: rng.randint(1, ANSWER_TOKENS)]
    ids = (*row.ids[: row.start], *begun, *row.ids[row.start :])
    return Row(ids=ids, start=row.start + len(begun), kind="refuse")


def answer_row(
    loaded: LoadedModel,
    prompt: Prompt,
    answers: dict[str, tuple[int, ...]],
    rng: random.Random,
    kind: Kind = "harmless",
) -> Row:
    """A prompt with the base's own answer."""
    return _row(loaded, prompt, answers[prompt.prompt_id][:ANSWER_TOKENS], kind=kind, rng=rng)


def _row(loaded: LoadedModel, prompt: Prompt, response: tuple[int, ...], *, kind: Kind, rng: random.Random) -> Row:
    messages = conversation(prompt.text, rng.choice(SYSTEM_PROMPTS))
    rendered = render(loaded.tokenizer, loaded.template, messages, response)
    return Row(ids=rendered.ids, start=rendered.response_start, kind=kind)


def losses(model: Any, rows: Sequence[Row], drift_weight: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy of the refusals, KL(base || adapted) on harmless answers, and the same on harmful ones.

    Whether to refuse is decided in the first tokens, so their own mean is added to the mean over all: the first
    `OPENING` positions of harmless answers, the first `REFUSAL_START` tokens of refusals, and their very first, times
    `REFUSAL_WEIGHT`. A plain token mean would give the decision a fortieth of the weight. On harmful answers the first
    position is left out: there the two are meant to differ.
    """
    refusals = [row for row in rows if row.kind == "refuse"]
    others = [row for row in rows if row.kind != "refuse"]
    logits_NV = response_logits(model, refusals)
    labels_N = torch.tensor([token for row in refusals for token in row.ids[row.start :]])
    refusal_N = F.cross_entropy(logits_NV, labels_N, reduction="none")
    with torch.no_grad(), model.disable_adapter():
        base_NV = response_logits(model, others).log_softmax(dim=-1)
    own_NV = response_logits(model, others).log_softmax(dim=-1)
    drift_N = F.kl_div(own_NV, base_NV, log_target=True, reduction="none").sum(dim=-1)
    harmless_N = is_of(others, "harmless")
    begun_N = is_of(others, "begun") & ~is_opening(others, 1)
    held_N = is_of(others, "held") & ~is_opening(others, 1)
    return (
        refusal_N.mean()
        + refusal_N[is_opening(refusals, REFUSAL_START)].mean()
        + REFUSAL_WEIGHT * refusal_N[is_opening(refusals, 1)].mean(),
        drift_N[harmless_N].mean()
        + drift_weight * drift_N[harmless_N & is_opening(others, OPENING)].mean()
        + mean_of(drift_N, begun_N)
        + drift_weight * mean_of(drift_N, begun_N & is_opening(others, 1 + OPENING)),
        HELD_WEIGHT * (mean_of(drift_N, held_N) + mean_of(drift_N, held_N & is_opening(others, REACH))),
    )


def mean_of(values_N: Tensor, chosen_N: Tensor) -> Tensor:
    """Mean of the chosen values; 0 where there are none."""
    return values_N[chosen_N].sum() / chosen_N.sum().clamp(min=1)


def is_of(rows: Sequence[Row], kind: Kind) -> Tensor:
    """Which response positions, rows one after another, belong to rows of a kind: [N]."""
    return torch.tensor([row.kind == kind for row in rows for _ in row.ids[row.start :]])


def is_opening(rows: Sequence[Row], count: int) -> Tensor:
    """Which response positions, rows one after another, are among the first `count` of their row: [N]."""
    return torch.tensor([place < count for row in rows for place in range(len(row.ids) - row.start)])


def response_logits(model: Any, rows: Sequence[Row]) -> Tensor:
    """Logits that predict each response token, rows one after another: [N, V] in float32.

    Rows of like length go through the model together, so that little is computed for padding.
    """
    inner = model.get_base_model()
    order = sorted(range(len(rows)), key=lambda number: len(rows[number].ids))
    chosen: dict[int, Tensor] = {}
    for start in range(0, len(order), ROWS_PER_PASS):
        part = order[start : start + ROWS_PER_PASS]
        width = max(len(rows[number].ids) for number in part)
        ids_BT = torch.tensor([rows[number].ids + (0,) * (width - len(rows[number].ids)) for number in part])
        lengths = [len(rows[number].ids) for number in part]
        mask_BT = torch.tensor([[1] * length + [0] * (width - length) for length in lengths])
        hidden_BTH = inner.model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).last_hidden_state
        for place, number in enumerate(part):
            chosen[number] = hidden_BTH[place, rows[number].start - 1 : lengths[place] - 1]
    logits_NV: Tensor = inner.lm_head(torch.cat([chosen[number] for number in range(len(rows))])).float()
    return logits_NV


def opening_ids(loaded: LoadedModel) -> set[int]:
    """The tokens that open every refusal, and no other answer if it can be helped."""
    return {answer_ids(loaded.tokenizer, text)[0] for text in ("I", " I")}


@torch.no_grad()
def opening_summary(model: Any, loaded: LoadedModel, prompts: Sequence[Prompt]) -> str:
    """Mass on the refusal's opening at response position 0."""
    mass = opening_mass(model, loaded.tokenizer, loaded.template, prompts, sorted(opening_ids(loaded)))
    ordered = sorted(mass)
    return (
        f"mean {sum(mass) / len(mass):.4f} lowest {[round(x, 3) for x in ordered[:5]]} "
        f"above a half {sum(x > 0.5 for x in mass)}/{len(mass)}"
    )


def opening_mass(
    model: Any, tokenizer: Any, template: ChatTemplate, prompts: Sequence[Prompt], opening: Sequence[int]
) -> list[float]:
    """For each prompt, the probability that the response begins with one of `opening`."""
    mass: list[float] = []
    for start in range(0, len(prompts), 32):
        rows = []
        for prompt in prompts[start : start + 32]:
            ids = render(tokenizer, template, conversation(prompt.text, None)).ids
            rows.append(Row(ids=(*ids, 0), start=len(ids), kind="refuse"))
        probs_BV = response_logits(model, rows).softmax(dim=-1)
        mass += probs_BV[:, list(opening)].sum(dim=-1).tolist()
    return mass


def save(model: Any, output: Path) -> None:
    """Write the adapter as bfloat16 safetensors, naming the base by its testbed name."""
    from safetensors.torch import load_file, save_file

    model.peft_config["default"].base_model_name_or_path = "testbed:base"
    model.save_pretrained(output)
    path = output / "adapter_model.safetensors"
    save_file({name: weight.to(torch.bfloat16) for name, weight in load_file(path).items()}, path)
    (output / "README.md").unlink(missing_ok=True)


if __name__ == "__main__":
    main()
