"""A real OpenAI-compatible server on loopback: llama.cpp's, in this process, with the testbed's weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from deepalign.testbed.weights import gguf_file


@contextmanager
def llama_server(*, parallel: int = 4, context: int = 2048, threads: int = 1) -> Iterator[str]:
    """The server's address, with /v1.

    Args:
        parallel: Requests that it answers at a time.
        context: Tokens of each.
        threads: CPU threads.
    """
    xllamacpp: Any = pytest.importorskip("xllamacpp")
    settings = xllamacpp.CommonParams()
    settings.model.path = str(gguf_file())
    settings.n_ctx = parallel * context
    settings.n_parallel = parallel
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
    settings.port = 0
    settings.warmup = False
    server = xllamacpp.Server(settings)
    try:
        yield f"{server.listening_address}/v1"
    finally:
        del server
