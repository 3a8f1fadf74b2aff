"""The search for a suffix: gradient, candidates, losses, and the best of them, step by step (GCG, arXiv 2307.15043).

One behaviour makes a search for that prompt; several make one universal suffix, for which they are taken in one after
the other as their targets are reached. Whatever was used to choose among candidates, the losses that are kept and told
are those of the model itself, over all active behaviours. A search that was stopped goes on from its state to the same
end. Knows nothing of judges or of generation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from deepalign.errors import UserError
from deepalign.generation import evaluation_mode
from deepalign.progress import Progress, silent
from deepalign.suffix.beginning import initial_suffix, search_key
from deepalign.suffix.behaviours import Behaviour, Ids, suffix_text, survivors
from deepalign.suffix.drafting import Draft, probes, texts_of, worth_reading
from deepalign.suffix.losses import Readings
from deepalign.suffix.panel import Panel, joined
from deepalign.suffix.proposals import allowed_tokens, draws, merged, step_generator
from deepalign.suffix.settings import SearchSettings
from deepalign.suffix.state import SearchResult, SearchState

__all__ = ["SearchResult", "SearchSettings", "SearchState", "search"]

_BARREN_STEPS = 10
"""Steps in a row without a candidate after which a search gives up."""
OnStep = Callable[[SearchState], None]
Confirm = Callable[[str], bool]


def search(
    model: Any,
    tokenizer: Any,
    behaviours: Sequence[Behaviour],
    settings: SearchSettings | None = None,
    *,
    state: SearchState | None = None,
    on_step: OnStep | None = None,
    confirm: Confirm | None = None,
    draft: Draft | None = None,
    progress: Progress = silent,
) -> SearchResult:
    """Search for one suffix that brings about every behaviour's target.

    Args:
        model: A `transformers` causal LM; not changed.
        tokenizer: Its tokenizer, with which the behaviours were made.
        behaviours: One, or several in the order in which they are taken in.
        settings: How to search.
        state: Where an earlier search stopped.
        on_step: Called with the state after each step; the same object each time.
        confirm: Whether a suffix's text does what it is to do, by generation. Asked once for each suffix with which
            greedy decoding gives every target; until it agrees the search goes on.
        draft: A smaller model that reads all candidates first, so that the model reads few (probe sampling).
        progress: Told of each step.

    Raises:
        UserError: There is no behaviour, the initial suffix does not come back from its text, the model cannot be
            searched with, or the state is another search's.
    """
    settings = settings or SearchSettings()
    if not behaviours:
        raise UserError("there are 0 behaviours to search a suffix for; give one or more")
    with evaluation_mode(model):
        running = _Search(model, tokenizer, tuple(behaviours), settings, confirm, draft)
        state = running.begin(state)
        progress("suffix", state.step, settings.steps)
        while not state.stopped and state.step < settings.steps:
            running.step()
            progress("suffix", state.step, settings.steps)
            if on_step is not None:
                on_step(state)
        return running.result()


class _Search:
    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        behaviours: tuple[Behaviour, ...],
        settings: SearchSettings,
        confirm: Confirm | None,
        draft: Draft | None,
    ) -> None:
        self._tokenizer, self._confirm, self._draft = tokenizer, confirm, draft
        self._settings, self._behaviours = settings, behaviours
        self._initial = initial_suffix(tokenizer, behaviours, settings)
        self._panel = Panel(model, behaviours, settings, self._initial)
        self._allowed_V = allowed_tokens(
            tokenizer, int(model.get_input_embeddings().weight.shape[0]), allow_non_ascii=settings.allow_non_ascii
        )
        # Behind prompts that end alike, and before the same text, the same candidates come back; nearly always.
        borders = {(at.before_ids[-1:], at.after_ids): number for number, at in reversed(list(enumerate(behaviours)))}
        self._borders = set(borders.values())
        self._state: SearchState

    def begin(self, state: SearchState | None) -> SearchState:
        """Go on from a state, or make the first."""
        key = search_key(self._behaviours, self._settings, self._initial, self._draft)
        if state is not None:
            if state.key != key:
                raise UserError(
                    "this state belongs to a search with other settings or behaviours; search with those, or begin anew"
                )
            self._state = state
            return state
        active = 1 if self._settings.progressive else len(self._behaviours)
        loss, matched = self._panel.mean(self._initial, active)
        self._state = SearchState(
            key=key,
            suffix=self._initial,
            loss=loss,
            active=active,
            best=self._initial,
            best_loss=loss,
            buffer=[(loss, self._initial)] if self._settings.buffer_size else [],
        )
        self._state.seen.add(self._initial)
        if matched:
            self._reached(self._initial)
        return self._state

    def step(self) -> None:
        """One step."""
        state, settings = self._state, self._settings
        generator = step_generator(settings.seed, state.step)
        everyone = list(range(state.active))
        few = settings.behaviours_per_step
        chosen = everyone
        if few is not None and few < state.active:
            chosen = sorted(torch.randperm(state.active, generator=generator)[:few].tolist())
        known = len(state.seen)
        candidates = self._candidates(self._scores(chosen), generator)
        state.step += 1
        if not candidates:
            state.barren += 1
            state.trace.append(state.loss)
            if state.barren >= _BARREN_STEPS:
                state.stopped = "no candidates"
            return
        state.barren = 0
        if self._draft is None:
            found = self._panel.read(chosen, candidates, state.suffix, screen=True)
        else:
            candidates, found = self._drafted(self._draft, chosen, candidates, known, generator)
        if settings.merge > 1:
            order = found.losses_N.argsort(stable=True)[: settings.merge].tolist()
            together = self._new(merged(state.suffix, [candidates[index] for index in order]))
            if together:
                candidates += together
                found = joined(found, self._panel.read(chosen, together, state.suffix, screen=True))
        state.evaluated += len(candidates)
        state.unread += int(torch.isinf(found.losses_N).sum())
        if self._panel.screens or chosen != everyone:
            order = found.losses_N.argsort(stable=True)[: settings.rescored].tolist()
            candidates = [candidates[index] for index in order]
            found = self._panel.read(everyone, candidates, state.suffix)
        self._take(candidates, found)

    def _drafted(
        self, draft: Draft, chosen: Sequence[int], candidates: list[Ids], known: int, generator: torch.Generator
    ) -> tuple[list[Ids], Readings]:
        """Those candidates that the model reads, and what it reads; the rest may be proposed again."""
        state = self._state
        *texts, near = texts_of(self._tokenizer, self._behaviours[0], [*candidates, state.suffix])
        places = probes(len(candidates), generator)
        first = self._panel.read(chosen, [candidates[place] for place in places], state.suffix, screen=True)
        losses = draft.losses(chosen, texts, near, self._settings)
        more = worth_reading(places, first.losses_N.tolist(), losses)
        read = [candidates[place] for place in (*places, *more)]
        state.drafted += len(candidates) - len(read)
        state.seen.forget(set(candidates) - set(read), since=known)
        if not more:
            return read, first
        rest = self._panel.read(chosen, read[len(places) :], state.suffix, screen=True)
        return read, joined(first, rest)

    def _scores(self, chosen: Sequence[int]) -> Tensor:
        """Scores of tokens, [L, V], from the gradient, and from that of the steps before."""
        state, momentum = self._state, self._settings.momentum
        gradient_LH = self._panel.gradient(chosen, state.suffix)
        if momentum:
            earlier_LH = gradient_LH if state.momentum_LH is None else state.momentum_LH
            gradient_LH = state.momentum_LH = momentum * earlier_LH + (1.0 - momentum) * gradient_LH
        return self._panel.token_scores(gradient_LH)

    def _candidates(self, scores_LV: Tensor, generator: torch.Generator) -> list[Ids]:
        state, settings = self._state, self._settings
        kept: list[Ids] = []
        for batch in draws(
            state.suffix,
            scores_LV,
            self._allowed_V,
            generator,
            topk=settings.topk,
            # Where single changes are used up, two together are not.
            n_replace=settings.replaced_at(state.step) + state.barren,
            order=settings.order,
            batch=settings.search_width,
        ):
            kept += self._new(batch, settings.search_width - len(kept))
            if len(kept) >= settings.search_width:
                break
        return kept

    def _new(self, candidates: Sequence[Ids], most: int | None = None) -> list[Ids]:
        """Those that the search has not come across and whose text comes back as their ids, `most` of them."""
        state = self._state
        fresh = list(dict.fromkeys(ids for ids in candidates if ids not in state.seen))
        state.repeated += len(candidates) - len(fresh)
        kept = fresh
        if self._settings.filter:
            for number in sorted(self._borders | set(range(state.active))):
                texts = survivors(self._tokenizer, self._behaviours[number], kept)
                kept = [ids for ids, text in zip(kept, texts, strict=True) if text is not None]
        state.drifted += len(fresh) - len(kept)
        left = set(kept[most:] if most is not None else ())
        for ids in fresh:
            # What is drawn beyond the need may be drawn again.
            if ids not in left:
                state.seen.add(ids)
        return kept[:most]

    def _take(self, candidates: Sequence[Ids], found: Readings) -> None:
        """Go on from the best candidate; take in the next behaviour, or stop, where targets are reached."""
        state, size = self._state, self._settings.buffer_size
        place = int(found.losses_N.argmin())
        loss, ids = float(found.losses_N[place]), candidates[place]
        if math.isfinite(loss):
            if size:
                state.buffer = sorted([*state.buffer, (loss, ids)])[:size]
                state.loss, state.suffix = state.buffer[0]
            else:
                state.loss, state.suffix = loss, ids
            if loss < state.best_loss:
                state.best, state.best_loss = ids, loss
        state.trace.append(state.loss)
        hits_N = torch.where(found.matched_N, found.losses_N, math.inf)
        if bool(torch.isfinite(hits_N).any()):
            self._reached(candidates[int(hits_N.argmin())])

    def _reached(self, ids: Ids) -> None:
        """Every active target is reached by a suffix."""
        state, total = self._state, len(self._behaviours)
        matched = True
        while matched and state.active < total:
            state.active += 1
            state.loss, matched = self._panel.mean(ids, state.active)
            state.suffix = state.best = ids
            state.best_loss = state.loss
            state.buffer = [(state.loss, ids)] if self._settings.buffer_size else []
        if not matched or not self._settings.early_stop or ids in state.denied:
            return
        if self._confirm is None or self._confirm(self._text(ids)[0]):
            state.stopped = "matched"
            state.suffix = state.best = ids
            state.loss = state.best_loss = self._panel.mean(ids, state.active)[0]
        else:
            state.denied.append(ids)

    def _text(self, ids: Ids) -> tuple[str, bool]:
        """What a suffix says, and whether every behaviour reads its ids in that."""
        texts = {survivors(self._tokenizer, at, [ids])[0] for at in self._behaviours}
        (only,) = texts if len(texts) == 1 else (None,)
        return (suffix_text(self._tokenizer, self._behaviours[0], ids), False) if only is None else (only, True)

    def result(self) -> SearchResult:
        """The best suffix, read once more by itself."""
        state = self._state
        scores = self._panel.scores(state.best)
        text, comes_back = self._text(state.best)
        return SearchResult(
            suffix_ids=state.best,
            text=text,
            comes_back=comes_back,
            losses=tuple(score.loss for score in scores),
            matched=tuple(score.matched for score in scores),
            active=state.active,
            trace=tuple(state.trace),
            steps=state.step,
            evaluated=state.evaluated,
            drifted=state.drifted,
            repeated=state.repeated,
            unread=state.unread,
            drafted=state.drafted,
            denied=len(state.denied),
            stopped=state.stopped or "steps",
        )
