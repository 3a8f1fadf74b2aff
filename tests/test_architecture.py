"""The walls between the rooms: who may import whom, what starts without torch, and what never appears in the source."""

from __future__ import annotations

import ast
import graphlib
import importlib
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "deepalign"
PACKAGE = "deepalign"
FLOORS = (
    (
        "records",
        "config",
        "config_attacks",
        "config_diagnosis",
        "config_engine",
        "config_reports",
        "config_run",
        "config_suffix",
        "config_tuning",
        "config_utility",
        "ways",
        "errors",
        "progress",
        "shards",
    ),
    (
        "models",
        "weights",
        "hardware",
        "chat",
        "thinking",
        "generation",
        "decoding",
        "graphs",
        "packing",
        "partial_attention",
        "sharing",
        "branches",
        "batching",
        "caching",
        "sampling",
        "runs",
        "provenance",
        "text_ends",
        "heads",
        "endpoints",
    ),
    (
        "abliteration",
        "agreement",
        "calibration",
        "any_depth",
        "attacks",
        "judges",
        "prompts",
        "report",
        "testbed",
        "depth",
        "engines",
        "finetuning",
        "ghosts",
        "gradients",
        "onset",
        "over_refusal",
        "metrics",
        "statistics",
        "sequential",
        "losses",
        "margins",
        "recording",
        "recovery",
        "scopes",
        "perplexity",
        "rank_assisted",
        "rank_helpers",
        "ranks",
        "refusal_direction",
        "readers",
        "rewinding",
        "suffix",
        "worst_case",
    ),
    ("training", "tuning_sets", "utility"),
    ("workflows",),
    ("cli", "terminal"),
    ("__main__",),
)
"""Lowest first; a room imports from its own floor and from below."""
LEVELS = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
UPWARD = {("weights", "testbed")}
"""`weights` resolves the names of the embedded testbed."""
START_WITHOUT_TORCH = (
    "config",
    "config_attacks",
    "config_diagnosis",
    "config_engine",
    "config_reports",
    "config_run",
    "config_suffix",
    "config_utility",
    "ways",
    "config_tuning",
    "prompts.jailbreak_files",
    "margins",
    "attacks.jailbreaks",
    "attacks.suffix",
    "cli",
    "records",
    "runs",
    "errors",
    "progress",
    "shards",
    "endpoints.client",
    "prompts.catalogue",
    "prompts.download",
    "prompts.public",
    "prompts.rows",
    "prompts.sources",
    "statistics",
    "sequential",
    "judges",
    "judges.refusal",
    "judges.guards",
    "judges.guards.sources",
    "judges.scripted",
    "report.page",
    "report.figures",
    "testbed.weights",
    "tuning_sets.attacks",
    "tuning_sets.public",
    "tuning_sets.scores",
    "tuning_sets.tasks",
    "utility.catalogue",
    "utility.instructions",
)
MAX_MODULE_LINES = 300
MAX_FUNCTION_LINES = 80
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
FORBIDDEN_CALLS = {"eval", "exec", "print", "__import__"}
FORBIDDEN_METHODS = {("torch", "load"), ("numpy", "load"), ("np", "load"), ("os", "system")}
MODULES = sorted(path for path in SOURCE.rglob("*.py"))


def dotted(path: Path) -> str:
    """Module name inside the package: "judges", "judges.refusal", "" for the package itself."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


NAMES = {dotted(path) for path in MODULES}


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def inner_imports(path: Path, nodes: Iterator[ast.AST]) -> Iterator[tuple[str, int]]:
    """Modules of the package that a module imports, with the line; strings given to `import_module` count too."""
    for node in nodes:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative imports hide the direction"
            base = node.module or ""
            names = [
                f"{base}.{alias.name}" if f"{base}.{alias.name}".removeprefix(f"{PACKAGE}.") in NAMES else base
                for alias in node.names
            ]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "import_module":
            names = [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
        else:
            continue
        for name in names:
            if name == PACKAGE or name.startswith(f"{PACKAGE}."):
                yield name.removeprefix(PACKAGE).removeprefix("."), node.lineno  # type: ignore[attr-defined]


def room(name: str) -> str:
    return name.partition(".")[0]


def test_every_room_has_a_floor() -> None:
    found = {room(name) for name in NAMES if name}
    assert found == set(LEVELS), "a new room needs its floor in FLOORS, and a removed one leaves it"


def test_imports_go_down() -> None:
    seen_upward = set()
    for path in MODULES:
        here = room(dotted(path))
        if not here:
            continue  # the package itself is the public surface; test_public_surface.py checks it
        for name, line in inner_imports(path, ast.walk(tree(path))):
            assert name, f"{path}:{line}: import the module that owns the name, not the package"
            there = room(name)
            if (here, there) in UPWARD:
                seen_upward.add((here, there))
                continue
            assert LEVELS[there] <= LEVELS[here], f"{path}:{line}: {here} must not import {there}, which lies above it"
    assert seen_upward == UPWARD, "an exception that nobody needs is to be removed"


def test_imports_at_load_time_have_no_cycle() -> None:
    graph = {}
    for path in MODULES:
        module = tree(path)
        later = {
            id(node)
            for block in ast.walk(module)
            if isinstance(block, ast.FunctionDef) or _is_type_checking(block)
            for node in ast.walk(block)
        }
        at_load = (node for node in ast.walk(module) if id(node) not in later)
        graph[dotted(path)] = {name for name, _ in inner_imports(path, at_load)} - {dotted(path)}
    assert graph["metrics"] >= {"statistics", "records"}
    graphlib.TopologicalSorter(graph).prepare()


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def loaded_after(statement: str) -> set[str]:
    """Names of all modules that a fresh interpreter holds after a statement."""
    code = f"import sys\n{statement}\nprint(*sys.modules, sep='\\n')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    return set(done.stdout.split("\n"))


def test_configs_judges_and_report_start_without_torch() -> None:
    names = [f"{PACKAGE}.{name}" for name in START_WITHOUT_TORCH]
    loaded = loaded_after(f"import {', '.join(names)}")
    assert set(names) <= loaded
    heavy = {
        "torch",
        "transformers",
        "peft",
        "matplotlib",
        "huggingface_hub",
        "tokenizers",
        "datasets",
        "pyarrow",
    } & loaded
    assert not heavy, f"{sorted(heavy)} came in with the modules that must start fast"


def test_the_package_itself_loads_nothing() -> None:
    loaded = loaded_after(f"import {PACKAGE}")
    assert {name for name in loaded if name.startswith(f"{PACKAGE}.")} == set()


@pytest.mark.parametrize("name", sorted(NAMES))
def test_every_module_imports(name: str) -> None:
    module = importlib.import_module(f"{PACKAGE}.{name}" if name else PACKAGE)
    assert (module.__doc__ or "").strip(), "a module says what it owns"


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_sizes(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    limit = MAX_MODULE_LINES
    assert lines <= limit, f"{path} has {lines} lines; split it by what it owns (limit {limit})"
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{path}:{node.lineno}: {node.name} has {length} lines"


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_nothing_unsafe_and_no_print(path: Path) -> None:
    for problem in problems(tree(path)):
        pytest.fail(f"{path}: {problem}")


def problems(module: ast.Module) -> Iterator[str]:
    """What must not stand in the source: code that runs other people's code, and prints."""
    for node in ast.walk(module):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (f"imports {name}" for name in names if name.partition(".")[0] in FORBIDDEN_MODULES)
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        if isinstance(function, ast.Name) and function.id in FORBIDDEN_CALLS:
            yield f"line {node.lineno} calls {function.id}"
        if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
            pair = (function.value.id, function.attr)
            if pair in FORBIDDEN_METHODS:
                yield f"line {node.lineno} calls {'.'.join(pair)}"
        for keyword in node.keywords:
            value = keyword.value.value if isinstance(keyword.value, ast.Constant) else "something computed"
            if keyword.arg in ("trust_remote_code", "shell") and value is not False:
                yield f"line {node.lineno} passes {keyword.arg}={value}"
            if keyword.arg == "use_safetensors" and value is not True:
                yield f"line {node.lineno} passes use_safetensors={value}"


@pytest.mark.parametrize(
    "code",
    [
        "print(1)",
        "eval('1')",
        "import pickle",
        "from pickle import load",
        "torch.load(path)",
        "f(trust_remote_code=True)",
        "f(trust_remote_code=flag)",
        "f(use_safetensors=False)",
        "subprocess.run(x, shell=True)",
    ],
)
def test_the_search_for_unsafe_code_finds_it(code: str) -> None:
    assert list(problems(ast.parse(code)))


def test_safe_code_is_not_found() -> None:
    code = "model.eval()\nout.print(1)\nf(trust_remote_code=False, use_safetensors=True)\njson.load(x)"
    assert list(problems(ast.parse(code))) == []


def data_files() -> set[str]:
    """Files of the package that are not Python, as paths inside it."""
    return {
        path.relative_to(SOURCE).as_posix()
        for path in SOURCE.rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc") and "__pycache__" not in path.parts
    }


def test_data_files_are_named_by_the_package_data_globs() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    globs = settings["tool"]["setuptools"]["package-data"][PACKAGE]
    named = {path.relative_to(SOURCE).as_posix() for glob in globs for path in SOURCE.glob(glob)}
    assert data_files() - named == set(), "these would be missing from an installed package"
    assert data_files() >= {"py.typed", "prompts/builtin/should-refuse.jsonl", "judges/refusal_phrases.toml"}


def test_test_files_have_names_of_their_own() -> None:
    """Two of one name, in folders that are no packages, keep pytest from collecting the suite."""
    names = [path.name for path in sorted((ROOT / "tests").rglob("test_*.py"))]
    assert sorted(names) == sorted(set(names))


def test_a_wheel_holds_every_module_and_data_file(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    project = tmp_path / "project"
    shutil.copytree(ROOT / "src", project / "src", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, project / name)
    code = f"from setuptools import build_meta; build_meta.build_wheel({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=project, capture_output=True, check=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        inside = {name.removeprefix(f"{PACKAGE}/") for name in archive.namelist() if name.startswith(f"{PACKAGE}/")}
    wanted = data_files() | {path.relative_to(SOURCE).as_posix() for path in MODULES}
    assert inside == wanted
