"""Which broken lines do the tests find? `make mutants` changes one thing at a time and runs them.

Comes in: modules or folders of the package. Goes out: a table, and the changes that no test found.
Everything happens in a copy of the work tree below the system's temporary folder. The changes are
listed at `changes`; mutmut, which was tried, removes no statement and changes no property.
"""

from __future__ import annotations

import argparse
import ast
import compileall
import gc
import importlib
import os
import py_compile
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]
QUICK = "not slow and not multiprocess"
TEST_SECONDS = 30
"""What takes longer hangs, and is found."""
SWAPPED: dict[type[ast.AST], type[ast.AST]] = {
    **{ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt},
    **{ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is},
    **{ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And},
    **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.Div: ast.Mult},
    **{ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult},
    **{ast.LShift: ast.RShift, ast.RShift: ast.LShift, ast.BitAnd: ast.BitOr},
    **{ast.BitOr: ast.BitAnd, ast.BitXor: ast.BitOr},
}
UNCHANGED_FIELDS = {"annotation", "returns", "decorator_list", "type_comment"}


def changes(node: ast.AST) -> Iterator[tuple[ast.AST, ast.AST]]:
    """Yield every change of one node: it or its condition, and what stands in its place.

    A statement is left out; `return` returns nothing; a comparison, `and`, `not` or operator turns
    round; a condition is negated; a number grows by one, a text by a character; a keyword
    argument is left out.
    """
    match node:
        case ast.Expr() if _is_docstring(node):
            pass
        case ast.Expr() | ast.AugAssign() | ast.Delete() | ast.Raise() | ast.Break():
            yield node, ast.Pass()
        case ast.Continue() | ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            yield node, ast.Pass()
        case ast.Return(value=ast.expr() as value) if ast.unparse(value) != "None":
            yield node, ast.Return()
        case ast.Compare(ops=[operator, *others]):
            yield node, _with(node, ops=[SWAPPED[type(operator)](), *others])
        case ast.BoolOp() | ast.BinOp() if type(node.op) in SWAPPED and not _is_text(node):
            yield node, _with(node, op=SWAPPED[type(node.op)]())
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
            yield node, operand
        case ast.If(test=test) | ast.IfExp(test=test) | ast.While(test=test):
            if not isinstance(test, ast.Compare | ast.BoolOp | ast.UnaryOp):
                yield test, ast.UnaryOp(ast.Not(), test)
        case ast.Constant(value=bool() as value):
            yield node, ast.Constant(not value)
        case ast.Constant(value=int() | float() as value):
            yield node, ast.Constant(value + 1)
        case ast.Constant(value=str() as value) if " " not in value:
            yield node, ast.Constant(value + "~")
        case ast.Constant(value=bytes() as value):
            yield node, ast.Constant(value + b"~")
        case ast.JoinedStr(values=values) if not any(_has_space(value) for value in values):
            yield node, ast.JoinedStr([*values, ast.Constant("~")])
        case ast.Call(keywords=keywords):
            for kept in keywords:
                if kept.arg not in (None, "strict"):
                    yield (
                        node,
                        _with(node, keywords=[other for other in keywords if other is not kept]),
                    )
        case _:
            pass


def _with(node: ast.AST, **fields: object) -> ast.AST:
    changed = copy(node)
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed


def _is_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _is_text(node: ast.AST) -> bool:
    sides = (node.left, node.right) if isinstance(node, ast.BinOp) else ()
    return any(isinstance(each, ast.JoinedStr) or _has_space(each) for each in sides)


def _has_space(node: ast.AST) -> bool:
    """A text with a space in it is taken for a message."""
    return isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value


def _changeable(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes that run: no annotations, decorators, messages or assertions."""
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return
    if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "Literal":
        return
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "TypeVar":
        return
    if isinstance(node, ast.keyword) and node.arg == "strict":  # of zip: an assertion
        return
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "cast":
        yield from _changeable(node.args[1])
        return
    yield node
    if isinstance(node, ast.Raise | ast.Assert | ast.JoinedStr) or _is_docstring(node):
        return
    for name, value in ast.iter_fields(node):
        if name not in UNCHANGED_FIELDS:
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from _changeable(child)


@dataclass(frozen=True)
class Mutant:
    """A module with one change: the line, what was and what is said of it, and the source."""

    line: int
    change: str
    source: bytes


def mutants(source: bytes) -> list[Mutant]:
    """Return every mutant of a module, in the order of its lines."""
    starts = [0]
    for text in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(text))
    found = []
    for node in _changeable(ast.parse(source)):
        for old, new in changes(node):
            assert isinstance(old, ast.stmt | ast.expr)
            first = starts[old.lineno - 1] + old.col_offset
            last = starts[(old.end_lineno or 0) - 1] + (old.end_col_offset or 0)
            text = ast.unparse(ast.fix_missing_locations(new))
            whole = text if isinstance(new, ast.stmt) else f"({text})"
            changed = source[:first] + whole.encode() + source[last:]
            said = f"{_first_line(ast.unparse(old))} → {_first_line(text)}"
            found.append(Mutant(old.lineno, said, changed))
    return sorted(found, key=lambda mutant: mutant.line)


def _first_line(text: str) -> str:
    line = text.partition("\n")[0]
    return line if len(line) <= 90 else line[:89] + "…"


@dataclass
class Outcome:
    """What became of one module's mutants."""

    module: str
    num_killed: int = 0
    survivors: list[Mutant] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def num_mutants(self) -> int:
        """How many were tried."""
        return self.num_killed + len(self.survivors)


def _tests_of(module: Path) -> list[str]:
    """Return the tests of a module, the file of its name first, then its whole package's."""
    folder = Path("tests", module.parent.name)
    nearest = folder / f"test_{module.stem}.py"
    others = [path for path in sorted(folder.glob("test_*.py")) if path != nearest]
    return [str(path) for path in [nearest, *others] if path.exists()]


class _WithoutShrinking:
    """A plugin of pytest: an example that fails is enough, the smallest one is not looked for."""

    def pytest_collection(self) -> None:
        from hypothesis import Phase, settings

        phases = (Phase.explicit, Phase.reuse, Phase.generate)
        settings.register_profile("mutants", settings(), phases=phases)
        settings.load_profile("mutants")


def _run_tests(tests: list[str], log: Path) -> int:
    """Run tests until one fails, in this process; write down what of others they imported."""
    os.setsid()
    with log.open("wb") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    import pytest

    options = ["-x", "-q", "--tb=line", "-m", QUICK, f"--timeout={TEST_SECONDS}"]
    options += ["--timeout-method=thread"]  # ends the process: hypothesis would try again
    warnings = ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # of what is preloaded
    folders = ["-p", "no:cacheprovider", f"--basetemp={log.parent / 'basetemp'}"]
    arguments = [*options, *warnings, *folders, *tests]
    status = pytest.main(arguments, plugins=[_WithoutShrinking()])
    imported = [name for name, module in [*sys.modules.items()] if _is_of_others(module)]
    (log.parent / "imported").write_text("\n".join(imported))
    return status


def _passes(tests: list[str], log: Path, seconds: float) -> bool:
    """Run tests in a fork of this process; False: one failed, or they took too long."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = _run_tests(tests, log)
        finally:  # whatever a mutant does: nothing of the parent's is undone here
            os._exit(status)
    try:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(status) == 0
            time.sleep(0.02)
        return False
    finally:
        try:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
        except (ProcessLookupError, ChildProcessError):
            pass


def _is_of_others(module: ModuleType) -> bool:
    return "site-packages" in (getattr(module, "__file__", None) or "")


def _preload(names: list[str]) -> None:
    """Import what takes seconds once: each mutant's process forks from this one."""
    for name in names:
        importlib.import_module(name)
    gc.freeze()  # and never search it for garbage


def _copy_work_tree(target: Path) -> None:
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.check_output(listed, cwd=ROOT, text=True).split("\0"):
        if name and (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    # Whether these are stale is decided by the source's digest: a mutant comes within a tick.
    checked = py_compile.PycInvalidationMode.CHECKED_HASH
    compileall.compile_dir(target / "sdxl_distill", quiet=1, invalidation_mode=checked)


@cache
def _seconds_unchanged(folder: Path, log: Path) -> float:
    """Return how long the tests of a package take; what they import is kept for all mutants."""
    began = time.monotonic()
    if not _passes([str(path) for path in folder.glob("test_*.py")], log, 600.0):
        sys.exit(f"{log.read_text()}\n{folder}: tests fail without any change")
    sys.dont_write_bytecode = True
    _preload((log.parent / "imported").read_text().splitlines())
    return time.monotonic() - began


def _try_module(outcome: Outcome, sample: int, log: Path) -> None:
    """Try the mutants of a module in the current folder, a copy, and leave it as it was."""
    path = Path(outcome.module)
    tests, source = _tests_of(path), path.read_bytes()
    patience = TEST_SECONDS + 2 * _seconds_unchanged(Path(tests[0]).parent, log)
    began = time.monotonic()
    tried = mutants(source)
    if len(tried) > sample:
        drawn = random.Random(outcome.module).sample(range(len(tried)), sample)
        tried = [tried[place] for place in sorted(drawn)]
    try:
        for mutant in tried:
            path.write_bytes(mutant.source)
            if _passes(tests, log, patience):
                outcome.survivors.append(mutant)
                print(f"  {outcome.module}:{mutant.line}: {mutant.change}", flush=True)
            else:
                outcome.num_killed += 1
    finally:
        path.write_bytes(source)
        outcome.seconds = time.monotonic() - began


def main() -> None:
    """Try the mutants of the modules that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("modules", nargs="+", help="files or folders below the package")
    parser.add_argument("--sample", type=int, default=10**6, help="at most so many per module")
    asked = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):  # a background process ignores Ctrl-C
        signal.signal(number, signal.default_int_handler)
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        tree = Path(folder, "tree")
        _copy_work_tree(tree)
        os.chdir(tree)
        sys.path[0] = os.environ["PYTHONPATH"] = str(tree)
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
        paths = [path for name in asked.modules for path in _modules(Path(name))]
        try:
            for path in paths:
                outcomes.append(Outcome(str(path)))
                _try_module(outcomes[-1], asked.sample, Path(folder, "log"))
        except KeyboardInterrupt:
            print("Interrupted; until then:")
        os.chdir(ROOT)
    print(f"\n{'module':44} mutants killed survived seconds")
    for each in outcomes:
        columns = each.num_mutants, each.num_killed, len(each.survivors), round(each.seconds)
        print(f"{each.module:44} {columns[0]:7} {columns[1]:6} {columns[2]:8} {columns[3]:7}")


def _modules(path: Path) -> list[Path]:
    every = sorted(path.glob("*.py")) if path.is_dir() else [path]
    return [each for each in every if each.stem != "__init__"]


if __name__ == "__main__":
    main()
