"""The rules of the house that no linter knows: sizes, names, docstrings, who may name an engine."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "dynctl").rglob("*.py"))
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60
FORBIDDEN_ROOMS = {"core", "utils", "common", "helpers", "util", "misc"}
ENGINE_NAMES = re.compile(r"\b(vllm|sglang|trtllm|tensorrt)\b", re.IGNORECASE)
# (file, what) → why it may stand.
ALLOWED: dict[tuple[str, str], str] = {}
NAMES_ENGINES = {
    "engines": "all that dynctl knows of engines",
    "mocker": "it is one: vLLM's names are its interface",
}


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def functions(tree: ast.AST) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]


def code_without_docstrings(tree: ast.Module) -> str:
    """Source with docstrings and comments gone: what is left is code."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and (
            node.body and isinstance(node.body[0], ast.Expr) and isinstance(node.body[0].value, ast.Constant)
        ):
            node.body[0].value = ast.Constant(value="")
        # The bare strings that document an attribute.
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value = ast.Constant(value="")
    return ast.unparse(tree)


def is_broad(handler: ast.ExceptHandler) -> bool:
    return handler.type is None or (
        isinstance(handler.type, ast.Name) and handler.type.id in {"Exception", "BaseException"}
    )


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_sizes(path: Path) -> None:
    text = path.read_text()
    lines = text.count("\n")
    assert lines <= MAX_FILE_LINES, f"{relative(path)} has {lines} lines"
    long = [
        f"{relative(path)}:{f.lineno} {f.name} has {(f.end_lineno or 0) - f.lineno + 1} lines"
        for f in functions(ast.parse(text))
        if (f.end_lineno or 0) - f.lineno + 1 > MAX_FUNCTION_LINES and (relative(path), f.name) not in ALLOWED
    ]
    assert not long


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_every_module_says_what_it_promises(path: Path) -> None:
    text = path.read_text()
    if path.name == "__init__.py":
        assert text == "", "package files stay empty: a re-export is how import cycles start"
        return
    tree = ast.parse(text)
    assert ast.get_docstring(tree), f"{relative(path)} has no docstring"
    bare = [
        f"{relative(path)}:{n.lineno} {n.name}"
        for n in tree.body
        if isinstance(n, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and not n.name.startswith("_")
        and not ast.get_docstring(n)
    ]
    assert not bare, "public names without a docstring"


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_no_broad_except_swallows(path: Path) -> None:
    """A broad handler must raise, or log with the traceback and carry its reason in a comment."""
    text = path.read_text()
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.ExceptHandler) or not is_broad(node):
            continue
        body = "\n".join(lines[node.lineno - 1 : node.end_lineno])
        raises = any(isinstance(n, ast.Raise) for n in ast.walk(node))
        logs = "logger.exception(" in body and "#" in "\n".join(lines[node.lineno - 2 : node.end_lineno])
        assert raises or logs, f"{relative(path)}:{node.lineno} swallows an error"


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_only_engines_names_an_engine(path: Path) -> None:
    if path.relative_to(ROOT / "dynctl").parts[0] in NAMES_ENGINES:
        return
    found = ENGINE_NAMES.findall(code_without_docstrings(ast.parse(path.read_text())))
    assert not found, f"{relative(path)} names {sorted(set(found))}"


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_subprocesses_take_lists(path: Path) -> None:
    assert "shell=True" not in path.read_text()
    assert "os.system(" not in path.read_text()


def test_rooms_have_names() -> None:
    assert not {p.name for p in (ROOT / "dynctl").rglob("*") if p.is_dir()} & FORBIDDEN_ROOMS
    managers = [
        f"{relative(p)}: {n.name}"
        for p in SOURCES
        for n in ast.walk(ast.parse(p.read_text()))
        if isinstance(n, ast.ClassDef) and n.name.endswith("Manager")
    ]
    assert not managers


def test_no_weak_words_are_left() -> None:
    """Unfinished places do not get committed."""
    weak = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")
    found = [relative(p) for p in SOURCES if weak.search(p.read_text())]
    assert not found


def test_no_test_is_passed_over_unseen() -> None:
    """What a test needs is told by a marker: a bare skipif would pass in CI, where every test has to run."""
    tests = {path: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    bare = "mark." + "skipif"
    assert not [relative(path) for path, text in tests.items() if bare in text]
    packages = {
        package
        for text in tests.values()
        for given in re.findall(r"mark\.debian\(([^)]*)\)", text)
        for package in re.findall(r"\w+", given)
    }
    installed = re.search(r'^debian="(.*)"$', (ROOT / ".ci" / "run").read_text(), re.M)
    assert installed is not None
    assert packages
    assert packages <= set(installed[1].split())


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from dynctl.cli import main; sys.argv = ['dynctl', '--help']\n"
        "try: main.main()\nexcept SystemExit: pass\n"
        "heavy = {'typer', 'rich', 'pydantic', 'yaml', 'zmq', 'msgspec', 'uvloop', 'asyncio', 'tokenizers'}\n"
        "sys.stderr.write(' '.join(sorted(heavy & set(sys.modules))))"
    )

    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stderr == ""
    assert "Usage" in done.stdout
