"""What may import what, and what an import costs."""

from __future__ import annotations

import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CORE = sorted((ROOT / "functional_sq").rglob("*.py"))
BRIDGE = sorted((ROOT / "bridge").rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Every module that a file imports, at the top or inside a function."""
    package = ".".join(path.relative_to(ROOT).parent.parts)
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(f"{package}.{node.module or ''}" if node.level else str(node.module))
    return found


def tops(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_imports_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "p").mkdir()
    path = tmp_path / "p" / "m.py"
    path.write_text("import a.b as c\nfrom d.e import f\nfrom . import g\ndef h():\n    if 1:\n        import i\n")
    assert tops(path) == {"a", "d", "p", "i"}


@pytest.mark.parametrize("path", CORE, ids=name_of)
def test_the_core_imports_torch_and_the_standard_library(path: Path) -> None:
    allowed = {"torch", "functional_sq", *sys.stdlib_module_names}
    if ROOT / "functional_sq" / "testing" in path.parents:
        allowed |= {"hypothesis"}
    if path == ROOT / "functional_sq" / "triton_kernel.py":
        allowed |= {"triton"}
    assert tops(path) <= allowed


@pytest.mark.parametrize("path", CORE, ids=name_of)
def test_the_core_has_no_module_and_no_global_state(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert {name for name in imports(path) if name.startswith("torch.nn")} <= {"torch.nn.functional"}
    words = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    words |= {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    assert not words & {"Module", "Parameter", "Buffer", "register_buffer"}
    assert not [node for node in ast.walk(tree) if isinstance(node, (ast.Global, ast.Nonlocal))]


@pytest.mark.parametrize("path", BRIDGE, ids=name_of)
def test_one_file_of_the_bridge_imports_torchao(path: Path) -> None:
    assert ("torchao" in tops(path)) <= (path == ROOT / "bridge" / "torchao.py")
    assert not tops(path) & {"numpy", "hypothesis", "ml_dtypes", "safetensors"}


@pytest.mark.parametrize("path", BRIDGE, ids=name_of)
def test_only_pictures_import_matplotlib_and_only_when_they_are_drawn(path: Path) -> None:
    """Type annotations, which are never evaluated, may name its Figure."""
    tree = ast.parse(path.read_text())
    never = [node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    drawn = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)) and "matplotlib" in ast.unparse(node):
            assert "pyplot" not in ast.unparse(node)
            inside = drawn if path == ROOT / "bridge" / "picture.py" else []
            assert any(node in ast.walk(outer) for outer in (*never, *inside)), f"{path}:{node.lineno}"


def test_importing_the_bridge_does_not_load_matplotlib() -> None:
    assert python("import sys, bridge; print('matplotlib' in sys.modules)").endswith("False")


def test_the_files_are_there() -> None:
    assert len(CORE) > 10
    assert ROOT / "functional_sq" / "observers" / "min_max.py" in CORE


def python(code: str) -> str:
    """Run `code` in a fresh interpreter at the root of the project; return what it printed."""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=dict(os.environ), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_importing_the_core_loads_nothing_else() -> None:
    code = """
import torch, sys
before = set(sys.modules)
import functional_sq
tops = {name.split(".")[0] for name in set(sys.modules) - before}
print(sorted(tops - set(sys.stdlib_module_names) - {"torch", "functional_sq"}))
"""
    assert python(code) == "[]"


def test_importing_the_core_is_quick() -> None:
    code = """
import torch, time
start = time.perf_counter()
import functional_sq
print(time.perf_counter() - start)
"""
    # Measured at 0.02 s; up to three attempts, for the machine may be busy.
    times: list[float] = []
    while len(times) < 3 and min(times, default=1.0) >= 0.3:
        times.append(float(python(code)))
    assert min(times) < 0.3, times


@pytest.mark.parametrize("path", [*CORE, *BRIDGE], ids=name_of)
def test_a_file_uses_what_others_name_in_all(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] in ("functional_sq", "bridge"):
            said = getattr(importlib.import_module(str(node.module)), "__all__", ())
            folder = ROOT / str(node.module).replace(".", "/")
            assert not [a.name for a in node.names if a.name not in said and not (folder / f"{a.name}.py").exists()]
