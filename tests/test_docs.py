"""Every example in a docstring and every Python block of the README runs as it stands."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
import sys
import types
from pathlib import Path

import pytest

import bridge
import functional_sq
import functional_sq.testing

README = Path(__file__).parent.parent / "README.md"


def modules(package: types.ModuleType) -> list[str]:
    return [package.__name__, *(m.name for m in pkgutil.walk_packages(package.__path__, f"{package.__name__}."))]


@pytest.mark.parametrize("name", [*modules(functional_sq), *modules(bridge)])
def test_doctests(name: str) -> None:
    if name == "functional_sq.triton_kernel":
        pytest.importorskip("triton", reason="its kernels are Triton's")
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0, f"{result.failed} of {result.attempted} examples of {name} failed, see the output"


def test_every_public_name_has_an_example_or_names_one() -> None:
    packages = (functional_sq, functional_sq.testing, bridge)
    values = {name: getattr(package, name) for package in packages for name in package.__all__}
    ours = ("functional_sq.", "bridge.")
    texts = {
        name: value.__doc__ or "" for name, value in values.items() if getattr(value, "__module__", "").startswith(ours)
    }
    assert len(texts) > 100
    for name, text in texts.items():
        seen = re.findall(r"`(\w+)`", text.partition("Example: see ")[2].partition("\n")[0])
        assert ">>> " in text or (seen and all(">>> " in texts[each] for each in seen)), name


def blocks(text: str) -> list[tuple[int, str]]:
    """Return each Python block of a Markdown text with the number of its first line."""
    found = re.finditer(r"^```python\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    return [(text.count("\n", 0, m.start(1)) + 1, m.group(1)) for m in found]


def run(text: str, filename: str) -> None:
    """Execute the Python blocks of a text in one module, in order; an error names its line in the file."""
    # A real module, as a script is: what a block defines can be pickled.
    module = types.ModuleType("readme")
    sys.modules["readme"] = module
    for line, code in blocks(text):
        try:
            # Blank lines before it give the block its place in the file, also in tracebacks.
            exec(compile("\n" * (line - 1) + code, filename, "exec"), vars(module))
        except Exception as e:
            raise AssertionError(f"the block at {filename}:{line} fails: {type(e).__name__}: {e}") from e


def test_run_names_the_block_that_fails() -> None:
    text = "a\n```python\nx = 1\n```\n```bash\nno\n```\n```python\nassert x == 2, x\n```\n"
    assert blocks(text) == [(3, "x = 1\n"), (9, "assert x == 2, x\n")]
    run(text.replace("2", "1"), "R.md")
    assert sys.modules["readme"].x == 1
    with pytest.raises(AssertionError, match=r"the block at R\.md:9 fails: AssertionError: 1"):
        run(text, "R.md")


def test_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # what an example writes does not land in the tree
    run(README.read_text(), "README.md")
