"""The architecture: what may import what, what is public, and what every file must have."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import pytest

import ebpfstream
from ebpfstream import Event
from ebpfstream.catalogue import EVENT_TYPES, AnyEvent
from ebpfstream.service import config

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[1]

# From the ground up.  A module imports from lines above its own; within a line only the modules of
# one package that is listed in PACKAGES import one another.
LAYERS = (
    (
        "ages",
        "asking",
        "descriptors",
        "errors",
        "lost",
        "names",
        "origin",
        "records",
        "segments",
        "text",
        "statistics",
        "waiting",
    ),
    ("completeness", "events", "turns", "options", "opening", "spool"),
    ("sink_url",),
    ("c_types", "unpacking"),
    ("descriptions",),
    ("values",),
    ("codec", "losses", "parsing"),
    ("columns",),
    ("batch",),
    ("making",),
    ("packing", "kernel"),
    ("containers", "filters", "syscall_names"),
    ("readymade",),
    ("stream",),
    ("outputs", "programs", "hooks", "snapshots", "trace_lines"),
    ("loader",),
    ("tracers", "program_file", "sink", "table", "redaction", "conditions"),
    ("sinks", "shaping", "schema", "dead_letters", "catalogue"),
    ("backlog", "source"),
    ("outlet",),
    ("forwarding",),
    ("bench", "doctor", "service", "sizing"),
    ("cli", "testing"),
    ("__main__",),
)
PACKAGES = {"bench", "cli", "kernel", "service", "sinks", "testing"}
RANKS = {name: rank for rank, names in enumerate(LAYERS) for name in names}

SINKS_SEE = {
    "batch",
    "columns",
    "descriptors",
    "errors",
    "events",
    "lost",
    "opening",
    "options",
    "sink",
    "sink_url",
    "sinks.kafka_client",
    "sinks.kafka_producer",
    "sinks.kafka_records",
    "sinks.rotation",
    "table",
    "text",
    "turns",
    "waiting",
}

# Libraries that are costly or optional, and who may import them.
IMPORTERS: dict[str, set[str]] = {
    "aiokafka": {"sinks.kafka_client"},
    "bcc": set(),  # kernel/bcc.py loads it from its folder, by another name
    "click": {
        "bench.command",
        "cli",
        "cli.counts",
        "cli.doctor",
        "cli.events",
        "cli.messages",
        "cli.program",
        "cli.service",
        "cli.shipping",
        "cli.size",
        "cli.top",
    },
    "matplotlib": {"bench.picture"},
    "numpy": {"batch", "bench.latencies", "columns"},
    "orjson": {"cli.doctor", "cli.events", "cli.size", "dead_letters", "packing", "parsing", "values"},
    "prometheus_client": {"service.metrics"},
    "pydantic": {"service.config"},
    "rich": {"bench.screen", "cli.dashboard", "cli.live", "cli.pieces"},
    "structlog": {"service.logs"},
    "system_calls": {"syscall_names"},
    "zstandard": {"sinks.file", "sinks.rotation"},
}
LOADED_BY_PATH = {"spec_from_file_location": {"kernel.bcc"}}

LICENCE = "/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */"
MOST_LINES = 450


def _files(suffixes: set[str]) -> dict[str, Path]:
    """Sources by their path in the package, `sinks/` and `bpf/` by where they really are."""
    found = {}
    for top in ("ebpfstream", "sinks", "bpf"):
        for folder, _, names in os.walk(ROOT / top):  # does not follow links
            for path in (Path(folder, name) for name in names):
                if path.suffix in suffixes:
                    inside = path.relative_to(ROOT / "ebpfstream" if top == "ebpfstream" else ROOT)
                    found[str(inside)] = path
    return dict(sorted(found.items()))


@cache
def _modules() -> dict[str, ast.Module]:
    """Syntax trees by module name below `ebpfstream`; a package by its own name, the top one is ""."""
    trees = {}
    for inside, path in _files({".py"}).items():
        name = inside.removesuffix(".py").replace("/", ".")
        trees[name.removesuffix("__init__").rstrip(".") if name != "__main__" else name] = ast.parse(
            path.read_text(), str(path)
        )
    return trees


def _is_for_type_checkers(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _at_run_time(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if not _is_for_type_checkers(child):
            yield child
            yield from _at_run_time(child)


def _imports(nodes: Iterator[ast.AST]) -> Iterator[tuple[str, str]]:
    """Modules imported, each with the name taken from it, or "" if it is imported itself."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: a relative import"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                if submodule.removeprefix("ebpfstream.") in _modules():
                    yield submodule, ""
                else:
                    yield node.module or "", alias.name


def _own_imports(name: str) -> set[str]:
    """Modules below `ebpfstream` that a module imports at run time."""
    imported = {module for module, _ in _imports(_at_run_time(_modules()[name]))}
    return {module.removeprefix("ebpfstream.") for module in imported if module.startswith("ebpfstream.")}


def _allowed(importer: str, imported: str) -> bool:
    ours, theirs = importer.split(".")[0], imported.split(".")[0]
    return RANKS[theirs] < RANKS[ours] or (ours == theirs and ours in PACKAGES)


def test_every_module_has_its_place() -> None:
    assert {name.split(".")[0] for name in _modules() if name} == set(RANKS), (
        "a new module takes its place in LAYERS here, and in ARCHITECTURE.md"
    )


def test_imports_go_one_way() -> None:
    wrong = [
        f"{name} imports {imported}"
        for name in _modules()
        if name
        for imported in _own_imports(name)
        if not _allowed(name, imported)
    ]
    assert not wrong
    TopologicalSorter({name: _own_imports(name) for name in _modules()}).prepare()  # raises CycleError


def test_architecture_shows_the_layers() -> None:
    shown = (ROOT / "ARCHITECTURE.md").read_text().partition("```layers\n")[2].partition("```")[0]
    assert [tuple(re.findall(r"\w+", line)) for line in shown.splitlines()] == list(LAYERS)


def test_architecture_names_every_module() -> None:
    """And nothing that is gone; of tracers and sinks, a file each, the folder."""
    house = (ROOT / "ARCHITECTURE.md").read_text().partition("## The house")[2].partition("Imports go")[0]
    named = set(re.findall(r"(\w+)(?:\.py\b|/)", house))
    parts = {name for name in _modules() if name and not name.startswith(("tracers.", "sinks."))}
    assert {part for name in parts for part in name.split(".")} - {"__main__"} - named == set()
    files = {Path(file).name for file in re.findall(r"[\w./]+\.(?:py|c|h|toml)\b", house)}
    assert [file for file in files if not any(ROOT.glob(f"[!.]*/**/{file}"))] == []


@pytest.mark.parametrize("library", IMPORTERS)
def test_a_library_has_one_importer(library: str) -> None:
    importers = {
        name
        for name, tree in _modules().items()
        for module, _ in _imports(ast.walk(tree))
        if module.split(".")[0] == library
    }
    assert importers == IMPORTERS[library], f"who imports {library} stands in IMPORTERS"


@pytest.mark.parametrize("function", LOADED_BY_PATH)
def test_only_bcc_is_loaded_by_path(function: str) -> None:
    callers = {
        name
        for name, tree in _modules().items()
        for node in ast.walk(tree)
        if (isinstance(node, ast.Attribute) and node.attr == function)
        or (isinstance(node, ast.Name) and node.id == function)
    }
    assert callers == LOADED_BY_PATH[function]


def _modules_after(imports: str, *flags: str) -> set[str]:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {imports}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, *flags, "-c", code], check=True, capture_output=True, text=True, cwd="/"
    )
    return set(done.stdout.split())


def test_importing_ebpfstream_imports_no_library() -> None:
    modules = _modules_after("ebpfstream")
    assert "ebpfstream" in modules
    assert not modules & {"anyio", "asyncio", "orjson", "click", "numpy", "system_calls"}
    assert not {module for module in modules if module.startswith("ebpfstream.")}


def test_the_compiling_process_needs_the_standard_library_alone() -> None:
    assert "ebpfstream.kernel.headers" in _modules_after(
        "ebpfstream.kernel.bcc, ebpfstream.kernel.headers", "-I", "-S"
    )


def test_names_for_type_checkers_are_those_at_run_time() -> None:
    tree = _modules()[""]
    (block,) = (node for node in tree.body if _is_for_type_checkers(node))
    declared = sorted(
        (module.removeprefix("ebpfstream."), name) for module, name in _imports(ast.walk(block))
    )
    homes = [(home, name) for home, names in ebpfstream._HOMES.items() for name in names]
    assert declared == sorted(homes), "the TYPE_CHECKING block and _HOMES of ebpfstream/__init__.py differ"
    for home, name in homes:
        assert getattr(ebpfstream, name) is getattr(importlib.import_module(f"ebpfstream.{home}"), name)
        assert name in dir(ebpfstream)


def test_every_tracer_is_in_the_catalogue() -> None:
    """All that offer ready-made streams look there; counts are told as events, but are no stream of them."""
    versioned = {
        value
        for name in _modules()
        if name.startswith("tracers.")
        for value in vars(importlib.import_module(f"ebpfstream.{name}")).values()
        if isinstance(value, type) and "__schema_version__" in vars(value) and value is not Event
    }
    assert versioned - {ebpfstream.ExecCount} == set(EVENT_TYPES.values()) == set(get_args(AnyEvent))
    assert {*EVENT_TYPES, "program"} == set(get_args(config.Kind))


def test_sinks_see_the_contract_alone() -> None:
    wrong = []
    for name, tree in _modules().items():
        if name.split(".")[0] != "sinks":
            continue
        for module, taken in _imports(ast.walk(tree)):
            top, _, home = module.partition(".")
            if top == "ebpfstream" and ((home and home not in SINKS_SEE) or taken.startswith("_")):
                wrong.append(f"{name} imports {module} {taken}")
    assert not wrong, "sinks import what SINKS_SEE has; add to it what every sink may use"


def _undocumented(node: ast.Module | ast.ClassDef, prefix: str) -> Iterator[str]:
    for child in node.body:
        if not isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if child.name.startswith("_") or any(
            ast.unparse(decorator).removeprefix("typing.") == "overload" for decorator in child.decorator_list
        ):
            continue
        if not ast.get_docstring(child):
            yield prefix + child.name
        if isinstance(child, ast.ClassDef):
            yield from _undocumented(child, f"{prefix}{child.name}.")


def test_what_is_public_is_documented() -> None:
    without = [name or "ebpfstream" for name, tree in _modules().items() if not ast.get_docstring(tree)]
    for name, tree in _modules().items():
        without += _undocumented(tree, f"{name}.")
    assert not without


def test_bpf_sources_say_their_licence() -> None:
    sources = _files({".c", ".h"})
    assert "bpf/execve.c" in sources
    assert [name for name, path in sources.items() if path.read_text().splitlines()[0] != LICENCE] == []


def test_no_file_is_too_long() -> None:
    lengths = {name: len(path.read_text().splitlines()) for name, path in _files({".py", ".c", ".h"}).items()}
    assert {name: lines for name, lines in lengths.items() if lines > MOST_LINES} == {}
