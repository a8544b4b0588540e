"""The house rules of CONTRIBUTING.md, held by reading the source: import directions, caps, links, hygiene."""

from __future__ import annotations

import ast
import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LINKED = ("parallel", "kernels", "launch")
OUTSIDE = ("tools", "examples", "tests")
FOREIGN = ("torch", "megatron")
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_POSITIONAL = 400, 60, 6

# A room may import itself and the rooms before it; rooms on one line do not import each other.
ORDER: tuple[tuple[str, ...], ...] = (
    ("errors",),
    ("config",),  # and every */config.py
    ("kernels",),
    ("parallel",),
    ("model",),
    ("data",),
    ("train",),
    ("rollout", "evaluate"),
    ("stages",),
    ("memory",),
    ("plan",),
    ("overlap",),
    ("launch",),
    ("run_data",),
    ("run_examples", "run_rollouts"),
    ("run_stage",),
    ("run_model", "run_parts"),
    ("run_policy", "run_reference"),
    ("run_judge",),
    ("run_beside",),
    ("run_validation",),
    ("run_hooks", "run_watch"),
    ("run", "run_generate"),
    ("run_dry_stage",),
    ("run_lr_range", "run_profile", "run_dry", "run_eval", "run_teacher", "convert"),
    ("run_doctor_measure", "run_doctor"),
    ("run_doctor_ranks",),
    ("run_doctor_pace",),
    ("run_doctor_world",),
    ("verify",),
    ("commands",),
    ("cli",),
)
BESIDE = ("replay", "profile", "diagnose", "doctor", "survival")
"""They stand where `memory`, `plan`, `overlap` stand; neither group imports the other."""

ARITHMETIC = ("megatron_slm.parallel.layout", "megatron_slm.model.counts", "megatron_slm.train.batch_size")
"""Pure functions of numbers and of a section, without torch: `config` checks its rules with them."""

NARROW: dict[str, Callable[[str], bool]] = {
    "kernels": lambda target: False,
    "data": lambda target: room_of(target) != "parallel" or target in (*ARITHMETIC, "megatron_slm.parallel.config"),
    "launch": lambda target: room_of(target) in ("errors", "config") or target in ARITHMETIC,
}
"""Rooms that may import less than their place in the order allows."""


@dataclass(frozen=True)
class Module:
    """One source file under the name it is imported by (for a file outside the package: its path)."""

    name: str
    path: Path
    tree: ast.Module
    lines: int

    @property
    def room(self) -> str:
        return room_of(self.name)


def room_of(name: str) -> str:
    """``megatron_slm.model.config`` is in ``config``: a section without torch, left of everything."""
    parts = name.split(".")
    if len(parts) == 3 and parts[2] == "config":
        return "config"
    return parts[1] if len(parts) > 1 and parts[0] == "megatron_slm" else parts[0]


def parsed(name: str, path: Path) -> Module:
    text = path.read_text(encoding="utf-8")
    return Module(name, path, ast.parse(text, str(path)), len(text.splitlines()))


def package_modules() -> Iterator[Module]:
    """Every module of the package, each file once: the three folders beside it, then what lies in it."""
    roots = [(ROOT / room, f"megatron_slm.{room}") for room in LINKED]
    roots += [
        (path, f"megatron_slm.{path.name}")
        for path in (ROOT / "megatron_slm").iterdir()
        if path.is_dir() and not path.is_symlink()
    ]
    for folder, prefix in roots:
        for path in sorted(folder.rglob("*.py")):
            yield parsed(".".join([prefix, *path.relative_to(folder).with_suffix("").parts]), path)
    for path in sorted((ROOT / "megatron_slm").glob("*.py")):
        yield parsed(f"megatron_slm.{path.stem}", path)


def outside_modules(*folders: str) -> Iterator[Module]:
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield parsed(str(path.relative_to(ROOT)), path)


PACKAGE = list(package_modules())
NAMES = {module.name for module in PACKAGE}


def imports(tree: ast.AST, *, typing_only: bool = True) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import. ``from a import b`` gives ``a.b``; the caller decides what ``b`` is."""
    skipped: set[ast.AST] = set()
    if not typing_only:
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
                skipped.update(inner for statement in node.body for inner in ast.walk(statement))
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are banned by ruff"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def own(target: str) -> str | None:
    """The module of ours that an imported dotted name belongs to, or None for somebody else's."""
    if target.split(".")[0] != "megatron_slm":
        return None
    parts = target.split(".")
    return next((name for size in range(len(parts), 0, -1) if (name := ".".join(parts[:size])) in NAMES), target)


def allowed(source: str, target: str) -> bool:
    """Whether a module in ``source``'s room may import ``target`` (both dotted names of ours)."""
    here, there = room_of(source), room_of(target)
    if here == there or there == "errors":
        return True
    if here in NARROW:
        return NARROW[here](target)
    if here == "config":
        return target in ARITHMETIC
    place = {room: index for index, rooms in enumerate(ORDER) for room in rooms}
    memory = place["memory"]
    if here in BESIDE:
        return there in place and place[there] < memory
    if there in BESIDE:
        return place[here] > place["overlap"]
    return place[there] < place[here]


def direction_problems(module: Module) -> Iterator[str]:
    for line, name in imports(module.tree):
        target = own(name)
        if target is not None and not allowed(module.name, target):
            yield f"{module.path}:{line}: {module.room} may not import {target}"


def hygiene_problems(module: Module) -> Iterator[str]:
    """Sizes, ``global``, bare asserts, and calls that run because a file is imported."""
    if module.lines > MAX_FILE_LINES:
        yield f"{module.path}: {module.lines} lines, at most {MAX_FILE_LINES}"
    for node in ast.walk(module.tree):
        where = f"{module.path}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Global):
            yield f"{where}: a global statement"
        elif isinstance(node, ast.Assert) and node.msg is None:
            yield f"{where}: an assert without a sentence"
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            positional = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args)]
            count = len([name for name in positional if name not in ("self", "cls", "ctx")])
            if lines > MAX_FUNCTION_LINES:
                yield f"{where}: {node.name} has {lines} lines, at most {MAX_FUNCTION_LINES}"
            # Triton knows no keyword-only parameters.
            kernel = any(ast.unparse(one) == "triton.jit" for one in node.decorator_list)
            if count > MAX_POSITIONAL and not kernel:
                yield f"{where}: {node.name} takes {count} positional parameters, at most {MAX_POSITIONAL}"
    for statement in import_time_statements(module.tree.body):
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
            yield f"{module.path}:{statement.lineno}: a call at import time"


def import_time_statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """What runs when a module is imported, but for the part of a program that is run by path."""
    for statement in body:
        if isinstance(statement, ast.If) and ast.unparse(statement.test).startswith("__name__ =="):
            continue
        yield statement
        if isinstance(statement, ast.ClassDef | ast.If | ast.Try | ast.With | ast.For | ast.While):
            for part in ("body", "orelse", "finalbody"):
                yield from import_time_statements(getattr(statement, part, []))
            for handler in getattr(statement, "handlers", []):
                yield from import_time_statements(handler.body)


def substitution_problems(module: Module) -> Iterator[str]:
    """Assignments to what belongs to torch or megatron-core."""
    foreign: set[str] = set()
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in FOREIGN:
            foreign.update(alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.Import):
            names = [(alias.asname or alias.name).split(".")[0] for alias in node.names]
            foreign.update(
                name for name, alias in zip(names, node.names, strict=True) if alias.name.split(".")[0] in FOREIGN
            )
    for node in ast.walk(module.tree):
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign | ast.Delete):
            targets = node.targets
        elif isinstance(node, ast.AugAssign | ast.AnnAssign):
            targets = [node.target]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("setattr", "delattr"):
            targets = [ast.Attribute(node.args[0], "_")]
        for target in targets:
            root: ast.AST = target
            while isinstance(root, ast.Attribute):
                root = root.value
            if isinstance(target, ast.Attribute) and isinstance(root, ast.Name) and root.id in foreign:
                yield f"{module.path}:{node.lineno}: changes {ast.unparse(target)}; only parallel/device.py may"


def forbidden_problems(module: Module) -> Iterator[str]:
    """Names that are imported nowhere, or in one file only."""
    in_tests = module.name.startswith("tests/")
    for line, name in imports(module.tree):
        where, parts = f"{module.path}:{line}", name.split(".")
        if parts[:2] == ["megatron", "training"]:
            yield f"{where}: megatron.training is in no wheel of core 0.16"
        if "parallel_state" in parts and module.name != "megatron_slm.parallel.groups" and not in_tests:
            yield f"{where}: parallel_state is touched in parallel/groups.py alone"
        if parts[0] in LINKED:
            yield f"{where}: {parts[0]} is imported as megatron_slm.{parts[0]}"
        if parts[:2] == module.name.split("/")[:2]:
            continue  # the files of one example
        if not in_tests and (parts[0] in OUTSIDE or parts[:2] == ["megatron_slm", "cli"]):
            yield f"{where}: nothing imports {parts[0] if parts[0] in OUTSIDE else 'cli'}"


def all_problems(check: Callable[[Module], Iterator[str]], modules: list[Module]) -> str:
    return "\n".join(itertools.chain.from_iterable(check(module) for module in modules))


def test_imports_run_one_way() -> None:
    assert all_problems(direction_problems, PACKAGE) == ""


def test_every_room_has_its_place() -> None:
    known = {room for rooms in ORDER for room in rooms} | set(BESIDE) | {"__init__"}
    assert {module.room for module in PACKAGE} <= known, "a new room enters ORDER in the change that makes it"


def test_no_two_modules_import_each_other() -> None:
    graph = {
        module.name: {target for _, name in imports(module.tree, typing_only=False) if (target := own(name)) in NAMES}
        for module in PACKAGE
    }
    while leaves := [name for name, targets in graph.items() if not (targets & graph.keys()) - {name}]:
        for name in leaves:
            del graph[name]
    assert not graph, f"these modules import each other in a circle (or import one that does): {sorted(graph)}"


def test_sizes_and_hygiene() -> None:
    assert all_problems(hygiene_problems, [*PACKAGE, *outside_modules("tools", "examples")]) == ""


def test_only_the_device_seam_changes_core_or_torch() -> None:
    modules = [module for module in PACKAGE if module.name != "megatron_slm.parallel.device"]
    assert all_problems(substitution_problems, [*modules, *outside_modules("tools", "examples")]) == ""


def test_forbidden_imports() -> None:
    assert all_problems(forbidden_problems, [*PACKAGE, *outside_modules(*OUTSIDE)]) == ""


def test_links_and_front_doors() -> None:
    for room in LINKED:
        link = ROOT / "megatron_slm" / room
        assert link.is_symlink(), f"{link} must be a link"
        assert str(link.readlink()) == f"../{room}", "a relative link, so that a clone anywhere resolves it"
        assert link.resolve() == ROOT / room
        assert (ROOT / room / "README.md").is_file(), f"{room}/README.md is the front door"
        assert not list((ROOT / room).rglob("__init__.py")), "a regular package would hide another one of this name"


def test_every_init_is_empty_and_every_room_in_the_package_has_one() -> None:
    for folder in [ROOT / "megatron_slm", *(ROOT / "megatron_slm").iterdir()]:
        if folder.is_dir() and not folder.is_symlink() and folder.name != "__pycache__":
            assert (folder / "__init__.py").read_text() == "", f"{folder}/__init__.py must be there and empty"
            assert len(list(folder.iterdir())) > 1, f"{folder} is an empty room"


def test_no_file_run_by_path_hides_the_standard_library() -> None:
    for folder in (*LINKED, "tools", "examples", "tests/bench"):
        names = {path.stem for path in (ROOT / folder).rglob("*.py")}
        assert not names & sys.stdlib_module_names, f"{folder}: these names would break imports of programs run by path"


def is_torch_free(module: Module) -> bool:
    return module.room in ("errors", "config", "launch") or module.name in ARITHMETIC


def test_pure_modules_import_no_torch() -> None:
    names = sorted(module.name for module in PACKAGE if is_torch_free(module))
    # The command imports torch inside the verbs that need it.
    names += ["megatron_slm.cli", *(name for name in NAMES if name.startswith("megatron_slm.commands."))]
    assert len(names) > 20, "the list of pure modules was lost"
    program = (
        "import importlib, sys\n"
        f"for name in {names}:\n"
        "    importlib.import_module(name)\n"
        "    assert 'torch' not in sys.modules, name + ' imports torch'\n"
        f"    assert not {set(LINKED)} & set(sys.modules), name + ' is known under a second name'\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


BAD = {
    "data takes torch's groups": (direction_problems, "megatron_slm.data.x", "import megatron_slm.parallel.groups"),
    "config looks to the right": (direction_problems, "megatron_slm.config.x", "from megatron_slm.train import loop"),
    "a section looks around": (direction_problems, "megatron_slm.model.config", "import megatron_slm.model.gpt"),
    "train knows a stage": (direction_problems, "megatron_slm.train.x", "def f():\n from megatron_slm.stages import a"),
    "kernels know us": (direction_problems, "megatron_slm.kernels.x", "from megatron_slm.model.config import A"),
    "launch knows the loop": (direction_problems, "megatron_slm.launch.x", "import megatron_slm.train.loop"),
    "neighbours": (direction_problems, "megatron_slm.rollout.x", "import megatron_slm.evaluate.perplexity"),
    "doctor plans": (direction_problems, "megatron_slm.doctor.x", "import megatron_slm.plan.cost"),
    "plan replays": (direction_problems, "megatron_slm.plan.x", "import megatron_slm.replay.capsule"),
    "a long file": (hygiene_problems, "megatron_slm.x", "#\n" * 401),
    "a long function": (hygiene_problems, "megatron_slm.x", "def f():\n" + " pass\n" * 60),
    "seven parameters": (hygiene_problems, "megatron_slm.x", "def f(a, b, c, d, e, f, g): pass"),
    "global": (hygiene_problems, "megatron_slm.x", "def f():\n global a"),
    "bare assert": (hygiene_problems, "megatron_slm.x", "assert 1"),
    "import effect in a class": (hygiene_problems, "megatron_slm.x", "class A:\n print(1)"),
    "import effect of a handler": (
        hygiene_problems,
        "megatron_slm.x",
        "try:\n pass\nexcept ValueError:\n print(1)",
    ),
    "import effect": (hygiene_problems, "megatron_slm.x", "try:\n print(1)\nexcept ValueError:\n pass"),
    "patch": (substitution_problems, "megatron_slm.x", "import torch\ntorch.cuda.current_device = int"),
    "patch by name": (
        substitution_problems,
        "megatron_slm.x",
        "from megatron.core import a as b\nsetattr(b.c, 'd', 1)",
    ),
    "training": (forbidden_problems, "megatron_slm.x", "from megatron.training import arguments"),
    "parallel_state": (forbidden_problems, "megatron_slm.x", "from megatron.core import parallel_state"),
    "second name": (forbidden_problems, "megatron_slm.x", "from launch.local import run_local"),
    "cli": (forbidden_problems, "megatron_slm.x", "from megatron_slm import cli"),
    "tests": (forbidden_problems, "tools/x.py", "from tests.ranks import run_ranks"),
}


@pytest.mark.parametrize("case", BAD)
def test_each_rule_can_fail(case: str) -> None:
    check, name, source = BAD[case]
    assert len(list(check(Module(name, Path("x.py"), ast.parse(source), len(source.splitlines()))))) == 1


def test_the_distributed_tests_are_here_and_collected(pytestconfig: pytest.Config) -> None:
    """Both pytest and the usual ignore lists pass over folders named dist."""
    assert "dist" not in pytestconfig.getini("norecursedirs")
    assert len(list((ROOT / "tests" / "dist").glob("test_*.py"))) > 5
