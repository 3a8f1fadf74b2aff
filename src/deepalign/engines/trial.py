"""What a server really does, found out once before it is used: ids or text, prefills, sampling, whose tokens.

A server that adds a token, puts a template of its own around what it is sent, or begins anew where it should go on
would give numbers of something else; it is refused. What only makes a run less exact (draws that no seed brings back,
ids taken from text) is told and noted.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence

from deepalign.batching import Job
from deepalign.chat import answer_ids, conversation, render, stop_ids
from deepalign.endpoints.client import Client, ServersGoneError
from deepalign.endpoints.exchange import Reply, Request
from deepalign.endpoints.servers import Server
from deepalign.engines.dialects import Chat, Completion, Completions, Dialect, Told
from deepalign.engines.found import Found, check_alike
from deepalign.engines.served import ServedEngine, misread, own_text, written
from deepalign.errors import UserError
from deepalign.readers import Reads
from deepalign.records import Sampling

TEXTS = ("Name a colour.", "Write one sentence about bread.", "Count from one to ten.")
_GREEDY = Sampling(temperature=0.0, max_new_tokens=8)
_DRAWN = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=12)
_CUTS = (1, 3, 5)
"""Numbers of greedy tokens that are forced, to see whether the server goes on with the next."""
_LEAD = "Sure, here are the steps."
_TELLING = 6
"""Characters of a text by which two are told apart."""
_BARE = "top-k, stop ids"
_REMEDY = "use a server that takes token ids (vLLM, SGLang, llama.cpp), or leave prefills out (--depths 0)"
_TEMPLATE = "start it with this one, or give its with --chat-template"

logger = logging.getLogger("deepalign")


def open_engine(client: Client, reader: Reads, *, prefills: bool, logprobs: bool = False) -> ServedEngine:
    """Find out what the servers do, and the engine that asks them so.

    Args:
        client: Of the servers.
        reader: The model that they are said to hold.
        prefills: Whether forced beginnings are needed.
        logprobs: Whether continuations carry log-probabilities.

    Raises:
        UserError: A server cannot be used; one line that says why.
    """
    servers = client.open()
    for missing in client.servers:
        if not any(server.url.startswith(missing.url) for server in servers):
            logger.warning("%s is not there; going on without", missing.url)
    trials = [Trial(server, reader, prefills=prefills, logprobs=logprobs) for server in servers]
    found = [trial.run() for trial in trials]
    for one in found:
        logger.info("%s", one.told)
    for one in found[1:]:
        check_alike(found[0], one)
    facts = {"told": [one.told for one in found], "servers": [dataclasses.asdict(one) for one in found]}
    model = found[0].model
    return ServedEngine(client, trials[0].dialect, reader.tokenizer, model=model, facts=facts, logprobs=logprobs)


class Trial:
    """The trial of one server."""

    def __init__(self, server: Server, reader: Reads, *, prefills: bool, logprobs: bool) -> None:
        self._server = server
        self._client = Client(server, concurrency=8, retries=2)
        self._tokenizer = reader.tokenizer
        self._name = reader.name
        self._prefills = prefills
        self._logprobs = logprobs
        self._stops = stop_ids(reader.tokenizer, reader.generation_config)
        self._jobs = []
        for text in TEXTS:
            messages = conversation(text, None)
            ids = render(reader.tokenizer, reader.template, messages).ids
            self._jobs.append(Job(ids=ids, sampling=_GREEDY, seed=1, messages=messages))
        self.dialect: Dialect = Completion()

    def run(self) -> Found:
        """Everything that is found out; raises `UserError` where the server cannot be used."""
        told = self._choose()
        greedy = tuple(self._ids(job, one) for job, one in zip(self._jobs, told, strict=True))
        prefill = self._prefill(greedy) if self._prefills else ""
        seeds = self._seeds()
        again = tuple(self._ids(job, one) for job, one in zip(self._jobs, self._ask(self._jobs), strict=True))
        read_ids = "echoed" if told[0].prompt_ids is not None else "untold" if told[0].num_prompt is None else "counted"
        return Found(
            url=self._server.url,
            model=self._server.model,
            way=self.dialect.name,
            written_ids="from text" if told[0].token_ids is None else "returned",
            read_ids=read_ids,
            prefill=prefill,
            tokenizer=self._tokenize(),
            seeds=seeds,
            greedy_repeats=again == greedy,
            left_out="" if getattr(self.dialect, "extras", True) else _BARE,
            greedy=greedy,
        )

    def _choose(self) -> list[Told]:
        """Take the first dialect that the server answers in; its greedy answers."""

        def decode(ids: Sequence[int]) -> str:
            return str(self._tokenizer.decode(ids, skip_special_tokens=True))

        dialects: list[Dialect] = [Completion(), Completions(), Completions(extras=False)]
        dialects += [Chat(decode=decode), Chat(decode=decode, extras=False)]
        reasons: dict[str, str] = {}
        for dialect in dialects:
            self.dialect = dialect
            reply = self._reply(self._jobs[0])
            if reply.status == "failed":
                reasons[dialect.path] = reply.reason
                continue
            try:
                dialect.read(reply.body)
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                reasons[dialect.path] = f"its answer cannot be read ({error})"
                continue
            return self._ask(self._jobs)
        whys = "; ".join(f"{path}: {why}" for path, why in reasons.items())
        raise UserError(f"{self._server.url} neither takes token ids nor chats ({whys})")

    def _reply(self, job: Job) -> Reply:
        (reply,) = self._send([self._request(job)])
        return reply

    def _request(self, job: Job) -> Request:
        return Request(path=self.dialect.path, body=self.dialect.body(job, self._stops, logprobs=self._logprobs))

    def _send(self, requests: Sequence[Request]) -> list[Reply]:
        try:
            replies = dict(self._client.send(requests))
        except ServersGoneError as error:
            # A path that is not there; the next one may be.
            return [Reply(status="failed", reason=str(error))] * len(requests)
        return [replies[place] for place in range(len(requests))]

    def _ask(self, jobs: Sequence[Job]) -> list[Told]:
        """Answers, checked as in a run; raises `UserError` where the server fails or reads something else."""
        told = []
        for job, reply in zip(jobs, self._send([self._request(job) for job in jobs]), strict=True):
            if reply.status == "failed":
                raise UserError(f"{self._server.url} fails: {reply.reason}")
            one = self.dialect.read(reply.body)
            self._check_read(job, one)
            if one.token_ids is not None:
                self._check_tokens(one)
            told.append(one)
        return told

    def _check_read(self, job: Job, told: Told) -> None:
        problem = misread(job, told)
        if not problem:
            return
        if self.dialect.takes_ids:
            more = (told.num_prompt or len(told.prompt_ids or ())) - len(job.ids)
            cause = "adds a token, likely a BOS, to" if more == 1 else "changes, as by a template of its own,"
            raise UserError(f"{self._server.url} {cause} the ids that it is sent ({problem}); it cannot be used")
        if job.num_prefill:
            raise UserError(f"{self._server.url} does not go on after an assistant's message ({problem}); {_REMEDY}")
        raise UserError(f"{self._server.url} has another chat template than {self._name} ({problem}); {_TEMPLATE}")

    def _check_tokens(self, told: Told) -> None:
        """Refuse a server whose ids mean something else here."""
        here = self._tokenizer.decode(told.token_ids, skip_special_tokens=True)
        # Half a character at the end is shown by some and withheld by others.
        if here.replace("\ufffd", "").strip() != told.text.replace("\ufffd", "").strip():
            raise UserError(
                f"{self._server.url} has other tokens than {self._name}: it wrote {told.text[:40]!r} for ids that "
                f"mean {here[:40]!r}; let MODEL name the model that is served"
            )

    def _ids(self, job: Job, told: Told) -> tuple[int, ...]:
        return written(self.dialect, self._tokenizer, job, told, self._stops).token_ids

    def _prefill(self, greedy: Sequence[tuple[int, ...]]) -> str:
        """Whether the server goes on after a forced beginning of its own answer with what came next in it."""
        counted = False
        if not self.dialect.takes_ids:
            # Of the count alone: a message that is closed, or left out, is told by it.
            (lead,) = self._ask([self._forced(self._jobs[0], answer_ids(self._tokenizer, _LEAD))])
            counted = lead.num_prompt is not None
        cuts = [
            (self._forced(job, ids[:cut]), ids)
            for job, ids in zip(self._jobs, greedy, strict=True)
            for cut in _CUTS
            if cut < len(ids) and self._can_force(ids[:cut])
        ]
        told = self._ask([forced for forced, _ in cuts])
        if isinstance(self.dialect, Chat):
            leads = [self.dialect.prefill(forced) for forced, _ in cuts]
            repeats = sum(one.text.startswith(lead) for one, lead in zip(told, leads, strict=True)) * 2 > len(cuts)
            self.dialect = dataclasses.replace(self.dialect, repeats=repeats)
        tried = len(cuts)
        kept = sum(self._goes_on(forced, ids, one) for (forced, ids), one in zip(cuts, told, strict=True))
        if not tried and not counted:
            raise UserError(f"{self._server.url} writes too little to {TEXTS[0]!r} to try a prefill; {_REMEDY}")
        if kept * 2 < tried:
            anew = sum(self._begins(forced, ids, one) for (forced, ids), one in zip(cuts, told, strict=True))
            what = "begins its answer anew" if anew * 2 > tried else "goes on otherwise"
            raise UserError(f"{self._server.url} {what} after {tried - kept} of {tried} prefills; {_REMEDY}")
        return f"{kept} of {tried}" if tried else "counted"

    def _forced(self, job: Job, ids: tuple[int, ...]) -> Job:
        return dataclasses.replace(job, ids=(*job.ids, *ids), num_prefill=len(ids))

    def _can_force(self, ids: tuple[int, ...]) -> bool:
        """Whether ids survive the way that they are sent: as text, some are cut into others."""
        text = str(self._tokenizer.decode(ids, skip_special_tokens=True))
        return self.dialect.takes_ids or answer_ids(self._tokenizer, text) == ids

    def _goes_on(self, job: Job, ids: tuple[int, ...], told: Told) -> bool:
        cut = job.num_prefill
        if told.token_ids is not None:
            return told.token_ids[:1] == ids[cut : cut + 1]
        lead, whole = (str(self._tokenizer.decode(part, skip_special_tokens=True)) for part in (ids[:cut], ids))
        wanted = whole[len(lead) :].strip()[:_TELLING]
        return own_text(self.dialect, job, told.text).strip().startswith(wanted)

    def _begins(self, job: Job, ids: tuple[int, ...], told: Told) -> bool:
        whole = str(self._tokenizer.decode(ids, skip_special_tokens=True)).strip()
        return own_text(self.dialect, job, told.text).strip().startswith(whole[:_TELLING])

    def _seeds(self) -> bool:
        job = dataclasses.replace(self._jobs[1], sampling=_DRAWN)
        draws = [one.text for one in self._ask([dataclasses.replace(job, seed=seed) for seed in (1, 1, 2, 3)])]
        return draws[0] == draws[1] and len(set(draws)) > 1

    def _tokenize(self) -> str:
        """Compare how a text is cut, on the path that vLLM and llama.cpp have for it."""
        text = f"{self._tokenizer.decode(self._jobs[0].ids)} Bread — naïve 12345, ok?\n\n\tif x:"
        flags = {"add_special_tokens": False, "add_special": False, "parse_special": True}
        (reply,) = self._send([Request(path="/tokenize", body={"prompt": text, "content": text, **flags})])
        tokens = reply.body.get("tokens")
        if reply.status == "failed" or not isinstance(tokens, list):
            return "untold"
        return "agrees" if tokens == self._tokenizer(text, add_special_tokens=False)["input_ids"] else "differs"
