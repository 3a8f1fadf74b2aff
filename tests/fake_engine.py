"""An OpenAI-compatible server of a tiny model, on loopback: what it writes is what `generate` writes in process.

Dialects and vices are switches, so that a trial can be shown every kind of server.
"""

from __future__ import annotations

import threading
from typing import Any

from deepalign.batching import Job
from deepalign.generation import generate
from deepalign.records import Sampling

KINDS = ("vllm", "llama.cpp", "plain", "chat")
"""Ids out on the OpenAI path; llama.cpp's own path; ids in but only text out and nothing extra; chat alone."""
VICES = ("bos", "template", "anew", "other template", "no continue", "repeats", "no seed", "foreign", "no usage")


class FakeEngine:
    """Answers of one kind of server; an `Answer` of `FakeEndpoint`."""

    def __init__(self, model: Any, tokenizer: Any, *, kind: str = "vllm", vice: str = "") -> None:
        assert kind in KINDS, kind
        assert vice in ("", *VICES), vice
        self.model, self.tokenizer, self.kind, self.vice = model, tokenizer, kind, vice
        self._lock = threading.Lock()
        self._calls = 0

    def __call__(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        """One answer."""
        with self._lock:
            self._calls += 1
            if path == "/completion" and self.kind == "llama.cpp":
                return self._llama(body)
            if path == "/v1/completions" and self.kind in ("vllm", "plain"):
                return self._completions(body)
            if path == "/v1/chat/completions" and self.kind != "llama.cpp":
                return self._chat(body)
            if path == "/tokenize" and self.kind in ("vllm", "llama.cpp"):
                return 200, {"tokens": self.tokenizer(body["prompt"], add_special_tokens=False)["input_ids"]}
        return 404, {"error": {"message": f"no {path}", "code": 404}}

    def _read(self, ids: list[int]) -> list[int]:
        """What the server makes of the ids that it is sent."""
        if self.vice == "bos":
            return [self.tokenizer.bos_token_id, *ids]
        if self.vice == "template":
            return [*ids, *self.tokenizer("assistant", add_special_tokens=False)["input_ids"]]
        return ids

    def _write(self, ids: list[int], body: dict[str, Any], most: int) -> tuple[list[int], str]:
        limit = self.model.config.max_position_embeddings
        if len(ids) + most > limit:
            raise _TooLong(f"This model's maximum context length is {limit} tokens")
        sampling = Sampling(
            temperature=body["temperature"],
            top_p=body["top_p"],
            top_k=max(0, body.get("top_k", 0)),
            max_new_tokens=most,
        )
        seed = self._calls if self.vice == "no seed" else body["seed"]
        stops = body.get("stop_token_ids", [self.tokenizer.eos_token_id])
        (made,) = generate(self.model, [Job(ids=tuple(ids), sampling=sampling, seed=seed)], stop_ids=stops)
        return list(made.token_ids), made.finish

    def _text(self, ids: list[int]) -> str:
        if self.vice == "foreign":
            ids = [5 + token % 300 for token in ids]
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def _llama(self, body: dict[str, Any]) -> tuple[int, Any]:
        read = self._read(body["prompt"])
        try:
            ids, finish = self._write(
                read, {**body, "stop_token_ids": [self.tokenizer.eos_token_id]}, body["n_predict"]
            )
        except _TooLong as error:
            return 400, {"error": {"message": str(error)}}
        return 200, {
            "content": self._text(ids),
            # llama.cpp gives the stop token too.
            "tokens": [*ids, self.tokenizer.eos_token_id] if finish == "stop" else ids,
            "stop_type": {"stop": "eos", "length": "limit"}[finish],
            "tokens_evaluated": len(read),
            "tokens_predicted": len(ids),
            "truncated": False,
        }

    def _completions(self, body: dict[str, Any]) -> tuple[int, Any]:
        if self.kind == "plain" and "top_k" in body:
            return 400, {"error": {"message": "Unrecognized request argument supplied: top_k"}}
        read = self._read(body["prompt"])
        return self._told(self._opened(read) if self.vice == "anew" else read, len(read), body, "text")

    def _opened(self, ids: list[int]) -> list[int]:
        """The ids up to where the assistant's turn begins."""
        header = self.tokenizer("<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
        ends = [end for end in range(len(ids), 0, -1) if ids[max(0, end - len(header)) : end] == header]
        return ids[: ends[0]]

    def _chat(self, body: dict[str, Any]) -> tuple[int, Any]:
        turns = body["messages"]
        prefill = turns[-1]["content"] if turns[-1]["role"] == "assistant" else ""
        asked = turns[:-1] if prefill else turns
        goes_on = body.get("continue_final_message") and self.vice != "no continue"
        template = self.tokenizer.chat_template
        if self.vice == "other template":
            template = "{{ bos_token }}" + template.replace("<|im_end|>", "<|im_end|><|im_end|>")
        render = self.tokenizer.apply_chat_template
        if prefill and not goes_on:
            ids = render(turns, chat_template=template, add_generation_prompt=True, return_dict=False)
        else:
            ids = render(asked, chat_template=template, add_generation_prompt=True, return_dict=False)
            ids += self.tokenizer(prefill, add_special_tokens=False)["input_ids"]
        return self._told(ids, len(ids), body, "message", prefill if self.vice == "repeats" else "")

    def _told(
        self, read: list[int], num_read: int, body: dict[str, Any], form: str, before: str = ""
    ) -> tuple[int, Any]:
        try:
            ids, finish = self._write(read, body, body["max_tokens"])
        except _TooLong as error:
            return 400, {"error": {"message": str(error)}}
        text = before + self._text(ids)
        choice: dict[str, Any] = {"index": 0, "finish_reason": finish}
        choice |= {"text": text} if form == "text" else {"message": {"role": "assistant", "content": text}}
        if self.kind == "vllm" and body.get("return_token_ids"):
            # vLLM gives the stop token too, though no text of it.
            choice["token_ids"] = [*ids, self.tokenizer.eos_token_id] if finish == "stop" else ids
            choice["prompt_token_ids"] = read
        usage = {"prompt_tokens": num_read, "completion_tokens": len(ids) + (finish == "stop")}
        return 200, {"choices": [choice], **({} if self.vice == "no usage" else {"usage": usage})}


class _TooLong(Exception):
    pass
