"""The house: rooms import one way, in no circle, are small, and say what they are for."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter

import pytest

from tests.support import REPOSITORY

SOURCE = REPOSITORY / "flm_megatron"
ROOMS = (
    "cli",
    "api",
    "benchmarking",
    "launch",
    "evaluation",
    "hyperparameters",
    "planner",
    "training",
    "growth",
    "checkpoint",
    "optim",
    "model",
    "data",
    "kernels",
    "distributed",
    "engine",
    "device",
    "config",
    "storage",
)
"""From the highest to the lowest: none imports one above it."""
LONGEST_FUNCTION, LONGEST_FILE, MOST_FILES = 80, 400, 14
APART = {"config/presets"}
"""Folders of data that may be as large as they are."""


@cache
def trees() -> dict[str, ast.Module]:
    """Every module of the program by its path below the package, without `.py`."""
    return {
        path.relative_to(SOURCE).with_suffix("").as_posix().removesuffix("/__init__"): ast.parse(path.read_text())
        for path in SOURCE.rglob("*.py")
    }


def imported(module: str, later: bool = True) -> Iterator[str]:
    """Modules that a module imports, inside functions too if `later`, but not for type checkers alone."""
    tree = trees()[module]
    hidden = {
        id(inner)
        for node in ast.walk(tree)
        if (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        or (isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not later)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        package = node.module or "" if isinstance(node, ast.ImportFrom) else ""
        for name in names:
            candidates = (f"{package}.{name}".strip("."), package)
            paths = (path.replace(".", "/").removeprefix("flm_megatron/") for path in candidates)
            yield from [path for path in paths if path in trees() and path != module][:1]


def test_every_room_has_its_place() -> None:
    assert set(ROOMS) == {path.name for path in SOURCE.iterdir() if path.is_dir() and path.name != "__pycache__"}


@pytest.mark.parametrize("room", ROOMS)
def test_no_room_imports_one_above_it(room: str) -> None:
    above = ROOMS[: ROOMS.index(room)]
    inside = [module for module in trees() if module == room or module.startswith(room + "/")]
    assert inside
    wrong = [(module, other) for module in inside for other in imported(module) if other.split("/")[0] in above]
    assert not wrong


def engines(tree: ast.AST) -> bool:
    """Whether a module imports megatron-core, for type checkers alone too."""
    packages = {
        name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
    }
    return "megatron" in packages


def test_the_engine_is_imported_through_its_gate_alone() -> None:
    importing = {module for module, tree in trees().items() if engines(tree)}
    assert importing and all(module.startswith("engine/") for module in importing), importing
    for folder in ("tools", "examples"):
        assert not [path for path in (REPOSITORY / folder).rglob("*.py") if engines(ast.parse(path.read_text()))]


def test_no_module_of_the_tests_imports_the_engine_before_the_device_is_ready() -> None:
    """Tests take it for an oracle, inside functions: imported with a module it would come before `prepare`."""
    early = [
        (path, node.lineno)
        for folder in ("tests", "benchmarks")
        for path in (REPOSITORY / folder).rglob("*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.Import | ast.ImportFrom) and engines(node)
    ]
    assert not early


def test_the_gate_makes_the_device_ready_before_it_imports_the_engine() -> None:
    for module in (module for module in trees() if module.startswith("engine/") and module != "engine/prepare"):
        ready = False
        for node in trees()[module].body:
            ready |= ast.unparse(node) == "prepare()"
            own = isinstance(node, ast.Import | ast.ImportFrom) and engines(node)
            assert ready or not own, f"{module} imports the engine at line {node.lineno} before prepare()"


def test_no_module_imports_itself_by_way_of_others() -> None:
    packages = {module for module in trees() if any(other.startswith(module + "/") for other in trees())}
    # A package that hands on the names of its modules is imported by nobody inside it for these.
    arrows = {module: set(imported(module)) - packages for module in trees() if module not in packages}
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as error:
        pytest.fail(f"a circle: {error.args[1]}")


def loaded(module: str) -> set[str]:
    """What has to be loaded before a module is: what it imports, and the packages that this lies in."""
    targets = set(imported(module, later=False))
    packages = {
        "/".join(parts[:end]) for parts in (name.split("/") for name in targets) for end in range(1, len(parts))
    }
    return targets | {package for package in packages if not f"{module}/".startswith(f"{package}/")}


def test_every_module_can_be_the_first_that_is_imported() -> None:
    try:
        TopologicalSorter({module: loaded(module) for module in trees()}).prepare()
    except CycleError as error:
        pytest.fail(f"a circle: {error.args[1]}")


def test_folders_and_files_are_small() -> None:
    files = Counter(path.parent.relative_to(SOURCE).as_posix() for path in SOURCE.rglob("*.py"))
    assert not {folder: count for folder, count in files.items() if count > MOST_FILES and folder not in APART}
    lines = {path: len(path.read_text().splitlines()) for path in SOURCE.rglob("*.py")}
    assert not {path: count for path, count in lines.items() if count > LONGEST_FILE}


def functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Every function with the module that it is in."""
    for module, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield module, node


def test_functions_are_short() -> None:
    lengths = {(module, node.name): (node.end_lineno or node.lineno) - node.lineno + 1 for module, node in functions()}
    assert not {place: length for place, length in lengths.items() if length > LONGEST_FUNCTION}


def test_arguments_are_typed() -> None:
    bare = [
        (module, node.name, argument.arg)
        for module, node in functions()
        for argument in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        if argument.annotation is None and argument.arg not in ("self", "cls")
    ]
    assert not bare


def test_every_room_says_what_it_is_for() -> None:
    packages = [module for module in trees() if (SOURCE / module / "__init__.py").exists()]
    silent = [module for module in packages if len((ast.get_docstring(trees()[module]) or "").split()) < 8]
    assert len(packages) > len(ROOMS) and not silent


def test_public_names_say_what_they_are() -> None:
    silent = [
        (module, node.name)
        for module, tree in trees().items()
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    ]
    assert not silent


def test_the_root_of_the_package_is_below_all_rooms() -> None:
    root = [module for module in trees() if "/" not in module and module not in ROOMS and module]
    assert root and not [
        (module, other) for module in root for other in imported(module) if other.split("/")[0] in ROOMS
    ]
