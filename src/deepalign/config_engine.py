"""Settings of what generates: in this process, or on servers; imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from deepalign.config_run import RunSettings, Whole, at_least
from deepalign.errors import UserError

HF, OPENAI = "hf", "openai"
NEED_WEIGHTS = ("onset", "ranks", "rap", "abliteration", "kl", "finetuning")
"""Probes that look into the model; `suffix` does too, unless suffixes are replayed."""
_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineSettings(RunSettings):
    """What generates the model's answers."""

    engine: str = HF
    """What generates: hf (this process), or openai:URL[,URL...], servers that hold the model; see docs/engines.md."""

    engine_model: str = ""
    """Name of the model on those servers; default the only one that they list."""

    engine_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the servers' key; the key itself is never kept."""

    engine_concurrency: Whole = 32
    """Requests at a time, for each server."""

    white_box: Literal["auto", "beside", "skip"] = "auto"
    """With servers, probes that need weights: beside (loaded here too), skip, or auto: beside if named by --probes."""


def engine_urls(engine: str) -> tuple[str, ...]:
    """Addresses of the servers that an engine names; none for `hf`.

    Raises:
        UserError: It is neither, or an address cannot be one.
    """
    if engine == HF:
        return ()
    kind, colon, rest = engine.partition(":")
    if kind != OPENAI or not colon:
        raise UserError(
            f"--engine {_shown(engine)} is unknown; give hf, or openai:URL such as openai:http://HOST:8000/v1"
        )
    urls = tuple(part.strip().rstrip("/") for part in rest.split(","))
    for number, url in enumerate(urls, start=1):
        if not _is_address(url):
            where = f"address {number} of {len(urls)}" if len(urls) > 1 else "the address"
            raise UserError(f"--engine: {where}, {_shown(url)}, is none; give http://HOST:PORT/v1, joined by commas")
    twice = sorted({url for url in urls if urls.count(url) > 1})
    if twice:
        raise UserError(f"--engine names {_shown(twice[0])} twice; give each server once")
    return urls


def check_engine(settings: EngineSettings) -> None:
    """Refuse values that cannot be meant; raises `UserError`."""
    engine_urls(settings.engine)
    at_least("engine-concurrency", settings.engine_concurrency, 1)
    if not _ENV_NAME.fullmatch(settings.engine_key_env):
        # The value is not repeated: it may be a key that was given by mistake.
        raise UserError("--engine-key-env is no name of an environment variable; give the name, not the key itself")


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and " " not in url
    except ValueError:
        return False


def _shown(text: str) -> str:
    """An address as it may be repeated: what stands before an @ may be a password."""
    return repr(re.sub(r"//[^/@]*@", "//...@", text)[:100])
