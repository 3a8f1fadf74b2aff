"""Pairwise win rate: answers of a model and of a reference, and a judge behind an endpoint that chooses, twice each."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from deepalign.chat import PLAIN_TEMPLATE, ChatTemplate, conversation
from deepalign.config import settings_of
from deepalign.config_utility import WinrateConfig
from deepalign.endpoints.client import Client
from deepalign.endpoints.exchange import Request
from deepalign.endpoints.servers import BASE_URL_ENV, Server
from deepalign.errors import UserError
from deepalign.judges.rubric import said
from deepalign.models import LoadedModel, load_model
from deepalign.progress import Progress, silent
from deepalign.prompts.sources import load_prompts
from deepalign.records import Attempt, Completion, Prompt, Sampling
from deepalign.runs import RunFolder, RunResult, named_folder
from deepalign.utility.pairwise import ORDERS, Order, Preference, question, read, win_rate
from deepalign.workflows.models import model_card
from deepalign.workflows.reporting import write_section
from deepalign.workflows.steps import COMPLETIONS, complete

PREFERENCES = "preferences.jsonl"
_ATTACK = "winrate"
_JUDGE_TOKENS = 512

logger = logging.getLogger("deepalign")


def measure_winrate(config: WinrateConfig, progress: Progress = silent) -> RunResult:
    """Answer harmless prompts with two models and let a judge choose; the same settings go on where a run stopped.

    Raises:
        UserError: A model, file, prompt set or server cannot be used; one line with the remedy.
    """
    found = load_prompts(config.prompts, limit=config.limit)
    given = _given_answers(config.against, found.prompts)
    client = _client(config)
    judge = client.open()[0].model
    binding = settings_of(config, ("output", "max_batch", "concurrency", "judge_url", "judge_key_env"))
    run = RunFolder(config.output or named_folder(config.model, binding, "winrate"))
    with run.writing():
        loaded = _load(config.model, config, progress)
        given_hash = hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()[:16]
        identity = {"prompt_hash": found.hash, "answers_hash": given_hash, "model_fingerprint": loaded.fingerprint}
        run.claim(
            dict(binding) | identity | {"judge_model": judge},
            {"command": "winrate", "models": {"target": model_card(loaded)}},
        )
        logger.info("run folder %s", run.path)
        _answer(run, loaded, found.prompts, config, "model", progress)
        del loaded
        if not given:
            reference = _load(config.against, config, progress)
            if reference.fingerprint == run.manifest["models"]["target"]["fingerprint"]:
                raise UserError(f"{config.against} and {config.model} hold the same weights; give another --against")
            run.note(models={"reference": model_card(reference)})
            _answer(run, reference, found.prompts, config, "reference", progress)
            del reference
        answers = _answers(run, given)
        _judge(run, client, judge, found.prompts, answers, progress)
        section = win_rate(run.records(PREFERENCES, Preference), [prompt.prompt_id for prompt in found.prompts])
        section |= {"against": config.against, "judge": judge, "prompt_set": found.name}
        data = {"models": run.manifest["models"], "win_rate": section}
        return RunResult(
            run=run.path, metrics=write_section(run, data, [config.model], f"pairwise {judge}", redact=True)
        )


def _client(config: WinrateConfig) -> Client:
    url = config.judge_url or os.environ.get(BASE_URL_ENV, "").strip()
    if not url:
        # No default: texts are sent to nobody whom the user did not name.
        raise UserError(f"the judge has no server; give --judge-url http://HOST:PORT/v1, or set {BASE_URL_ENV}")
    server = Server(url=url, model=config.judge_model, key_env=config.judge_key_env)
    return Client(server, concurrency=config.concurrency)


def _load(name: str, config: WinrateConfig, progress: Progress) -> LoadedModel:
    progress(f"loading {name}"[:40], 0, 1)
    loaded = load_model(
        name,
        dtype=config.dtype,
        device=config.device,
        quantize=config.quantize,
        chat_template=config.chat_template,
        fallback_template=ChatTemplate(text=PLAIN_TEMPLATE, source="plain"),
    )
    progress(f"loading {name}"[:40], 1, 1)
    return loaded


def _given_answers(against: str, prompts: Sequence[Prompt]) -> dict[str, str]:
    """Answers of the reference by prompt id, where a file holds them; empty where it is a model.

    Raises:
        UserError: The file lacks a column, or has no answer to some prompt.
    """
    path = Path(against).expanduser()
    if path.suffix.lower() not in (".json", ".jsonl", ".csv", ".parquet") or path.is_dir():
        return {}
    try:
        from deepalign.utility.rows import local_splits
    except ImportError as error:
        raise UserError("a file of answers needs the library datasets: pip install 'deepalign[utility]'") from error
    rows = local_splits(path, None, "answers", None)["answers"].to_list()
    asked = next((name for name in ("prompt", "instruction", "text") if name in rows[0]), None)
    said_by = next((name for name in ("answer", "output", "response") if name in rows[0]), None)
    if asked is None or said_by is None:
        columns = ", ".join(rows[0])
        raise UserError(f"{path} has the columns {columns}; it needs prompt (or instruction) and answer (or output)")
    by_text = {str(row[asked]).strip(): str(row[said_by]) for row in rows}
    missing = [prompt for prompt in prompts if prompt.text.strip() not in by_text]
    if missing:
        raise UserError(
            f"{path} answers {len(prompts) - len(missing)} of {len(prompts)} prompts, and not {missing[0].prompt_id}; "
            "give answers to the same prompts, or its own prompts with --prompts"
        )
    return {prompt.prompt_id: by_text[prompt.text.strip()] for prompt in prompts}


def _answer(
    run: RunFolder, loaded: LoadedModel, prompts: Sequence[Prompt], config: WinrateConfig, who: str, progress: Progress
) -> None:
    attempts = [
        Attempt(
            prompt_id=prompt.prompt_id,
            attack=_ATTACK,
            variant=who,
            sample=0,
            model="target",
            messages=conversation(prompt.text, config.system_prompt),
            sampling=Sampling(temperature=0.0, max_new_tokens=config.max_new_tokens),
        )
        for prompt in prompts
    ]
    complete(run, loaded, attempts, stage=f"answers of the {who}", max_batch=config.max_batch, progress=progress)


def _answers(run: RunFolder, given: Mapping[str, str]) -> dict[tuple[str, str], str]:
    """Text by prompt id and side; empty where an answer failed."""
    found = {(one.prompt_id, one.variant): one.text.strip() for one in run.records(COMPLETIONS, Completion)}
    return found | {(prompt_id, "reference"): text.strip() for prompt_id, text in given.items()}


def _judge(
    run: RunFolder,
    client: Client,
    judge: str,
    prompts: Sequence[Prompt],
    answers: Mapping[tuple[str, str], str],
    progress: Progress,
) -> None:
    """Ask for every choice that is missing, each appended as its reply comes."""
    done = {(one.prompt_id, one.order) for one in run.records(PREFERENCES, Preference) if one.called}
    todo: list[tuple[Prompt, Order]] = []
    with run.appender(PREFERENCES) as out:
        for prompt in prompts:
            sides = {who: answers.get((prompt.prompt_id, who), "") for who in ("model", "reference")}
            empty = [who for who, text in sides.items() if not text]
            for order in ORDERS:
                if (prompt.prompt_id, order) in done:
                    continue
                if empty:
                    why = f"no answer of the {empty[0]}"
                    out.append([Preference(prompt_id=prompt.prompt_id, order=order, choice="unscored", reason=why)])
                else:
                    todo.append((prompt, order))
        requests = [
            Request(
                body={"model": judge, "messages": [{"role": "user", "content": _asked(prompt, order, answers)}],
                      "temperature": 0.0, "max_tokens": _JUDGE_TOKENS},
                prefix=prompt.prompt_id,
            )
            for prompt, order in todo
        ]  # fmt: skip
        made, total = 2 * len(prompts) - len(todo), 2 * len(prompts)
        progress("judging pairs", made, total)
        for index, reply in client.send(requests):
            prompt, order = todo[index]
            raw, problem = said(reply.body) if reply.status == "ok" else ("", f"no reply of the judge: {reply.reason}")
            choice = "unscored" if problem else read(raw, order)
            reason = problem or ("no verdict in the reply" if choice == "unscored" else "")
            out.append([
                Preference(
                    prompt_id=prompt.prompt_id, order=order, choice=choice, reason=reason, raw=raw,
                    called=reply.status == "ok",
                )
            ])  # fmt: skip
            made += 1
            progress("judging pairs", made, total)


def _asked(prompt: Prompt, order: Order, answers: Mapping[tuple[str, str], str]) -> str:
    return question(prompt.text, answers[prompt.prompt_id, "model"], answers[prompt.prompt_id, "reference"], order)
