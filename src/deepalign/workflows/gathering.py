"""The end of an audit over ranks: the first waits for the others and merges.

They share nothing but files: no process group, no barrier that hangs when one is gone. Whether another is alive is told
by the lock on its folder, which the system lets go of when a process ends in whatever way.
"""

from __future__ import annotations

import time
from pathlib import Path

from filelock import FileLock, Timeout

from deepalign.config_reports import MergeConfig
from deepalign.errors import UserError
from deepalign.progress import Progress
from deepalign.runs import MANIFEST, RunFolder
from deepalign.shards import Shard
from deepalign.workflows.audit_result import AuditResult
from deepalign.workflows.merging import merge_shards

START_SECONDS = 900.0
"""How long a rank may take to begin, once the first has finished all of its own work."""
_POLL_SECONDS = 0.5
_GONE_POLLS = 4
"""How often in a row a lock has to be free: between two looks its holder may have finished."""


def gather(whole: Path, shard: Shard, *, show_completions: bool, progress: Progress) -> AuditResult:
    """Wait until every shard is judged, then merge them into the whole run.

    Raises:
        UserError: One ended before it was finished.
    """
    folders = [one.folder(whole) for one in shard.all()]
    done = 0
    for one, folder in zip(shard.all(), folders, strict=True):
        progress("waiting for ranks", done, shard.count)
        _wait_for(one, RunFolder(folder))
        done += 1
    progress("waiting for ranks", done, shard.count)
    return merge_shards(MergeConfig(shards=tuple(folders), output=whole, show_completions=show_completions), progress)


def _wait_for(shard: Shard, run: RunFolder) -> None:
    started, was_held, free = time.monotonic(), False, 0
    while True:
        told = run.manifest.get("shard", {}) if (run / MANIFEST).exists() else {}
        if told.get("judged"):
            return
        held = run.path.exists() and _is_held(run.path)
        was_held, free = was_held or held, 0 if held else free + 1
        # A rank that loads its model holds nothing yet, however far an earlier sitting came.
        gone = was_held and free >= _GONE_POLLS
        if (gone or time.monotonic() - started > START_SECONDS) and not held:
            if told.get("finished"):
                return  # it ended while judging; the merge judges the rest
            what = "ended before it was finished" if gone else f"did not begin within {START_SECONDS:.0f} seconds"
            raise UserError(
                f"shard {shard} {what}; what there is of it is kept in {run.path}: start the same command again, and "
                "it goes on from there"
            )
        time.sleep(_POLL_SECONDS)


def _is_held(folder: Path) -> bool:
    """Whether a process works on a run."""
    try:
        with FileLock(folder / ".lock").acquire(timeout=0):
            return False
    except Timeout:
        return True
