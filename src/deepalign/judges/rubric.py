"""Rubric judges: a language model behind an endpoint reads the request and the answer, and says how harmful it is.

Two rubrics, their texts beside this file: the 1-to-5 usage-policy rubric in the manner of the paper (harmful only at
5), and StrongREJECT's three questions. Texts to be judged stand between marks with a code that they do not contain, and
are put in all at once, so that a text cannot end its place or fill another. Every failure is an unscored ruling with
its reason and what the judge wrote; nothing becomes a refusal by default.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepalign.endpoints.batch_files import Result
from deepalign.endpoints.cache import ReplyCache, key_of
from deepalign.endpoints.client import Client
from deepalign.endpoints.exchange import Reply, Request
from deepalign.endpoints.spending import Prices, Spending
from deepalign.errors import UserError
from deepalign.judges.rubric_reading import PARSER_VERSION, NoVerdictError, Reading, read_level, read_strongreject
from deepalign.records import JudgeInput, Ruling

_PLACE = re.compile(r"\{\{(fence|instruction|response)\}\}")
_REFUSED_REQUESTS = 8
"""So many requests in a row that a server calls wrong, and none that it takes, are a wrong setting."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rubric:
    """A text with places, and how a reply to it is read."""

    name: str
    text: str
    read: Callable[[str], Reading]
    tells_refusals: bool


def _rubric(name: str, file: str, read: Callable[[str], Reading], *, tells_refusals: bool) -> Rubric:
    text = Path(__file__).with_name(file).read_text(encoding="utf-8")
    return Rubric(name=name, text=text, read=read, tells_refusals=tells_refusals)


def policy_rubric() -> Rubric:
    """Levels 1 to 5 of a usage policy; harmful at 5."""
    return _rubric("rubric", "rubric_policy.txt", read_level, tells_refusals=False)


def strongreject_rubric() -> Rubric:
    """Refused, convincing, specific; a score from 0 to 1, compliance from 0.5."""
    return _rubric("strongreject", "rubric_strongreject.txt", read_strongreject, tells_refusals=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class RubricSampling:
    """How the judge answers; None leaves a field out, for servers that do not take it."""

    temperature: float | None = 0.0
    max_tokens: int = 1024
    token_field: str = "max_tokens"
    """Name under which the server takes the limit; OpenAI's reasoning models want max_completion_tokens."""
    seed: int | None = None

    def fields(self) -> dict[str, Any]:
        """The request's fields."""
        given = {"temperature": self.temperature, self.token_field: self.max_tokens, "seed": self.seed}
        return {name: value for name, value in given.items() if value is not None}


class RubricJudge:
    """A rubric put to a model; rulings come as replies come."""

    def __init__(
        self,
        rubric: Rubric,
        client: Client,
        *,
        model: str,
        sampling: RubricSampling | None = None,
        cache: ReplyCache | None = None,
        prices: Prices | None = None,
    ) -> None:
        """Nothing is sent yet.

        Args:
            rubric: What to ask.
            client: Whom.
            model: Name of the judging model, as its server calls it.
            sampling: How it answers.
            cache: Replies that were paid for; None remembers nothing.
            prices: For telling the cost.
        """
        self.rubric = rubric
        self.client = client
        self.model = model
        self.sampling = sampling or RubricSampling()
        self.cache = cache or ReplyCache(None)
        self.prices = prices or Prices()
        self.spending = Spending()
        self.sends = True
        """Whether missing replies are asked for; without, their texts stay open."""
        self._given: dict[str, Result] = {}
        self.tells_refusals = rubric.tells_refusals
        slug = re.sub(r"[^A-Za-z0-9._-]+", "-", model).strip("-.")[-60:].strip("-.") or "model"
        self.name = f"{rubric.name}-{slug}"
        decides = json.dumps([rubric.text, PARSER_VERSION, model, self.sampling.fields()], sort_keys=True)
        self.version = f"{rubric.name}-{hashlib.sha256(decides.encode()).hexdigest()[:12]}"

    def judge(self, items: Sequence[JudgeInput]) -> list[Ruling]:
        """Rule on each item; same order and length."""
        rulings = dict(self.judge_each(items))
        return [rulings[index] for index in range(len(items))]

    def judge_each(self, items: Sequence[JudgeInput]) -> Iterator[tuple[int, Ruling]]:
        """Rulings with the index of their item, as replies come; equal items are asked once.

        Raises:
            UserError: No server is left, or it takes no request of ours; what came before has been yielded.
        """
        asked: dict[str, list[int]] = {}
        requests: dict[str, Request] = {}
        for index, item in enumerate(items):
            if not item.response.strip():
                yield index, _unscored("the text is empty")
                continue
            request = self.request(item)
            key = key_of(request)
            requests[key] = request
            asked.setdefault(key, []).append(index)
        known = self._known(list(requests))
        for key, ruling in known.items():
            yield from ((index, ruling) for index in asked[key])
        if self.sends:
            missing = {key: request for key, request in requests.items() if key not in known}
            for key, ruling in self._sent(missing):
                yield from ((index, ruling) for index in asked[key])

    def _known(self, keys: Sequence[str]) -> dict[str, Ruling]:
        """Rulings of what was paid for already: imported results, then the cache."""
        known = {key: self.rule(self._given[key]) for key in keys if key in self._given}
        cached = self.cache.get([key for key in keys if key not in known])
        self.spending.from_cache += len(cached)
        return known | {key: self.read(body) for key, body in cached.items()}

    def _sent(self, requests: dict[str, Request]) -> Iterator[tuple[str, Ruling]]:
        keys = list(requests)

        def keep(position: int, reply: Reply) -> None:
            if reply.status == "ok":
                self.cache.put(keys[position], kept(reply.body))

        none_taken = True
        for number, (position, reply) in enumerate(self.client.send(list(requests.values()), keep=keep)):
            self.spending.add(reply)
            none_taken = none_taken and reply.reason.startswith("HTTP 4")
            if none_taken and number + 1 == _REFUSED_REQUESTS:
                raise UserError(f"judge {self.name}: its server takes no request of ours ({reply.reason})")
            yield keys[position], self.rule(reply)

    def keys(self, items: Sequence[JudgeInput]) -> list[str]:
        """Content keys of the requests about items; empty texts need none."""
        return [key_of(self.request(item)) for item in items if item.response.strip()]

    def missing(self, items: Sequence[JudgeInput]) -> list[Request]:
        """Requests about items whose replies are not there yet, each once."""
        requests = [self.request(item) for item in items if item.response.strip()]
        wanted = {key_of(request): request for request in requests}
        known = self.cache.get(list(wanted))
        return [request for key, request in wanted.items() if key not in known and key not in self._given]

    def take(self, result: Result) -> bool:
        """Take a batch's result as a reply; False where it is worth asking again."""
        if result.status == "open":
            return False
        if result.status == "ok":
            self.cache.put(result.key, kept(result.body))
        self._given[result.key] = result
        return True

    def request(self, item: JudgeInput) -> Request:
        """What the judge is asked about an item; texts with the same prompt go to the same server."""
        content = fill(self.rubric.text, item)
        body = {"model": self.model, "messages": [{"role": "user", "content": content}], **self.sampling.fields()}
        return Request(body=body, prefix=item.prompt)

    def rule(self, reply: Reply | Result) -> Ruling:
        """The ruling of a reply, or of a batch's result."""
        return self.read(reply.body) if reply.status == "ok" else _unscored(f"no reply of the judge: {reply.reason}")

    def read(self, body: dict[str, Any]) -> Ruling:
        """The ruling of a good answer's body."""
        raw, reason = said(body)
        if reason:
            return _unscored(reason, raw)
        try:
            reading = self.rubric.read(raw)
        except NoVerdictError as error:
            return _unscored(str(error), raw)
        return Ruling(
            status="complied" if reading.harmful else "refused",
            outcome="complied" if reading.harmful else "held",
            reason=reading.told,
            refuses=reading.refuses,
            score=reading.score,
            raw=raw,
        )

    def account(self) -> dict[str, Any]:
        """What to note of the judge in a manifest: whom it asked, and how."""
        return {
            "model": self.model,
            "servers": [server.url for server in self.client.servers],
            "sampling": self.sampling.fields(),
            "version": self.version,
        }


def fill(text: str, item: JudgeInput) -> str:
    """A rubric with an item in its places, all put in at once; the fence's code stands in neither text."""
    for number in itertools.count():
        fence = hashlib.sha256(f"{number}\0{item.prompt}".encode("utf-8", "surrogatepass")).hexdigest()[:12]
        if fence not in item.prompt and fence not in item.response:
            break
    values = {"fence": fence, "instruction": _sendable(item.prompt), "response": _sendable(item.response)}
    return _PLACE.sub(lambda place: values[place[1]], text)


def _sendable(text: str) -> str:
    """Half of a surrogate pair, as a cut text may hold, is no UTF-8."""
    return text.encode("utf-8", "replace").decode("utf-8")


def said(body: dict[str, Any]) -> tuple[str, str]:
    """What a chat completion says, and why it is no whole reply; "" where it is one."""
    choice = body["choices"][0]
    message = choice.get("message")
    message = message if isinstance(message, dict) else {}
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
    raw = content if isinstance(content, str) else ""
    refusal = message.get("refusal")
    finish = choice.get("finish_reason")
    if isinstance(refusal, str) and refusal:
        return raw or refusal, "the judge refused to judge"
    if finish == "content_filter":
        return raw, "the judge's provider filtered the reply"
    if finish == "length":
        return raw, "the judge's reply was cut off; give it more max_tokens"
    return raw, "" if raw.strip() else "the judge's reply is empty"


def kept(body: dict[str, Any]) -> dict[str, Any]:
    """The parts of an answer that decide the ruling, and what it cost."""
    choice = body["choices"][0]
    message = choice.get("message")
    message = message if isinstance(message, dict) else {}
    parts = {name: message[name] for name in ("content", "refusal") if message.get(name) is not None}
    return {
        "choices": [{"message": parts, "finish_reason": choice.get("finish_reason")}],
        **{name: body[name] for name in ("model", "usage") if name in body},
    }


def _unscored(reason: str, raw: str = "") -> Ruling:
    return Ruling(status="unscored", outcome="unscored", reason=reason, raw=raw)
