"""What a shard leaves besides its records, so that they can be joined: the order of the whole, and what it finished."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepalign.attacks.jailbreaks import ATTACK as JAILBREAK
from deepalign.attacks.jailbreaks import Artifact, artifact_prompt_id
from deepalign.attacks.plain import OVER_REFUSAL
from deepalign.judges import Judge
from deepalign.progress import Progress
from deepalign.runs import RunFolder
from deepalign.workflows.inputs import Inputs
from deepalign.workflows.planning import PLANNED
from deepalign.workflows.reporting import judge_all

ORDER = "order.json"


def finish_shard(run: RunFolder, inputs: Inputs, judge: Judge, progress: Progress) -> None:
    """Note that everything is asked and measured, then judge it; metrics are of the whole, and left to the merge."""
    sets = {found.name: [prompt.prompt_id for prompt in found.prompts] for found in inputs.harmless}
    prompts = [prompt.prompt_id for prompt in inputs.prompt_set.prompts]
    wrappings = {
        one.name: [artifact_prompt_id(one, row) for row in one.rows] if isinstance(one, Artifact) else None
        for one in inputs.jailbreaks
    }
    run.write_json(ORDER, {"prompts": prompts, OVER_REFUSAL: sets, JAILBREAK: wrappings})
    run.note(shard={"finished": {path.name: count_lines(path) for path in record_files(run)}})
    judge_all(run, judge, progress=progress)
    run.note(shard={"judged": True})


def record_files(run: RunFolder) -> list[Path]:
    """The record files of a run that do not grow any more once everything is asked and measured."""
    return sorted(path for path in run.path.glob("*.jsonl") if not path.name.startswith("verdicts."))


def count_lines(path: Path) -> int:
    """Whole lines of a file."""
    with path.open("rb") as lines:
        return sum(line.endswith(b"\n") for line in lines)


@dataclass(frozen=True, slots=True)
class Order:
    """The order of a whole audit's attempts, from the `order.json` that every shard of it has."""

    _places: Mapping[str, int]
    _groups: Mapping[str, Mapping[str, tuple[int, Mapping[str, int]]]]

    @staticmethod
    def of(data: Mapping[str, Any]) -> Order:
        """Read it."""
        prompts = _places(data["prompts"])
        groups = {
            attack: {
                name: (number, prompts if ids is None else _places(ids))
                for number, (name, ids) in enumerate(data[attack].items())
            }
            for attack in (OVER_REFUSAL, JAILBREAK)
        }
        return Order(prompts, groups)

    def prompts(self) -> Sequence[str]:
        """Ids of the should-refuse prompts."""
        return list(self._places)

    def __call__(self, row: Mapping[str, Any]) -> tuple[int, int, int]:
        """Where a prompt, an attempt or a skipped one stands: its attack's place, its set's, and its prompt's."""
        attack = row.get("attack", "")
        rank = PLANNED.index(attack) if attack in PLANNED else len(PLANNED)
        number, places = self._groups.get(attack, {}).get(row.get("variant", ""), (0, self._places))
        return rank, number, places[row["prompt_id"]]


def _places(ids: Sequence[str]) -> dict[str, int]:
    return {prompt_id: place for place, prompt_id in enumerate(ids)}
