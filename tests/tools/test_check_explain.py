"""Mistakes in an optimizer of one's own: what `tritopt check` and the faces say of each, and where it stands."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import tritopt
from tritopt.kernels.language import HAS_TRITON
from tritopt.mxnet import registry
from tritopt.tools.check import Case, check_case

OWN = """
from typing import Any, NamedTuple

import torch
import tritopt
from tritopt.kernels.language import tl, triton


@triton.jit
def own_update(w, g, state, s):
    mean, slow = state
    mean = mean + s.rate * (g - mean)
    slow = slow + s.rate * (g - slow)
    return w - s.lr * (mean + slow), (mean, slow)


class Scalars(NamedTuple):
    lr: float
    rate: float


class Own(tritopt.Optimizer):
    phases = (tritopt.Apply(own_update),)
    state_names = ("mean", "slow")
    state_kinds = {"slow": "signed"}

    def scalars(self, lr, wd, count):
        return Scalars(lr, 0.1)

    def reference(self, w, g, state, s):
        mean, slow = state
        mean = mean + s.rate * (g - mean)
        slow = slow + s.rate * (g - slow)
        return w - s.lr * (mean + slow), (mean, slow)
"""
KERNEL, REFERENCE = OWN.index("@triton.jit"), OWN.index("def reference")


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A module of one's own, `own.py`, that leaves with the test."""
    monkeypatch.syspath_prepend(str(tmp_path))
    known = dict(registry.registered())
    yield tmp_path / "own.py"
    registry.registered().clear()
    registry.registered().update(known)
    sys.modules.pop("own", None)


def changed(old: str, new: str, start: int = 0) -> str:
    """OWN with one text, the first after `start`, replaced."""
    assert old in OWN[start:]
    return OWN[:start] + OWN[start:].replace(old, new, 1)


def load(path: Path, text: str) -> type[tritopt.Optimizer]:
    path.write_text(text)
    importlib.invalidate_caches()
    return importlib.import_module("own").Own  # type: ignore[no-any-return]


def reason(cls: type[tritopt.Optimizer], state_dtype: str | None = None) -> str:
    dtype, master = (torch.float32, None) if state_dtype is None else (torch.bfloat16, "split8")
    row = check_case(Case(cls, {}, dtype, dtype, master, state_dtype, "plain"))
    assert row.passed == (not row.reason)
    return row.reason


@pytest.mark.parametrize("state_dtype", [None, "int8"])
def test_without_a_mistake_it_passes(own: Path, state_dtype: str | None) -> None:
    cls = load(own, OWN)
    assert [cls().kind_of(name) for name in cls().state_names] == ["signed", "signed"]  # the first by its name
    if HAS_TRITON:
        assert reason(cls, state_dtype) == ""


MISTAKES = {
    "a scalar that is none, in the reference": (
        changed("s.rate", "s.rat", REFERENCE),
        r"AttributeError: 'Scalars' object has no attribute 'rat' \(own.py, line 32\)",
    ),
    "a state too few from the reference": (
        changed("(mean, slow)\n", "(mean,)\n", REFERENCE),
        r"ValueError: Own.reference must return the weight and a tuple of 2 states, .*\('mean', 'slow'\); got 1 states",
    ),
    "no tuple from the reference": (
        changed("(mean, slow)\n", "mean\n", REFERENCE),
        r"ValueError: Own.reference must return the weight and a tuple of 2 states, .*; got a Tensor",
    ),
    "a kind that is none": (
        changed('"signed"', '"sgned"'),
        r"ValueError: Own.state_kinds says 'sgned' of 'slow': give names in state_names, .*'signed', 'squares' or None",
    ),
    "a kind of a state that is none": (
        changed('{"slow"', '{"slwo"'),
        r"ValueError: Own.state_kinds says 'signed' of 'slwo': give names in state_names, \('mean', 'slow'\)",
    ),
}
IN_KERNEL = {
    "a scalar that is none, in the kernel": (
        changed("s.rate", "s.rat", KERNEL),
        r"AttributeError: 'Scalars' object has no attribute 'rat' \(own.py, line 12\)",
    ),
    "a state too few from the kernel": (
        changed("(mean, slow)\n", "(mean,)\n", KERNEL),
        r"AssertionError: an update must return the weight and a tuple of all states",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named(own: Path, mistake: str) -> None:
    text, expected = MISTAKES[mistake]
    said = reason(load(own, text), "int8" if "kind" in mistake else None)
    assert re.match(expected, said), said


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
@pytest.mark.parametrize("mistake", IN_KERNEL)
def test_mistakes_in_the_kernel_are_named_with_their_line(own: Path, mistake: str) -> None:
    text, expected = IN_KERNEL[mistake]
    said = reason(load(own, text))
    assert re.match(expected, said), said


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
def test_mistakes_are_shown_as_the_compiler_found_them(own: Path) -> None:
    own.write_text(IN_KERNEL["a state too few from the kernel"][0])
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tritopt", "check", "own:Own", "--quick", "--format", "fp32", "--compiled"]
    done = subprocess.run(
        [*command, "--json", "--jobs", "1"], cwd=own.parent, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    said = json.loads(done.stdout)["rows"][0]["reason"]
    assert "new = UPDATE_FN(w, g, state, s)" in said
    assert "an update must return the weight and a tuple of all states" in said
