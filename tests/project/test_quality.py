"""Quality of the source: ruff, mypy, and rules of this project that neither of them knows."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("command", [["ruff", "check"], ["ruff", "format", "--check"], ["mypy"]], ids=" ".join)
def test_clean(command: list[str]) -> None:
    pytest.importorskip(command[0])
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


TYPES = ("dict", "tuple")
FACTORIES = [
    "arange", "as_tensor", "asarray", "empty", "empty_strided", "eye", "full", "linspace", "logspace",
    "ones", "rand", "randint", "randn", "randperm", "scalar_tensor", "tensor", "zeros",
]  # fmt: skip


def calls(*folders: str) -> Iterator[tuple[Path, ast.Call]]:
    """Every call in the Python files of these folders."""
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield from ((path, node) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))


def place(path: Path, call: ast.Call) -> str:
    return f"{path.relative_to(ROOT)}:{call.lineno}: {ast.unparse(call)[:80]}"


def test_every_tensor_that_is_made_says_its_dtype_and_device() -> None:
    """`torch.set_default_dtype` and `torch.set_default_device` are the user's, for tensors of the user's own."""
    silent = []
    for path, call in calls("tritopt", "kernels"):
        match call.func:
            case ast.Attribute(value=ast.Name(id="torch"), attr=name) if name in FACTORIES:
                if not {"dtype", "device"} <= {keyword.arg for keyword in call.keywords}:
                    silent.append(place(path, call))
    assert silent == []


def test_every_launch_forbids_contraction() -> None:
    """Triton contracts to fma otherwise, which changes bits: always in 3.6, with a warning in 3.9."""
    launches = []
    for path, call in calls("tritopt", "tests", "benchmarks"):
        match call.func:
            case ast.Subscript(value=ast.Name(id=name), slice=ast.Tuple() | ast.Name(id="grid")) if name not in TYPES:
                # What the package spreads into several launches, it makes in the same file.
                spreads = path.is_relative_to(ROOT / "tritopt") and any(word.arg is None for word in call.keywords)
                says = path.read_text() if spreads else ast.unparse(call)
                launches.append((place(path, call), "enable_fp_fusion" in says))
            case ast.Name(id="BoundKernel"):
                launches.append((place(path, call), "enable_fp_fusion" in path.read_text()))
    assert len(launches) >= 12
    assert [where for where, is_exact in launches if not is_exact] == []


DEPENDENT = [
    "Of", "As", "Likewise", "Where", "What", "How", "Also", "Those", "Its", "By", "For", "From", "In", "On", "With",
    "Without", "Which", "Why", "That", "They", "Or", "And", "But", "Nor", "Whichever", "Who", "Whoever",
    "Whose", "When", "If", "Then", "So", "Within", "At", "To", "Under", "Before", "After", "Beside",
]  # fmt: skip
"""Words that a docstring which stands alone does not begin with: prepositions, pronouns, conjunctions."""


def nodes() -> Iterator[tuple[Path, ast.AST]]:
    """Every node of the syntax trees of all Python files but the benchmarks'."""
    folders = ("tritopt", "kernels", "tests", "examples", "docs")
    paths = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    for path in (*paths, ROOT / "setup.py"):
        yield from ((path, node) for node in ast.walk(ast.parse(path.read_text())))


def docstrings() -> Iterator[tuple[Path, ast.Constant]]:
    """Every docstring of modules, classes and functions, and every string below a field that describes it."""
    for path, node in nodes():
        match node:
            case ast.Expr(value=ast.Constant(value=str()) as constant):
                yield path, constant


def test_docstrings_stand_alone() -> None:
    """Each begins with a noun or a verb of its own; those of the package say more than a name can."""
    wrong, n = [], 0
    for path, constant in docstrings():
        words = str(constant.value).split()
        is_short = len(words) <= 3 and path.relative_to(ROOT).parts[0] in ("tritopt", "kernels")
        if not words or words[0].rstrip(".,:;") in DEPENDENT or is_short:
            wrong.append(f"{path.relative_to(ROOT)}:{constant.lineno}: {' '.join(words[:8])}")
        n += 1
    assert n > 2500
    assert wrong == []


def test_names_say_what_they_hold() -> None:
    """`found` was the name of everything that had been looked for: an address, a list of cases, a layout."""
    vague = []
    for path, node in nodes():
        match node:
            case ast.Name(id="found") | ast.arg(arg="found") | ast.Attribute(attr="found"):
                vague.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert vague == []
