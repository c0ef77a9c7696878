"""The house: imports point down, no two files import each other, the engine knows no model, a file is short."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("switchkd", "recipes", "eval", "tests")
# From the ground up; a room may import those before its own. Files that stand alone are rooms of their own.
FLOORS = (
    {"lazy", "terminal", "config_file", "digest"},
    {"config", "configs"},
    {"runs"},
    {"losses", "data"},
    {"models"},
    {"methods"},
    {"training", "evaluation"},
    {"tasks"},
    {"plan", "inspect", "ask", "convert", "train"},
    {"cli"},
    {"__main__"},
)


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for path in sorted((ROOT / "switchkd").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(path: Path) -> set[str]:
    """The modules of the package that a file imports, wherever it does; for type checkers alone apart."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return {name for name in found if name in MODULES}


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_every_room_has_a_floor():
    assert {room(name) for name in MODULES} - {""} == set().union(*FLOORS)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module):
    floor = {name: level for level, names in enumerate(FLOORS) for name in names}
    for imported in imports(MODULES[module]):
        here, there = room(module), room(imported)
        if here and there and here != there:
            assert floor[there] < floor[here], f"{module} imports {imported}"


def test_the_engine_imports_neither_models_nor_data():
    for module, path in MODULES.items():
        if room(module) == "training":
            assert not {room(name) for name in imports(path)} & {"models", "data", "tasks"}, module
            assert "llava" not in path.read_text().lower(), module


def test_losses_import_nothing_of_ours():
    for module, path in MODULES.items():
        if room(module) == "losses":
            assert {room(name) for name in imports(path)} - {"", "losses", "lazy"} == set(), module


def test_configurations_import_no_torch():
    heavy = {"torch", "transformers", "accelerate", "numpy", "PIL"}
    for module, path in MODULES.items():
        if module.rpartition(".")[2].endswith("config") or room(module) in ("config_file", "lazy", "runs", "cli"):
            top = ast.parse(path.read_text()).body
            named = {alias.name.split(".")[0] for node in top if isinstance(node, ast.Import) for alias in node.names}
            named |= {(node.module or "").split(".")[0] for node in top if isinstance(node, ast.ImportFrom)}
            assert not named & heavy, module


def test_no_circle():
    edges = {name: imports(path) - {name} for name, path in MODULES.items()}
    # A package's own file is imported with each of its modules; it imports them lazily and makes no circle.
    done: set[str] = set()

    def walk(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for each in sorted(edges[name]):
                walk(each, (*path, name))
            done.add(name)

    for name in edges:
        walk(name, ())


def test_no_file_is_longer_than_one_reader_holds_in_mind():
    long = {}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            if (lines := len(path.read_text().splitlines())) > 400:
                long[str(path.relative_to(ROOT))] = lines
    assert long == {}
