"""The rooms, their order, and what pyproject must say of them."""

import ast
import graphlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ["kernels", "recipes", "launcher"]  # each may import from itself and from those before it


def modules(room):
    return sorted((ROOT / room).rglob("*.py"))


def imported(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, 0) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "", node.level


@pytest.mark.parametrize("room", ROOMS)
def test_imports_go_from_launcher_to_recipes_to_kernels_and_never_back(room):
    later = ROOMS[ROOMS.index(room) + 1 :]
    for path in modules(room):
        for name, level in imported(path):
            first = name.split(".")[0]
            assert not name.startswith("xformer_train"), f"{path}: import {name} relatively"
            if level >= 2:
                assert first not in later, f"{path} imports from {first}"
            if level == 0:
                assert first not in ROOMS, f"{path}: {first} as a top-level name is another, public package"


def modules_imported(path):
    """The files of this project that a file imports, inside functions too; what only types need does not count."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            folder = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            inside = [folder / f"{alias.name}.py" for alias in node.names] if folder.is_dir() else []
            yield from (file for file in (folder.with_suffix(".py"), *inside) if file.exists())


def test_no_two_modules_of_the_launcher_need_each_other():
    graph = {path: set(modules_imported(path)) for path in modules("launcher")}
    assert any(graph.values())
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError with the circle


def test_importing_the_kernels_imports_neither_triton_nor_the_compiler():
    """torch._dynamo imports triton, and takes a second."""
    program = (
        "import sys; from xformer_train.kernels import te; print({'triton', 'torch._dynamo'} & sys.modules.keys())"
    )
    assert subprocess.check_output([sys.executable, "-c", program], text=True) == "set()\n"


def test_triton_is_imported_only_by_its_own_files():
    for room in ROOMS:
        for path in modules(room):
            if not path.stem.endswith("_triton"):
                assert all(name.split(".")[0] != "triton" for name, _ in imported(path)), path


def test_every_package_is_listed_in_pyproject():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {"/".join(p.parent.relative_to(ROOT).parts) for room in ROOMS for p in (ROOT / room).rglob("__init__.py")}
    listed = {settings["package-dir"][name] for name in settings["packages"]}
    assert folders == listed
    assert {f"xformer_train.{folder.replace('/', '.')}" for folder in folders} == set(settings["packages"])


def test_files_and_functions_stay_readable():
    for room in [*ROOMS, "scripts"]:
        for path in modules(room):
            if path.stem.endswith("_triton"):
                continue
            text = path.read_text(encoding="utf-8")
            assert text.count("\n") <= 400, f"{path} has {text.count(chr(10))} lines"
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.FunctionDef):
                    length = (node.end_lineno or 0) - node.lineno + 1
                    assert length <= 60, f"{path}:{node.lineno} {node.name} has {length} lines"
