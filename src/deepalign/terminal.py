"""What a person sees while a command works: progress bars, the library's notices, and nothing of other libraries."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


@contextlib.contextmanager
def working(err: Console) -> Iterator[Any]:
    """Progress bars on stderr, one for each stage; the library's notices above them."""
    columns = (
        TextColumn("{task.description:<18}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=err, refresh_per_second=4, disable=not err.is_terminal or _is_other_rank()) as bars:
        handler = _Notices(bars.console)
        logger = logging.getLogger("deepalign")
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)

        def tell(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total, completed=done)
            bars.update(tasks[stage], completed=done, total=total)

        try:
            yield tell
        except BaseException:
            # Half-drawn bars would stand above the one line that matters.
            bars.live.transient = True
            raise
        finally:
            logger.removeHandler(handler)


@contextlib.contextmanager
def ended_like_interrupted() -> Iterator[None]:
    """Take the signal with which SLURM, torchrun and containers end a process as if the user had stopped it."""
    try:
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    except ValueError:  # only the main thread may
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _is_other_rank() -> bool:
    """Whether another process of the same launch draws bars on this terminal already."""
    return any(os.environ.get(name, "0") != "0" for name in ("RANK", "SLURM_PROCID"))


class _Notices(logging.Handler):
    """Shows the library's log lines above the progress bars."""

    def __init__(self, console: Console) -> None:
        super().__init__(logging.INFO)
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        """Print one line."""
        self._console.print(record.getMessage(), markup=False, highlight=False, soft_wrap=True)


def quiet_libraries() -> None:
    """Keep other libraries' bars and warnings off the terminal; set before they are imported."""
    for name, value in {
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }.items():
        os.environ.setdefault(name, value)
    if "transformers" in sys.modules:
        # Its bars read the settings once, when it is imported; a caller of `main` may have done that long ago.
        sys.modules["transformers"].utils.logging.disable_progress_bar()
    # Read when tqdm is imported: the conversion of GGUF files draws a bar that no setting of its library turns off.
    os.environ.setdefault("TQDM_DISABLE", "1")
    # It tells of kernels that it could also have, and of every cast.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # It tells of each try to reach a hub that is not there, before the one line that says so.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    # It warns of every default that a task relies on.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
