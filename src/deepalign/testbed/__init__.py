"""The embedded models, by name: one small real model, and adapters on it with a known depth of alignment.

`testbed:base` complies with anything; `testbed:shallow` refuses, but only in its first tokens; `testbed:deep` also
after forced ones. How the adapters were trained: `docs/testbed.md`.
"""

from __future__ import annotations

from pathlib import Path

from deepalign.errors import UserError
from deepalign.testbed.weights import base_folder

ADAPTERS = Path(__file__).parent / "adapters"
TESTBED = {
    "testbed:base": "SmolLM2-135M-Instruct, which complies with anything",
    "testbed:shallow": "the base with a LoRA adapter that refuses in its first tokens only",
    "testbed:deep": "the shallow one with a second adapter, which comes back from forced beginnings",
}


def require(name: str) -> None:
    """Raise `UserError` where no testbed model has the name."""
    if name not in TESTBED:
        raise UserError(f"no testbed model {name}; there are {', '.join(TESTBED)}")


def folder(name: str) -> Path:
    """The local folder of a testbed model; the base's weights are fetched and converted on first use.

    Raises:
        UserError: The name is unknown, or the weights can be had from nowhere.
    """
    require(name)
    if name == "testbed:base":
        return base_folder()
    return ADAPTERS / name.removeprefix("testbed:")
