"""The law of the tree: which folder may import which, and what pyproject must say of the folders."""

import ast
import functools
import graphlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ["kernels", "recipes", "launcher"]  # each may import from itself and from those before it
MODELS = [path.parent.name for path in (ROOT / "recipes").glob("*/recipe.py")]
LADDERS = {
    "kernels": [["errors"], ["parallel"], ["ops"], ["fp8"], ["layers"]],
    "recipes": [["config"], ["recipe"], ["data", "shared"], MODELS, ["transformers_format"]],
    "launcher": [
        ["config"],
        ["processes"],
        ["optim"],
        ["checkpoint"],
        ["reporting"],
        ["trained_models"],
        ["training"],
        ["commands"],
    ],
}
"""The folders and files at the root of each room, lowest first. One imports itself and what stands before it; those of one step
do not import each other."""
MACHINES = {"machines", "config", "processes"}  # machines/ stands beside the ladder: what starts runs, not part of one
DOORS = {"kernels": ["te", "deepspeed"], "recipes": ["policies"], "launcher": []}
"""Folders that publish other libraries' names: they import anything of their room, and nobody inside imports them."""
PUBLISHING = {"kernels", "kernels/te", "recipes", "recipes/policies"}
"""Folders whose __init__.py holds more than a docstring."""
LARGEST_FOLDER = 14


def modules(room):
    return sorted((ROOT / room).rglob("*.py"))


def imported(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, 0) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "", node.level


@functools.cache
def files_imported(path):
    """The files of this project that a file imports, inside functions too; what only types need does not count."""
    found, tree = set(), ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        base = path.parents[node.level - 1].joinpath(*(node.module or "").split(".") if node.module else ())
        if base.with_suffix(".py").exists():
            found.add(base.with_suffix(".py"))
            continue
        for alias in node.names:
            inside = base / f"{alias.name}.py"
            found.add(inside if inside.exists() else base / alias.name / "__init__.py")
    return {file if file.exists() else file.parents[1] / "__init__.py" for file in found} - {path}


def place(path):
    """(room, folder below it) of a file; a file at the root of a room is named by its stem."""
    room, *rest = path.relative_to(ROOT).parts
    return room, rest[0].removesuffix(".py")


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


@pytest.mark.parametrize("room", ROOMS)
def test_a_folder_imports_only_folders_below_it(room):
    step = {name: number for number, names in enumerate(LADDERS[room]) for name in names}
    doors = DOORS[room]
    for path in modules(room):
        _, folder = place(path)
        for file in files_imported(path):
            target_room, target = place(file)
            if target_room != room or target == folder or "__init__" in (folder, target):
                continue
            where = f"{path.relative_to(ROOT)} imports {file.relative_to(ROOT)}"
            if folder == "machines":
                assert target in MACHINES, where
            elif folder not in doors and folder != "__main__":
                assert folder in step, f"{folder} has no step in LADDERS"
                assert target in step or (room, folder, target) == ("launcher", "commands", "machines"), where
                assert target == "machines" or step[target] < step[folder], where


def test_the_doors_are_imported_by_nobody_inside():
    for room in ROOMS:
        for path in modules(room):
            own_room, folder = place(path)
            for file in files_imported(path):
                target_room, target = place(file)
                if target in DOORS[target_room] and (target_room, target) != (own_room, folder):
                    assert path.name == "__init__.py" and folder == "__init__", f"{path} imports {file}"


def test_the_root_of_ops_does_not_import_the_ops_in_its_folders():
    for path in (ROOT / "kernels" / "ops").glob("*.py"):
        assert all(file.parent.parent.name != "ops" for file in files_imported(path)), path


def test_no_two_files_need_each_other():
    graph = {path: files_imported(path) for room in ROOMS for path in modules(room)}
    assert sum(map(len, graph.values())) > 500, "the imports were not found"
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError with the circle


def test_a_folder_holds_few_files_and_says_what_it_is():
    for room in ROOMS:
        for init in (ROOT / room).rglob("__init__.py"):
            folder, tree = init.parent, ast.parse(init.read_text(encoding="utf-8"))
            assert len(list(folder.glob("*.py"))) - 1 <= LARGEST_FOLDER, folder
            assert ast.get_docstring(tree), f"{init} says in no sentence what the folder is"
            if str(folder.relative_to(ROOT)) not in PUBLISHING:
                assert len(tree.body) == 1, f"{init} holds more than its sentence"


LIGHT_COMMANDS = [
    ["--help"],
    ["launch", "--help"],
    ["config", "show", "--config", "configs/bert_tiny.yaml"],
    ["config", "check", "--config", "configs/gpt_tiny.yaml"],
    ["config", "schema"],
    ["checkpoints", "ls", "--help"],
]


@pytest.mark.parametrize("arguments", LIGHT_COMMANDS, ids=" ".join)
def test_what_only_reads_imports_no_torch(arguments):
    """`checkpoints ls` of a run is tested in tests/launcher/commands/test_checkpoints.py."""
    program = (
        "import sys\nfrom xformer_train.launcher.commands.app import app\n"
        f"try:\n    app({arguments!r})\nexcept SystemExit as ended:\n    assert not ended.code, ended.code\n"
        "print({'torch', 'deepspeed', 'transformers'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "set()"


def test_importing_the_kernels_imports_neither_triton_nor_the_compiler():
    """torch._dynamo imports triton, and takes a second."""
    program = (
        "import sys; from xformer_train.kernels import te, DeepSpeedTransformerLayer, LayerStack; "
        "print({'triton', 'torch._dynamo'} & sys.modules.keys())"
    )
    assert subprocess.check_output([sys.executable, "-c", program], text=True) == "set()\n"


@pytest.mark.parametrize("package", ["kernels", "recipes", "recipes.policies", "kernels.te"])
def test_every_name_that_a_package_publishes_can_be_imported(package):
    program = f"from xformer_train import {package}" if "." not in package else f"import xformer_train.{package}"
    program += f"\nfrom importlib import import_module\nm = import_module('xformer_train.{package}')\n"
    program += "print([name for name in m.__all__ if type(getattr(m, name)).__name__ == 'module'])"
    assert subprocess.check_output([sys.executable, "-c", program], text=True) in ("[]\n", "['te']\n")


def test_triton_is_imported_only_by_its_own_files():
    for room in ROOMS:
        for path in modules(room):
            if not path.stem.endswith("_triton"):
                assert all(name.split(".")[0] != "triton" for name, _ in imported(path)), path


def test_every_package_is_listed_in_pyproject():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = [p.parent.relative_to(ROOT).parts for room in ROOMS for p in (ROOT / room).rglob("__init__.py")]
    listed = {"xformer_train", *(".".join(("xformer_train", *folder)) for folder in folders)}
    assert sorted(listed) == sorted(settings["packages"])
    namespace = {"xformer_train": "launcher/namespace"}
    assert settings["package-dir"] == namespace | {f"xformer_train.{room}": room for room in ROOMS}


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
