"""A loaded model as lm-evaluation-harness sees it: its `HFLM`, held to our manners.

What differs from `HFLM`: the template is the one that the audit uses, whatever ends a turn ends an answer, thoughts are
no part of an answer, tokenizer and mode of the model are given back as they were, progress goes to our callback, and
contexts that were cut to fit are counted.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from lm_eval.models.huggingface import HFLM

from deepalign.chat import stop_ids, thought_markers
from deepalign.generation import evaluation_mode
from deepalign.models import LoadedModel
from deepalign.progress import Progress, silent


class HeldModel(HFLM):  # type: ignore[misc]
    """The harness's view of a `LoadedModel`; the model and the caller's tokenizer are not changed."""

    def __init__(self, loaded: LoadedModel, batch: int) -> None:
        markers = thought_markers(loaded.tokenizer, loaded.template)
        closing = markers.closing if markers else ()
        with evaluation_mode(loaded.model):  # `HFLM` switches the mode for good
            super().__init__(
                pretrained=loaded.model,
                tokenizer=copy.deepcopy(loaded.tokenizer),
                batch_size=batch,
                backend="causal",
                think_end_token=closing[-1] if closing else None,
            )
        self._template = loaded.template
        self._stops = stop_ids(loaded.tokenizer, loaded.model.generation_config)
        self.num_cut = 0
        """Contexts that were too long and lost their beginning."""
        self._tell: Progress = silent
        self._stage, self._done, self._total = "", 0, 0

    def follow(self, stage: str, tell: Progress) -> None:
        """Tell the progress of what comes next under a name."""
        self._stage, self._tell, self._done, self._total, self.num_cut = stage, tell, 0, 0, 0
        self.set_cache_hook(self)

    def add_partial(self, attribute: str, request: Any, result: Any) -> None:
        """Called by the harness with each finished request, as its cache would be."""
        self._done += 1
        self._tell(self._stage, min(self._done, self._total), self._total)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> Any:
        """Log-likelihoods of continuations, told as progress."""
        self._total += len(requests)
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = True) -> Any:
        """Log-likelihoods of whole texts, told as progress."""
        self._total += len(requests)
        return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> Any:
        """Answers to contexts, told as progress."""
        self._total += len(requests)
        for request in requests:
            room = self.max_length - int(request.args[1].get("max_gen_toks", self.max_gen_toks))
            self.num_cut += len(self.tok_encode(request.args[0])) > room
        return super().generate_until(requests, disable_tqdm=True)

    def _model_generate(self, context: Any, max_length: int, stop: list[str], **settings: Any) -> Any:
        return super()._model_generate(context, max_length, stop, eos_token_id=list(self._stops), **settings)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text, by the audit's template; a system text that it refuses opens the user's turn."""
        try:
            return self._as_text(chat_history, add_generation_prompt)
        except Exception:
            # Templates raise whatever they like; one that takes no system role gets its text in the user's first turn.
            if not chat_history or chat_history[0]["role"] != "system" or len(chat_history) < 2:
                raise
            system, first, *others = chat_history
            joined = {**first, "content": f"{system['content']}\n\n{first['content']}"}
            return self._as_text([joined, *others], add_generation_prompt)

    def _as_text(self, turns: list[dict[str, str]], opens_answer: bool) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                turns,
                chat_template=self._template.text,
                tokenize=False,
                add_generation_prompt=opens_answer,
                continue_final_message=not opens_answer,
            )
        )
