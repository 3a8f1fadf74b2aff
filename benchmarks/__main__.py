"""Run the benchmarks: `python -m benchmarks [NAME ...]`, each interleaved, with the full figures under measurements/.

The last lines are one for each comparison, `NAME time_ratio=... memory_ratio=...`: ours over theirs, below 1 is better.
Where several sides are compared with one, there is a line for each, `NAME SIDE time_ratio=... memory_ratio=...`.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import os
import warnings
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

from benchmarks import gcg, grad_norms, kl, official_loss, onset, prefill_curve, sft
from benchmarks.compare import Comparison
from deepalign.provenance import environment

BENCHMARKS = {
    "prefill_curve": (prefill_curve.compare,),
    "prefill_curve_256": (functools.partial(prefill_curve.compare, new_tokens=256),),
    "kl": (kl.compare,),
    "onset": (onset.compare,),
    # One after the other: the sides of both would not fit into memory together.
    "sft": (sft.compare, functools.partial(sft.compare, lora=True)),
    "official_loss": (official_loss.compare,),
    "grad_norms": (
        grad_norms.compare,
        functools.partial(grad_norms.compare, last_blocks=grad_norms.LAST_BLOCKS),
    ),
    "gcg": (gcg.compare,),
}
ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Run what was asked for and write the figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"any of {', '.join(BENCHMARKS)}; default all that can run here"
    )
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each side")
    parser.add_argument("--prompts", type=int, default=20, help="prompts for each run; none in training")
    options = parser.parse_args()
    unknown = sorted(set(options.names) - set(BENCHMARKS))
    if unknown:
        parser.error(f"no benchmark {unknown[0]}; there are {', '.join(BENCHMARKS)}")
    warnings.simplefilter("ignore")
    done: list[Comparison] = []
    able = [name for name in BENCHMARKS if name != "gcg" or gcg.available()]
    for name in options.names or able:
        for benchmark in BENCHMARKS[name]:
            comparison = benchmark(repeats=options.repeats, num_prompts=options.prompts)
            done.append(comparison)
            write(comparison)
    for comparison in done:
        print(*comparison.lines, sep="\n")


def write(comparison: Comparison) -> None:
    """Write one comparison's figures with what they were measured on."""
    where = environment()
    day = datetime.date.today().isoformat()
    cores = f"cpu{os.cpu_count()}" if comparison.device == "cpu" else comparison.device
    path = ROOT / "measurements" / f"{comparison.name}_{cores}_{day}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({**comparison.figures, "environment": where}, indent=1) + "\n", encoding="utf-8")
    print(f"{comparison.name}: figures in {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
