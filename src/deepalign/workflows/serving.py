"""Which engine an audit asks, and what that leaves out: probes that look into weights which servers hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deepalign.config import AuditConfig, settings_of
from deepalign.config_engine import HF, NEED_WEIGHTS, engine_urls
from deepalign.endpoints.client import Client
from deepalign.endpoints.servers import Server
from deepalign.engines.found import same_greedy
from deepalign.engines.served import ServedEngine
from deepalign.engines.trial import open_engine
from deepalign.errors import UserError
from deepalign.readers import Reads

_PLACE = ("engine", "engine_model", "engine_key_env", "engine_concurrency", "white_box")
"""Settings that say where servers are; what they hold is found out, and counts instead."""


def without_weights(config: AuditConfig) -> dict[str, str]:
    """Probes that cannot run because servers hold the weights, with the reason."""
    if config.engine == HF or _beside(config):
        return {}
    probes = NEED_WEIGHTS if config.suffix is not None else (*NEED_WEIGHTS, "suffix")
    reason = "needs weights, which --engine openai leaves on the servers; --white-box beside loads them here too"
    return dict.fromkeys(probes, reason)


def looks_inside(config: AuditConfig, probes: Sequence[str]) -> bool:
    """Whether one of the probes needs the target's weights in this process."""
    searches = "suffix" in probes and config.suffix is None
    return searches or bool(set(NEED_WEIGHTS) & set(probes))


def prefills(config: AuditConfig, probes: Sequence[str]) -> bool:
    """Whether the engine is asked to go on after forced tokens."""
    return ("prefill" in probes and max(config.depths) > 0) or "any-depth" in probes


def deciding_settings(config: AuditConfig, presentation: Sequence[str]) -> dict[str, Any]:
    """An audit's settings without those that do not decide its numbers; of the engine only its kind."""
    settings = settings_of(config, (*presentation, *_PLACE))
    return {**settings, "engine": config.engine.partition(":")[0]}


def open_served(config: AuditConfig, reader: Reads, *, prefills: bool) -> ServedEngine:
    """The engine of an audit's servers, after their trial; raises `UserError` where they cannot be used."""
    servers = [
        Server(url=url, model=config.engine_model, key_env=config.engine_key_env) for url in engine_urls(config.engine)
    ]
    return open_engine(Client(servers, concurrency=config.engine_concurrency), reader, prefills=prefills)


def check_same_answers(known: dict[str, Any] | None, now: dict[str, Any] | None) -> None:
    """Refuse to go on with a run that other weights began; raises `UserError`."""
    if not known or not now:
        return
    before, after = known["servers"][0], now["servers"][0]
    if same_greedy(before["greedy"], after["greedy"]) == 0:
        raise UserError(
            f"{after['url']} answers otherwise than {before['url']} did when this run began: it holds other weights; "
            "give another --output"
        )


def _beside(config: AuditConfig) -> bool:
    return config.white_box == "beside" or (config.white_box == "auto" and config.probes is not None)
