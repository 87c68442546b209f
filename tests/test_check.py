"""The checker passes what is right, fails what is wrong, and says why."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import tritopt
from tests import mutations
from tritopt import check, fused, registry
from tritopt.__main__ import app
from tritopt.check import Case, Row, check_case, load_optimizer, run_checks
from tritopt.kernels.language import HAS_TRITON, tl, triton  # noqa: F401

needs_kernels = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
ROOT = Path(__file__).resolve().parent.parent

BROKEN = """
import tritopt
from tritopt.kernels.language import tl, triton

@triton.jit
def ascending_update(w, g, state, s):
    return w + s.lr * g, state

class Ascending(tritopt.Test):
    phases = (tritopt.Apply(ascending_update, reads_states=False, writes_states=False),)
"""


@pytest.fixture(autouse=True)
def _leave_no_trace(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Modules, paths and optimizers that a test brings leave with it."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    known = dict(registry.OPTIMIZERS)
    yield
    registry.OPTIMIZERS.clear()
    registry.OPTIMIZERS.update(known)
    for name in {"broken", "half"} & set(sys.modules):
        del sys.modules[name]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def case(cls: type[tritopt.Optimizer], dtype: torch.dtype = torch.float32, master: str | None = None) -> Case:
    return Case(cls, {}, dtype, dtype, master, "plain")


@triton.jit
def drifting_update(w, g, state, s):  # type: ignore[no-untyped-def]
    return w - s.lr * g * 1.00001, state


class Drifting(tritopt.Test):
    """A hundred-thousandth of a step too fast."""

    phases = (tritopt.Apply(drifting_update, reads_states=False, writes_states=False),)


@triton.jit
def undefined_update(w, g, state, s):  # type: ignore[no-untyped-def]
    return w * float("nan"), state


class Undefined(tritopt.Test):
    """NaN everywhere."""

    phases = (tritopt.Apply(undefined_update, reads_states=False, writes_states=False),)


class Ported(tritopt.Optimizer):
    """As MXNet has them: overrides `create_state` and `step`, no kernel."""

    def create_state(self, index: Any, weight: torch.Tensor) -> Any:
        return torch.zeros_like(weight)

    def step(self, indices: Any, weights: Any, grads: Any, states: Any) -> None:
        for index, weight, grad, state in zip(indices, weights, grads, states, strict=True):
            self._update_count(index)
            grad = grad * self.rescale_grad + self._get_wd(index) * weight
            state[:] = 0.9 * state - self._get_lr(index) * grad
            weight[:] = weight + state


class Greedy(Ported):
    """Scales the caller's gradients."""

    def step(self, indices: Any, weights: Any, grads: Any, states: Any) -> None:
        for grad in grads:
            grad *= 0.5
        super().step(indices, weights, grads, states)


class Counting(Ported):
    """Its state is a number."""

    def create_state(self, index: Any, weight: torch.Tensor) -> Any:
        return 7


class Coarse(tritopt.Test):
    """Its reference computes in bf16."""

    def reference(self, w: torch.Tensor, g: torch.Tensor, state: Any, s: Any) -> Any:
        return (w - s.lr * g.to(torch.bfloat16)) if w.dtype == torch.float32 else w - s.lr * g, state


@pytest.mark.parametrize("cls", [tritopt.Adam, tritopt.LAMB])
def test_registered_optimizers_pass(cls: type[tritopt.Optimizer]) -> None:
    rows = list(run_checks([cls], quick=True))
    assert len(rows) == len(check.cases([cls], quick=True)) == 22
    assert not [row for row in rows if not row.passed]
    if HAS_TRITON:
        assert all(row.fused_vs_reference is not None for row in rows)


def test_full_check_covers_every_combination() -> None:
    found = check.cases([tritopt.SGD])
    assert len({(c.weight_dtype, c.grad_dtype, c.master, c.option, str(c.variant)) for c in found}) == len(found) == 44
    assert set(check.cases([tritopt.SGD], quick=True)[0].arguments) == {"learning_rate"}


class PortedSign(Ported):
    """Jumps where its momentum is 0, and computes in the weights' dtype."""

    def step(self, indices: Any, weights: Any, grads: Any, states: Any) -> None:
        for index, weight, grad, state in zip(indices, weights, grads, states, strict=True):
            self._update_count(index)
            state[:] = 0.9 * state + 0.1 * grad
            weight[:] = weight - self._get_lr(index) * torch.sign(state)


class LateSign(PortedSign):
    """In fp32 and below it takes the sign of the momentum before the step."""

    def step(self, indices: Any, weights: Any, grads: Any, states: Any) -> None:
        before = [state.clone() for state in states]
        old = [weight.clone() for weight in weights]
        super().step(indices, weights, grads, states)
        if weights[0].dtype != torch.float64:
            for index, weight, start, state in zip(indices, weights, old, before, strict=True):
                weight[:] = start - self._get_lr(index) * torch.sign(state)


@pytest.fixture
def sizes_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """No kernel, but the weights that a check on a GPU has."""
    monkeypatch.setattr(fused, "HAS_TRITON", False)
    monkeypatch.setattr(check, "INTERPRETED", False)
    monkeypatch.setattr(check, "device", lambda: torch.device("cpu"))


@pytest.mark.usefixtures("sizes_of_a_gpu")
def test_sums_that_cancel_before_their_sign_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Among thousands of elements some cancel to within rounding; a check that took them as they come would fail."""
    jumping = [case(cls, torch.bfloat16) for cls in (tritopt.Lion, tritopt.Signum, PortedSign)]
    assert not [row for row in map(check_case, jumping) if not row.passed]
    wrong = check_case(case(LateSign, torch.bfloat16))
    assert "reference and truth differ by" in wrong.reason
    monkeypatch.setattr(check, "JUMP", float("inf"))
    assert all("reference and truth differ by" in check_case(jump).reason for jump in jumping)


@pytest.mark.usefixtures("sizes_of_a_gpu")
@pytest.mark.parametrize(
    ("cls", "jumps"), [(tritopt.Signum, range(1, 30)), (tritopt.Adam, range(1)), (tritopt.Ftrl, range(1))]
)
def test_gradients_stay_as_drawn_but_for_a_few(
    cls: type[tritopt.Optimizer], jumps: range, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = check._jumps
    counted: list[int] = []

    def counting(*args: Any) -> list[torch.Tensor]:
        masks = found(*args)
        counted.extend(int(mask.sum()) for mask in masks)
        return masks

    monkeypatch.setattr(check, "_jumps", counting)
    assert check_case(case(cls, torch.bfloat16)).passed
    assert len(counted) == 3 * 5, "3 steps of 5 weights"
    assert sum(counted) in jumps


@needs_kernels
def test_a_small_error_in_the_kernel_fails() -> None:
    row = check_case(case(Drifting))
    assert not row.passed
    assert "fused and reference differ by" in row.reason


@needs_kernels
def test_nan_fails_and_can_be_written_as_json() -> None:
    row = check_case(case(Undefined))
    assert not row.passed
    assert row.fused_vs_reference == sys.float_info.max


def test_an_inexact_reference_fails() -> None:
    row = check_case(case(Coarse))
    assert not row.passed
    assert row.reference_vs_truth is not None
    assert row.reference_vs_truth > 100


def test_what_raises_is_a_failed_row() -> None:
    class Broken(tritopt.Test):
        def scalars(self, lr: float, wd: float, count: int) -> Any:
            raise ZeroDivisionError("no scalars today")

    row = check_case(case(Broken))
    assert (row.passed, row.reason) == (False, "ZeroDivisionError: no scalars today")


@pytest.mark.parametrize(
    ("dtype", "master"),
    [(torch.float32, None), (torch.bfloat16, "fp32"), (torch.bfloat16, None), (torch.float64, None)],
)
def test_ported_optimizer_without_kernel_is_checked_against_the_truth(dtype: torch.dtype, master: str | None) -> None:
    row = check_case(case(Ported, dtype, master))
    assert row.passed, row
    assert (row.reason, row.fused_vs_reference) == ("no kernel: reference only", None)
    assert row.reference_vs_truth is not None


@needs_kernels
def test_command_takes_an_optimizer_without_kernel(here: Path) -> None:
    (here / "broken.py").write_text("from tests.test_check import Ported")
    result = CliRunner().invoke(app, ["check", "broken:Ported", "--quick"])
    assert result.exit_code == 0
    assert result.stdout.endswith("ported: no kernel: reference only\nall 7 checks passed\n")


def test_what_cannot_be_compared_says_so() -> None:
    row = check_case(case(Counting))
    assert not row.passed
    assert "a state must be None, a tensor or a tuple of such, got 7" in row.reason


def test_writing_to_gradients_fails() -> None:
    row = check_case(case(Greedy))
    assert not row.passed
    assert "wrote to a gradient" in row.reason


def test_without_triton_the_reference_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "HAS_TRITON", False)
    row = check_case(case(tritopt.Adam))
    assert row.passed
    assert "pip install" in row.reason
    assert (row.fused_vs_reference, row.fused_vs_truth) == (None, None)
    result = CliRunner().invoke(app, ["check", "--quick", "--optimizer", "test"])
    assert result.exit_code == 0
    assert result.stdout.startswith("Reference against truth only: the fused path needs Triton")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("ported", "must name a module and a class in it"),
        (":Ported", "must name a module and a class in it"),
        ("nowhere:Ported", "cannot import module 'nowhere'"),
        ("half:Ported", "cannot import module 'half': SyntaxError"),
        ("broken:Ascendin", "has no 'Ascendin'; did you mean 'Ascending'? its optimizers: Ascending"),
        ("broken:triton", "not a subclass of tritopt.Optimizer"),
    ],
)
def test_bad_targets(target: str, message: str, here: Path) -> None:
    (here / "broken.py").write_text(BROKEN)
    (here / "half.py").write_text("class Ported(")
    with pytest.raises((TypeError, ValueError)) as caught:
        load_optimizer(target)
    assert message in str(caught.value)
    assert CliRunner().invoke(app, ["check", target]).exit_code == 2


@needs_kernels
def test_command_fails_for_a_broken_kernel(here: Path) -> None:
    (here / "broken.py").write_text(BROKEN)
    result = CliRunner().invoke(app, ["check", "broken:Ascending", "--quick"])
    assert result.exit_code == 1
    assert "2 FAILED" in result.stdout
    assert "tritopt.create('ascending', learning_rate=0.1), weights float32, gradients float32:" in result.stdout
    assert "11 of 11 checks failed" in result.stdout
    assert tritopt.create("ascending").learning_rate == 0.01


def test_json() -> None:
    result = CliRunner().invoke(app, ["check", "--quick", "--optimizer", "test", "--optimizer", "SGD", "--json"])
    assert result.exit_code == 0
    answer = json.loads(result.stdout, parse_constant=pytest.fail)
    assert (answer["passed"], answer["quick"], answer["torch"]) == (True, True, torch.__version__)
    assert {row["optimizer"] for row in answer["rows"]} == {"test", "sgd"}
    assert set(answer["rows"][0]) == {field.name for field in fields(Row)}


def test_unknown_names_are_usage_errors() -> None:
    result = CliRunner().invoke(app, ["check", "--optimizer", "lambb"], env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert "did you mean 'lamb'" in result.output
    assert CliRunner().invoke(app, ["chekc"]).exit_code == 2


def test_list_and_version() -> None:
    result = CliRunner().invoke(app, ["list", "--markdown"])
    assert result.exit_code == 0
    assert "lamb_moments, lamb_update" in result.stdout
    listed = json.loads(CliRunner().invoke(app, ["list", "--json"]).stdout)
    assert {"optimizer": "sgd", "momentum": 0.9} in [{"optimizer": o["optimizer"], **o["arguments"]} for o in listed]
    assert CliRunner().invoke(app, ["list", "--markdown"]).stdout.splitlines()[1].startswith("| --- |")
    assert CliRunner().invoke(app, ["--version"]).stdout == f"tritopt {tritopt.__version__}\n"


def test_program_runs_the_kernels_with_or_without_gpu(here: Path) -> None:
    """The interpreter has to be chosen before the kernels are imported, so this needs a process of its own."""
    (here / "broken.py").write_text(BROKEN)
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "error", "-m", "tritopt", "check", "broken:Ascending", "--quick", "--json"]
    done = subprocess.run(
        command, cwd=here, env={**env, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    answer = json.loads(done.stdout)
    assert answer["interpreter"] == (HAS_TRITON and not torch.cuda.is_available())
    assert done.returncode == (1 if HAS_TRITON else 0), done.stderr
    assert all((row["fused_vs_reference"] is not None) == HAS_TRITON for row in answer["rows"])


def test_mutations_fit_the_kernels() -> None:
    """What `python -m tests.mutations` breaks exists, once; running it takes minutes."""
    for mutation in mutations.collect():
        text = (ROOT / "kernels" / mutation.file).read_text()
        assert text.count(mutation.old) == 1, mutation
    counted = Counter(mutation.optimizer for mutation in mutations.collect())
    shipped = [name for name, cls in registry.OPTIMIZERS.items() if cls.__module__.startswith("tritopt.")]
    assert not {name: counted[name] for name in shipped if counted[name] < 5}
