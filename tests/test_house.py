"""Rules of the house, read from the source: imports, what importing does, what must be said."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted(path.stem for path in ROOT.glob("*.py"))
TREES = {name: ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8")) for name in MODULES}

# What a module may import of ours. A new module must be put into this table.
GROUND = {"conformer", "quantizer", "losses", "fast", "training", "demo"}
MAY_IMPORT = {
    **{name: set() for name in GROUND},
    "training": {"fast"},
    "corpora": {"conformer", "training"},
    "importers": {"corpora", "training"},
    "shards": {"corpora", "importers", "training"},
    "data": {"conformer", "training", "corpora", "importers", "shards"},
    "rnnt": {"conformer", "losses"},
    "decoders": {"conformer", "losses", "rnnt", "training"},
    "pretrain": GROUND | {"corpora", "importers", "shards", "data"},
    "evaluate": GROUND | {"corpora", "importers", "shards", "data", "decoders", "rnnt", "pretrain"},
    "finetune": GROUND
    | {"corpora", "importers", "shards", "data", "decoders", "rnnt", "pretrain", "evaluate"},
}


def imported(tree: ast.AST) -> set[str]:
    """First names of everything imported anywhere in a module, functions included."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import in a flat repository"
            names.add(node.module.split(".")[0])
    return names


OURS = {name: imported(tree) & set(MODULES) for name, tree in TREES.items()}


def test_the_modules_of_the_method_are_there():
    assert GROUND | {"data", "pretrain"} <= set(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_downward(name):
    assert name in MAY_IMPORT, f"{name}.py is new: say in MAY_IMPORT what it may import"
    assert OURS[name] <= MAY_IMPORT[name], f"{name} must not import {OURS[name] - MAY_IMPORT[name]}"


def test_there_is_no_cycle():
    left = dict(OURS)
    while left:
        free = {name for name, needs in left.items() if not needs & left.keys()}
        assert free, f"import cycle among {sorted(left)}"
        left = {name: needs for name, needs in left.items() if name not in free}


def test_importing_prints_nothing_starts_nothing_and_loads_no_optional_library(tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        f"import {', '.join(MODULES)}\n"
        "import torch, threading\n"
        "loaded = {'matplotlib', 'espeakng_loader', 'transformers'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
        "assert not torch.distributed.is_initialized() and not torch.cuda.is_initialized()\n"
        "assert threading.active_count() == 1, threading.enumerate()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


def public_definitions(tree: ast.Module):
    """(name, node) of a module's public functions and classes, and of forward in its classes."""
    for node in tree.body:
        if isinstance(
            node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        ) and not node.name.startswith("_"):
            yield node.name, node
            for inner in node.body if isinstance(node, ast.ClassDef) else ():
                if isinstance(inner, ast.FunctionDef) and inner.name == "forward":
                    yield f"{node.name}.forward", inner


@pytest.mark.parametrize("name", MODULES)
def test_everything_public_says_what_it_is(name):
    assert ast.get_docstring(TREES[name]), f"{name}.py has no docstring"
    without = [n for n, node in public_definitions(TREES[name]) if not ast.get_docstring(node)]
    assert without == []


def calls(tree: ast.AST, dotted: str):
    """Calls of a dotted name."""
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == dotted
    ]


@pytest.mark.parametrize("name", MODULES)
def test_loading_never_runs_what_a_file_says(name):
    for call in calls(TREES[name], "torch.load"):
        given = {k.arg: ast.unparse(k.value) for k in call.keywords}
        assert given.get("weights_only") == "True", f"{name}.py line {call.lineno}"
    for dangerous in ("eval", "exec", "pickle.load", "pickle.loads", "os.system", "torch.hub.load"):
        assert calls(TREES[name], dangerous) == [], f"{name}.py calls {dangerous}"
    assert all(
        ast.unparse(k.value) != "True"
        for c in calls(TREES[name], "np.load")
        for k in c.keywords
        if k.arg == "allow_pickle"
    )


def test_some_loading_is_checked():
    assert sum(len(calls(tree, "torch.load")) for tree in TREES.values()) >= 2


@pytest.mark.parametrize("name", MODULES)
def test_nothing_is_left_for_later(name):
    source = (ROOT / f"{name}.py").read_text(encoding="utf-8")
    assert re.findall(r"\b(TODO|FIXME|XXX|NotImplementedError|NotImplemented)\b", source) == []


@pytest.mark.parametrize("name", MODULES)
def test_no_exception_is_swallowed_unseen(name):
    bare = [
        n.lineno
        for n in ast.walk(TREES[name])
        if isinstance(n, ast.ExceptHandler) and n.type is None
    ]
    assert bare == [], f"{name}.py has a bare except at lines {bare}"


@pytest.mark.parametrize("name", MODULES)
def test_code_that_runs_stands_behind_the_guard(name):
    """At the top of a module: imports, definitions, constants, a docstring, and the guard."""
    allowed = (
        ast.Import,
        ast.ImportFrom,
        ast.FunctionDef,
        ast.ClassDef,
        ast.Assign,
        ast.AnnAssign,
        ast.AugAssign,
    )
    for node in TREES[name].body:
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        guard = isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"
        assert (
            isinstance(node, allowed) or docstring or guard
        ), f"{name}.py line {node.lineno} runs on import"
