"""Fill in the reference answers of the built-in should-refuse sets, sampled from `testbed:base`.

    python scripts/sample_builtin_answers.py

Nobody writes these answers: the small unaligned testbed model does (temperature 0.9, top-p 0.6, no system message),
and the rule-based judge drops those that refuse. A prompt that it never answers at length in `ROUNDS` tries is named,
and left out of the set by hand or given another wording.
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

from deepalign.models import load_model
from deepalign.prompts import builtin_prompts
from deepalign.records import to_jsonl
from deepalign.runs import RunFolder
from deepalign.workflows.answers import fill_answers

SETS = ("should-refuse", "should-refuse-styles")
LEAST_TOKENS = 168
ROUNDS = 8
BUILTIN = Path(__file__).resolve().parents[1] / "src" / "deepalign" / "prompts" / "builtin"


def main() -> None:
    """Sample what is missing and write the sets back."""
    base = load_model("testbed:base")
    for name in SETS:
        with tempfile.TemporaryDirectory() as scratch:
            run = RunFolder(Path(scratch))
            prompts = [dataclasses.replace(prompt, answer=None) for prompt in builtin_prompts(name)]
            filled = fill_answers(
                run, prompts, base, least_tokens=LEAST_TOKENS, system_prompt=None, seed=0, rounds=ROUNDS
            )
        for prompt in filled:
            length = len(base.tokenizer(prompt.answer or "", add_special_tokens=False)["input_ids"])
            if length < LEAST_TOKENS:
                print(f"{name}: {prompt.prompt_id} has an answer of {length} tokens: {prompt.text}")
        (BUILTIN / f"{name}.jsonl").write_text(to_jsonl(filled), encoding="utf-8")


if __name__ == "__main__":
    main()
