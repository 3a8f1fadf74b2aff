"""Conversations to token ids and response mask: the only place where chat templates live.

Owns the rendering of a conversation plus a prefill, the one-BOS rule, and what ends a turn. Works on token ids from
end to end: a prefill of k ids is appended as k ids and never decoded and encoded again (the paper's code does, so
its k is approximate: `paper-facts.md` 6.13). Knows nothing of models, attacks or judges.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext

from deepalign.errors import UserError, first_line
from deepalign.records import Message, Site
from deepalign.thinking import Markers, markers, site_text

NO_TEMPLATE_REMEDY = "pass one with --chat-template FILE.jinja, or --chat-template plain for a bare User/Assistant one"
PLAIN_TEMPLATE = (
    "{{ bos_token or '' }}{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] }}\n"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)


class _GenerationTag(jinja2.ext.Extension):
    """Reads over `{% generation %}`, with which templates mark the assistant's tokens for `transformers`."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """The block's own statements."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatTemplate:
    """A chat template and where it came from."""

    text: str
    source: str
    """"model", "target", "plain", or the path of the user's file."""

    @property
    def hash(self) -> str:
        """First 16 hex digits of the SHA-256 of the template's text."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rendered:
    """A conversation as the model reads it."""

    ids: tuple[int, ...]
    """Token ids of the prompt and then of the response so far."""
    response_mask: tuple[bool, ...]
    """True where an id belongs to the response; same length as `ids`."""

    @property
    def response_start(self) -> int:
        """Index of the first response token, which is response position 0."""
        return len(self.ids) - sum(self.response_mask)


def resolve_template(tokenizer: Any, chosen: str | None, model_name: str) -> ChatTemplate | None:
    """The template to use: the user's choice, else the tokenizer's own; None where there is neither.

    Raises:
        UserError: The chosen file cannot be read or is not a template.
    """
    if chosen == "plain":
        return ChatTemplate(text=PLAIN_TEMPLATE, source="plain")
    if chosen:
        path = Path(chosen).expanduser()
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            remedy = "give a Jinja file, or plain"
            raise UserError(f"--chat-template {chosen}: cannot be read ({first_line(error)}); {remedy}") from error
        try:
            jinja2.Environment(extensions=["jinja2.ext.loopcontrols", _GenerationTag]).parse(text)
        except jinja2.TemplateSyntaxError as error:
            problem = f"line {error.lineno} is not valid Jinja ({error.message})"
            raise UserError(f"--chat-template {chosen}: {problem}") from error
        return ChatTemplate(text=text, source=str(path))
    own = getattr(tokenizer, "chat_template", None)
    if isinstance(own, dict):
        own = own.get("default")
    return ChatTemplate(text=own, source="model") if own else None


def conversation(user_text: str, system_prompt: str | None) -> tuple[Message, ...]:
    """A one-turn conversation; `None` means no system message, "" an explicit empty one."""
    turn = Message(role="user", content=user_text)
    return (turn,) if system_prompt is None else (Message(role="system", content=system_prompt), turn)


def render(
    tokenizer: Any,
    template: ChatTemplate,
    messages: Sequence[Message],
    prefill_ids: Sequence[int] = (),
    site: Site = "raw",
) -> Rendered:
    """Render a conversation up to the point where the assistant has written `prefill_ids` at a site of its turn.

    Control tokens in a message's text are encoded as plain text, so that a prompt cannot open a turn of its own.
    The result starts with exactly one BOS where the tokenizer's own convention adds one or the template writes one.

    Raises:
        UserError: The template fails on this conversation, drops one of its messages, or has no such site.
    """
    turns = [{"role": message.role, "content": message.content} for message in messages]
    shown, dropped = _shown(tokenizer, template, turns)
    if dropped:
        leave_out = ", or leave out --system-prompt" if dropped == "system" else ""
        raise UserError(
            f"the chat template ({template.source}) drops the {dropped} message; "
            f"pass another with --chat-template{leave_out}"
        )
    opened = site_text(_text_of(tokenizer, template), turns, site)
    ids = tokenizer.apply_chat_template(
        shown,
        chat_template=template.text,
        add_generation_prompt=opened is None,
        tokenize=True,
        return_dict=False,
        sanitize_control_tokens=True,
    )
    ids = _exactly_one_bos(tokenizer, list(ids))
    if opened is not None:
        ids += tokenizer(opened, add_special_tokens=False)["input_ids"]
    num_prompt = len(ids)
    return Rendered(
        ids=(*ids, *prefill_ids),
        response_mask=(False,) * num_prompt + (True,) * len(prefill_ids),
    )


def thought_markers(tokenizer: Any, template: ChatTemplate) -> Markers | None:
    """The ids between which a model with this template thinks; None where it does not."""
    return markers(tokenizer, _text_of(tokenizer, template))


def _text_of(tokenizer: Any, template: ChatTemplate) -> Any:
    return lambda turns, open_answer: _render_text(tokenizer, template, turns, open_answer=open_answer)


def assistant_header_ids(tokenizer: Any, template: ChatTemplate, site: Site = "raw") -> tuple[int, ...]:
    """The ids that the template puts between the user's text and the assistant's: turn end and assistant header.

    What the renderings of three short texts end in alike, so that these are the very ids a model reads there.

    Args:
        tokenizer: The model's.
        template: The chat template.
        site: Where in the assistant's turn its text begins.

    Raises:
        UserError: The template fails, has nothing there, or runs into the user's text in the middle of a token.
    """
    texts = ("Bake bread", "Count to ten", "Name a colour")
    rows = [render(tokenizer, template, conversation(text, None), site=site).ids for text in texts]
    length = 0
    while length < min(map(len, rows)) and len({row[-1 - length] for row in rows}) == 1:
        length += 1
    befores = [tokenizer.decode(row[: len(row) - length]).rstrip() for row in rows]
    if length == 0 or not all(before.endswith(text) for before, text in zip(befores, texts, strict=True)):
        problem = "puts no whole tokens of its own between the user's text and the assistant's"
        raise UserError(f"the chat template ({template.source}) {problem}; pass another with --chat-template")
    return rows[0][len(rows[0]) - length :]


def answer_ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    """Token ids of an answer's text, as response tokens: no BOS, no EOS, control tokens as plain text."""
    encoded = tokenizer(text, add_special_tokens=False, split_special_tokens=True)
    return tuple(encoded["input_ids"])


def turn_end_ids(tokenizer: Any, template: ChatTemplate) -> tuple[int, ...]:
    """The ids that the template writes after an assistant's text, up to and including the first stop token.

    Training puts the loss on them, so that a trained model learns to stop.

    Raises:
        UserError: The template fails on an answered conversation or drops the answer.
    """
    probe = "deepalign-probe"
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": probe}]
    text = _render_text(tokenizer, template, turns, open_answer=False)
    if probe not in text:
        raise UserError(f"the chat template ({template.source}) drops the assistant message; pass another")
    tail = tokenizer(text[text.rindex(probe) + len(probe) :], add_special_tokens=False)["input_ids"]
    stops = set(stop_ids(tokenizer))
    for index, token in enumerate(tail):
        if token in stops:
            return tuple(tail[: index + 1])
    return (tokenizer.eos_token_id,) if tokenizer.eos_token_id is not None else ()


def stop_ids(tokenizer: Any, generation_config: Any = None) -> tuple[int, ...]:
    """Every id that ends a response: the model's, the tokenizer's, and the usual end-of-turn tokens it knows."""
    found: set[int] = set()
    declared = getattr(generation_config, "eos_token_id", None)
    if declared is not None:
        found.update([declared] if isinstance(declared, int) else declared)
    if tokenizer.eos_token_id is not None:
        found.add(tokenizer.eos_token_id)
    added = tokenizer.get_added_vocab()
    turn_ends = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<turn|>", "<|end|>", "<|endofturn|>")
    # In the harmony format <|end|> ends a message, such as the thoughts, and <|return|> the turn.
    inner = {"<|end|>"} if "<|return|>" in added else set()
    found.update(added[token] for token in turn_ends if token in added and token not in inner)
    return tuple(sorted(found))


def _shown(tokenizer: Any, template: ChatTemplate, turns: list[dict[str, str]]) -> tuple[list[dict[str, Any]], str]:
    """The turns in a form that the template shows whole, and the role of one that it drops in any form ("" for none).

    Templates of models that also see images may read a list of parts only, and pass over a plain text.
    """
    as_parts = [{"role": turn["role"], "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
    dropped = ""
    for form in (turns, as_parts):
        try:
            text = _render_text(tokenizer, template, form, open_answer=True)
        except UserError:
            if form is turns:
                raise
            break
        gone = [turn["role"] for turn in turns if turn["content"].strip() and turn["content"].strip() not in text]
        if not gone:
            return form, ""
        dropped = dropped or gone[0]
    return turns, dropped


def _render_text(tokenizer: Any, template: ChatTemplate, turns: list[dict[str, Any]], *, open_answer: bool) -> str:
    try:
        text = tokenizer.apply_chat_template(
            turns, chat_template=template.text, add_generation_prompt=open_answer, tokenize=False
        )
    except Exception as error:
        # Templates raise whatever they like (Gemma's refuses a system role), so any failure is the template's word.
        roles = "+".join(turn["role"] for turn in turns)
        raise UserError(
            f"the chat template ({template.source}) refuses the roles {roles}: {first_line(error)}; "
            "pass another with --chat-template, or leave out --system-prompt"
        ) from error
    return str(text)


def _exactly_one_bos(tokenizer: Any, ids: list[int]) -> list[int]:
    bos = tokenizer.bos_token_id
    if bos is None:
        return ids
    start = 0
    while start < len(ids) and ids[start] == bos:
        start += 1
    if start == 0:
        plain = tokenizer("a")["input_ids"]
        adds_bos = len(plain) > 0 and plain[0] == bos
        return [bos, *ids] if adds_bos else ids
    return ids[start - 1 :]
