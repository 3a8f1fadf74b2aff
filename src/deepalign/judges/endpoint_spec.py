"""Endpoint judges from the command line: "rubric:MODEL@URL?option=value&option=value".

MODEL may be left out where the server serves one, URL where OPENAI_BASE_URL is set; several servers of one model stand
side by side with "|" between them. Options belong to one judge, so that the judges of a panel may differ.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote

from deepalign.endpoints.cache import ReplyCache, default_path
from deepalign.endpoints.client import Client
from deepalign.endpoints.servers import BASE_URL_ENV, KEY_ENV, Server
from deepalign.endpoints.spending import Prices
from deepalign.errors import UserError
from deepalign.judges.rubric import Rubric, RubricJudge, RubricSampling, policy_rubric, strongreject_rubric

Number = TypeVar("Number", int, float)
OPTIONS = {
    "key_env": f"name of the variable that holds the key; default {KEY_ENV}",
    "concurrency": "calls at a time for each server; default 16",
    "timeout": "seconds that a call may take; default 300",
    "retries": "further tries after a passing fault; default 6",
    "temperature": "default 0; none leaves it out",
    "max_tokens": "longest reply; default 1024",
    "token_field": "name of that limit: max_tokens, or max_completion_tokens as OpenAI's reasoning models want it",
    "seed": "sent with each request; left out by default",
    "price_in": "per million prompt tokens",
    "price_out": "per million completion tokens",
    "cache": "file of replies already paid for; none keeps none",
}
_ADDRESS = re.compile(r"(?:(?P<model>.*?)@)?(?P<url>https?://.*)", re.DOTALL)


def rubric_judge(rest: str) -> RubricJudge:
    """Levels 1 to 5 of a usage policy, harmful at 5, as in the paper; a model behind an endpoint decides."""
    return _judge(policy_rubric(), rest)


def strongreject_judge(rest: str) -> RubricJudge:
    """StrongREJECT's questions: refused, convincing, specific; a model behind an endpoint decides."""
    return _judge(strongreject_rubric(), rest)


def _judge(rubric: Rubric, rest: str) -> RubricJudge:
    address, _, query = rest.partition("?")
    options = _options(rubric.name, query)
    model, urls = _split(address)
    if not urls:
        given = os.environ.get(BASE_URL_ENV, "").strip()
        if not given:
            # No default: harmful texts are sent to nobody whom the user did not name.
            raise UserError(f"judge {rubric.name} has no server: give {rubric.name}:MODEL@URL, or set {BASE_URL_ENV}")
        urls = [given]
    key_env = options.get("key_env", KEY_ENV)
    client = Client(
        [Server(url=url, model=model, key_env=key_env) for url in urls],
        concurrency=_number(options, "concurrency", int, 16, least=1),
        timeout_seconds=_number(options, "timeout", float, 300.0, least=0.001),
        retries=_number(options, "retries", int, 6, least=0),
    )
    seed = options.get("seed")
    sampling = RubricSampling(
        temperature=None if options.get("temperature") == "none" else _number(options, "temperature", float, 0.0),
        max_tokens=_number(options, "max_tokens", int, 1024, least=1),
        token_field=_token_field(options),
        seed=None if seed is None else _number(options, "seed", int, 0),
    )
    return RubricJudge(
        rubric,
        client,
        model=model or client.open()[0].model,
        sampling=sampling,
        cache=ReplyCache(_cache_path(options.get("cache", ""))),
        prices=Prices(prompt=_price(options, "price_in"), completion=_price(options, "price_out")),
    )


def _split(address: str) -> tuple[str, list[str]]:
    """MODEL@URL|URL, MODEL, URL or nothing -> the model and its servers."""
    match = _ADDRESS.fullmatch(address)
    if match:
        model, url = match["model"] or "", match["url"]
    else:
        model, _, url = address.rpartition("@") if "@" in address else (address, "", "")
    return model.strip(), [part for part in url.split("|") if part.strip()]


def _options(judge: str, query: str) -> dict[str, str]:
    options = {}
    for part in filter(None, query.split("&")):
        name, equals, value = part.partition("=")
        if name not in OPTIONS or not equals:
            # The value is not repeated: it may be a key.
            close = difflib.get_close_matches(name, OPTIONS, n=1)
            hint = f"did you mean {close[0]}?" if close else f"the options are {', '.join(OPTIONS)}"
            raise UserError(f"judge {judge}: unknown option {name[:30]!r}; {hint}")
        options[name] = unquote(value)
    return options


def _number(
    options: Mapping[str, str], name: str, kind: Callable[[str], Number], default: Number, *, least: float = 0
) -> Number:
    given = options.get(name)
    if given is None:
        return default
    try:
        value = kind(given)
    except ValueError:
        raise UserError(f"judge option {name}={given!r} is no number") from None
    if not least <= value < float("inf"):
        raise UserError(f"judge option {name}={given} cannot be; give at least {least:g}")
    return value


def _price(options: Mapping[str, str], name: str) -> float | None:
    return _number(options, name, float, 0.0) if name in options else None


def _token_field(options: Mapping[str, Any]) -> str:
    field = str(options.get("token_field", "max_tokens"))
    if field not in ("max_tokens", "max_completion_tokens"):
        raise UserError(f"judge option token_field={field!r}; give max_tokens or max_completion_tokens")
    return field


def _cache_path(given: str) -> Path | None:
    if given == "none":
        return None
    return Path(given).expanduser() if given else default_path()
