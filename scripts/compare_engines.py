"""Put the same greedy attempts to this process and to real servers, and write where their answers part.

    python scripts/compare_engines.py --output measurements/engines_cpu_DATE.json
    python scripts/compare_engines.py --server vllm=http://127.0.0.1:8000/v1 --output ...

Without --server, llama.cpp's server is started here (package xllamacpp), once with the testbed's own file (Q4_1, whose
kernels also round activations to 8 bits) and once with a file of the very weights that `hf` holds, in float32, keys and
values too. `hf` runs in float32, so that what remains is the order of sums; `hf` in bfloat16 is put beside, for scale.
k is exact on every server that is compared: it says how many ids it read, or which; a row with others counts as failed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deepalign.attacks import AttackSettings
from deepalign.attacks.prefill import prefill_plan
from deepalign.batching import Continuation, Job
from deepalign.chat import answer_ids, render, stop_ids
from deepalign.endpoints.client import Client
from deepalign.endpoints.servers import Server
from deepalign.engines import Engine
from deepalign.engines.in_process import HfEngine
from deepalign.engines.trial import open_engine
from deepalign.models import LoadedModel, load_model
from deepalign.prompts.sources import Columns, load_prompts
from deepalign.provenance import environment
from deepalign.records import Sampling
from deepalign.testbed.weights import gguf_file

COLUMNS = Columns(text="text", answer="answer", category="category", prompt_id="prompt_id")

_COLUMNS = ("first_differing_token", "logprob_distance_before", "logprob_distance_of_first_differing")
_BEGIN, _END = "<!-- engines compared -->", "<!-- engines end -->"


def write_gguf(loaded: LoadedModel, template: Path, out: Path) -> None:
    """A Llama's weights in float32 as a GGUF file, with the tokenizer and settings of another of its kind."""
    import gguf

    reader = gguf.GGUFReader(template)
    arch = gguf.MODEL_ARCH.LLAMA
    writer = gguf.GGUFWriter(out, gguf.MODEL_ARCH_NAMES[arch])
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], sub_type)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    config = loaded.model.config
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for name, weight in loaded.model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = weight.float().cpu()
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if part in name:
                # llama.cpp keeps the two halves of a rotated pair next to each other.
                rows, columns = array.shape
                array = array.reshape(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)
        told = names.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor(told, array.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@contextlib.contextmanager
def llama_cpp(weights: Path, threads: int) -> Iterator[str]:
    """Address of a llama.cpp server in this process."""
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = str(weights)
    settings.n_ctx, settings.n_parallel, settings.port, settings.warmup = 8192, 4, 0, False
    # Its default is 16 bits, which is more of a difference than the order of sums.
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(settings)
    try:
        yield f"{server.listening_address}/v1"
    finally:
        del server


def jobs_of(loaded: LoadedModel, limit: int, depths: list[int], max_new_tokens: int) -> list[Job]:
    """Prefilled attempts as an audit plans them, greedy."""
    settings = AttackSettings(
        encode=lambda text: answer_ids(loaded.tokenizer, text),
        decode=lambda ids: str(loaded.tokenizer.decode(ids)),
        system_prompt=None,
        sampling=Sampling(temperature=0.0, max_new_tokens=max_new_tokens),
        samples=1,
        seed=0,
    )
    prompts = load_prompts("should-refuse", COLUMNS, limit=limit).prompts
    return [
        Job(
            ids=render(loaded.tokenizer, loaded.template, one.messages, one.prefill_ids).ids,
            sampling=one.sampling,
            seed=one.seed,
            num_prefill=len(one.prefill_ids),
            messages=one.messages,
        )
        for one in prefill_plan(prompts, depths, settings).attempts
    ]


def completed(engine: Engine, jobs: list[Job], stops: tuple[int, ...]) -> list[Continuation]:
    """Continuations in the order of their jobs."""
    return sorted(engine.complete(jobs, stop_ids=stops), key=lambda one: one.index)


def compare(ours: list[Continuation], theirs: list[Continuation]) -> dict[str, Any]:
    """Where answers part, and how far log-probabilities differ up to there."""
    same, firsts, distances, gaps, failed = 0, [], [], [], {}
    for mine, other in zip(ours, theirs, strict=True):
        if other.status == "failed":
            failed[other.reason] = failed.get(other.reason, 0) + 1
            continue
        pairs = list(zip(mine.token_ids, other.token_ids, strict=False))
        alike = next((place for place, (one, two) in enumerate(pairs) if one != two), len(pairs))
        identical = mine.token_ids == other.token_ids and mine.finish == other.finish
        same += identical
        if not identical:
            firsts.append(alike)
        if mine.logprobs and other.logprobs:
            both = list(zip(mine.logprobs, other.logprobs, strict=False))
            distances += [abs(one - two) for one, two in both[:alike]]
            gaps += [abs(one - two) for one, two in both[alike : alike + 1]] if not identical else []
    compared = len(ours) - sum(failed.values())
    return {
        "attempts": len(ours),
        "failed": failed,
        "identical": same,
        "share_identical": round(same / compared, 4) if compared else None,
        "first_differing_token": sorted(firsts),
        "logprob_distance_before": _spread(distances),
        "logprob_distance_of_first_differing": _spread(gaps),
    }


def _spread(values: list[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {"n": len(values), "median": round(statistics.median(values), 6), "max": round(max(values), 6)}


def document(found: dict[str, Any], source: str, page: Path) -> None:
    """Write the figures into a page, between its marks."""
    columns = (
        "against `hf` in float32",
        "identical",
        "first differing token",
        "log-probability apart before (median, max)",
        "where they part (max)",
        "k",
    )
    rows = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, one in found["servers"].items():
        firsts, before, at = (one[key] for key in _COLUMNS)
        median = f"{statistics.median(firsts):g} (median), {firsts[0]} (earliest)" if firsts else "-"
        apart = f"{before['median']:.1g}, {before['max']:.1g}" if before else "-"
        exact = f"{one['trial']['read_ids']} on all" if "trial" in one and not one["failed"] else "same ids"
        share = f"{one['identical']} of {one['attempts'] - sum(one['failed'].values())}"
        rows.append(
            f"| {name} | {share} | {median} | {apart} | {at['max']:.1g} | {exact} |"
            if at
            else f"| {name} | {share} | {median} | {apart} | - | {exact} |"
        )
    settings, machine = found["settings"], found["environment"]["hardware"]
    note = (
        f"`{found['model']}`, {settings['limit']} prompts at k = {settings['depths']}, "
        f"{settings['max_new_tokens']} tokens, greedy; {machine}. From `scripts/compare_engines.py`; `{source}`."
    )
    text = page.read_text(encoding="utf-8")
    head, rest = text.split(_BEGIN, 1)
    tail = rest.split(_END, 1)[1]
    page.write_text(f"{head}{_BEGIN}\n\n" + "\n".join(rows) + f"\n\n{note}\n\n{_END}{tail}", encoding="utf-8")


@contextlib.contextmanager
def engines(options: argparse.Namespace, loaded: LoadedModel) -> Iterator[Iterator[tuple[str, Any]]]:
    """Named servers, each opened when its turn comes."""

    def opened(url: str) -> Any:
        client = Client(Server(url=url), concurrency=options.concurrency)
        return open_engine(client, loaded, prefills=True, logprobs=True)

    def each() -> Iterator[tuple[str, Any]]:
        for named in options.server:
            name, _, url = named.partition("=")
            yield name, opened(url)
        if options.server:
            return
        with llama_cpp(gguf_file(), options.threads) as url:
            yield "llama.cpp, Q4_1", opened(url)
        with tempfile.TemporaryDirectory() as folder:
            weights = Path(folder) / "f32.gguf"
            write_gguf(loaded, gguf_file(), weights)
            with llama_cpp(weights, options.threads) as url:
                yield "llama.cpp, the same weights in float32", opened(url)

    yield each()


def main() -> None:
    """Compare, tell, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="testbed:base", help="a Llama, such as testbed:base or testbed:shallow")
    parser.add_argument("--server", action="append", default=[], help="NAME=URL of a server that holds it")
    parser.add_argument("--limit", type=int, default=12)
    parser.add_argument("--depths", type=int, nargs="+", default=[0, 5, 20])
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument("--output", type=Path, required=True, help="JSON file; figures of other servers in it are kept")
    parser.add_argument("--document", type=Path, help="only write the figures of --output into this page")
    options = parser.parse_args()
    if options.document:
        source = options.output.as_posix()
        document(json.loads(options.output.read_text(encoding="utf-8")), source, options.document)
        return

    loaded = load_model(options.model, dtype="float32")
    jobs = jobs_of(loaded, options.limit, options.depths, options.max_new_tokens)
    stops = stop_ids(loaded.tokenizer, loaded.generation_config)
    ours = completed(HfEngine(loaded.model, logprobs=True), jobs, stops)
    found: dict[str, Any] = json.loads(options.output.read_text()) if options.output.exists() else {}
    found |= {
        "model": options.model,
        "settings": {key: value for key, value in vars(options).items() if key not in ("output", "server", "document")},
        "environment": environment(),
        "hf_tokens": sum(len(one.token_ids) for one in ours),
    }
    servers = found.setdefault("servers", {})
    rounded = load_model(options.model, dtype="bfloat16")
    theirs = completed(HfEngine(rounded.model, logprobs=True), jobs, stops)
    servers["hf in bfloat16"] = compare(ours, theirs)
    del rounded
    with engines(options, loaded) as each:
        for name, engine in each:
            theirs = completed(engine, jobs, stops)
            (trial,) = engine.facts["servers"]
            told = {key: trial[key] for key in ("way", "read_ids", "written_ids", "prefill", "tokenizer", "seeds")}
            servers[name] = {**compare(ours, theirs), "trial": told}
            print(name, json.dumps(servers[name], indent=1))
            options.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
