"""The checker passes what is right, fails what is wrong, and says why."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import tritopt
from tests import mutations
from tritopt.commands.app import app
from tritopt.engine import plan
from tritopt.engine.tuning.config import Config
from tritopt.kernels.formats.int8 import store_int8
from tritopt.kernels.formats.scales import BLOCK
from tritopt.kernels.formats.states import SIGNED, STATE_FORMATS
from tritopt.kernels.language import HAS_TRITON, INTERPRETED, tl, triton  # noqa: F401
from tritopt.mxnet import registry
from tritopt.tools import resources
from tritopt.tools.check import (
    Case,
    CheckResult,
    check_case,
    compare,
    contender,
    find_cases,
    load_optimizer,
    processes,
    run,
    run_checks,
)
from tritopt.tools.check.cases import CHECKED
from tritopt.tools.check.contender import Contender
from tritopt.tools.check.worker import Selection

needs_kernels = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
needs_interpreter = pytest.mark.skipif(not INTERPRETED, reason="kernels are compiled here")
ROOT = Path(__file__).resolve().parents[2]

BROKEN = """
import tritopt
from tritopt.kernels.language import tl, triton

@triton.jit
def ascending_update(w, g, state, s):
    return w + s.lr * g, state

class Ascending(tritopt.Test):
    phases = (tritopt.Apply(ascending_update, reads_states=False, writes_states=False),)

class Face(tritopt.optim.Optimizer):
    rule = Ascending
"""


@pytest.fixture(autouse=True)
def _leave_no_trace(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Modules, paths and optimizers that a test brings leave with it."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    known = dict(registry.registered())
    yield
    registry.registered().clear()
    registry.registered().update(known)
    for name in {"broken", "half"} & set(sys.modules):
        del sys.modules[name]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def case(
    cls: type[tritopt.Optimizer],
    dtype: torch.dtype = torch.float32,
    master: str | None = None,
    state_dtype: str | None = None,
    **variant: Any,
) -> Case:
    return Case(cls, variant, dtype, dtype, master, state_dtype, "plain")


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
    """Optimizer whose weights are NaN everywhere."""

    phases = (tritopt.Apply(undefined_update, reads_states=False, writes_states=False),)


class Ported(tritopt.Optimizer):
    """Optimizer that is written as MXNet's are: it overrides `create_state` and `step`, and has no kernel."""

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
    """Optimizer whose state is a number."""

    def create_state(self, index: Any, weight: torch.Tensor) -> Any:
        return 7


class Coarse(tritopt.Test):
    """Optimizer whose reference computes in bf16."""

    def reference(self, w: torch.Tensor, g: torch.Tensor, state: Any, s: Any) -> Any:
        return (w - s.lr * g.to(torch.bfloat16)) if w.dtype == torch.float32 else w - s.lr * g, state


@pytest.mark.parametrize("cls", [tritopt.Adam, tritopt.LAMB])
def test_registered_optimizers_pass(cls: type[tritopt.Optimizer]) -> None:
    rows = list(run_checks([cls], quick=True))
    assert len(rows) == len(find_cases([cls], quick=True)) == 34
    assert not [row for row in rows if not row.passed]
    if HAS_TRITON:
        assert all(row.fused_vs_reference is not None for row in rows)


def test_full_check_covers_every_combination() -> None:
    cases = find_cases([tritopt.SGD])
    assert len(set(map(str, cases))) == len(cases) == 50
    assert set(find_cases([tritopt.SGD], quick=True)[0].arguments) == {"learning_rate"}
    assert all(c.variant for c in cases if c.state_dtype), "without momentum there is no state"
    assert {c.state_dtype for c in cases} == {None, *STATE_FORMATS}
    assert {c.option for c in cases if c.state_dtype} == {"wd, clip, rescale"}


@pytest.mark.parametrize("cls", [tritopt.Ftrl, tritopt.GroupAdaGrad, tritopt.Test, Ported])
def test_no_state_takes_another_format(cls: type[tritopt.Optimizer]) -> None:
    assert not [case for case in find_cases([cls]) if case.state_dtype]


class PortedSign(Ported):
    """Jumps where its momentum is 0, and computes in the weights' dtype."""

    def step(self, indices: Any, weights: Any, grads: Any, states: Any) -> None:
        for index, weight, grad, state in zip(indices, weights, grads, states, strict=True):
            self._update_count(index)
            state[:] = 0.9 * state + 0.1 * grad
            weight[:] = weight - self._get_lr(index) * torch.sign(state)


class LateSign(PortedSign):
    """Optimizer that takes, in fp32 and below, the sign of the momentum before the step."""

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
    monkeypatch.setattr(plan, "HAS_TRITON", False)
    monkeypatch.setattr(run, "INTERPRETED", False)
    monkeypatch.setattr(run, "device", lambda: torch.device("cpu"))


@pytest.mark.usefixtures("sizes_of_a_gpu")
def test_a_compensation_just_below_half_an_ulp_is_right() -> None:
    """Rounded to nearest it would be that half, which is another weight's where this one is odd."""
    row = check_case(case(tritopt.SGD, torch.bfloat16, "kahan"))
    assert row.passed, row


@pytest.mark.usefixtures("sizes_of_a_gpu")
def test_sums_that_cancel_before_their_sign_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Among thousands of elements some cancel to within rounding; a check that took them as they come would fail."""
    jumping = [case(cls, torch.bfloat16) for cls in (tritopt.Lion, tritopt.Signum, PortedSign)]
    assert not [row for row in map(check_case, jumping) if not row.passed]
    wrong = check_case(case(LateSign, torch.bfloat16))
    assert "reference and truth differ by" in wrong.reason
    monkeypatch.setattr(run, "JUMP", float("inf"))
    assert all("reference and truth differ by" in check_case(jump).reason for jump in jumping)


@pytest.mark.usefixtures("sizes_of_a_gpu")
@pytest.mark.parametrize(
    ("cls", "jumps"), [(tritopt.Signum, range(1, 30)), (tritopt.Adam, range(1)), (tritopt.Ftrl, range(1))]
)
def test_gradients_stay_as_drawn_but_for_a_few(
    cls: type[tritopt.Optimizer], jumps: range, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = run._jumps
    counted: list[int] = []

    def counting(*args: Any) -> list[torch.Tensor]:
        masks = original(*args)
        counted.extend(int(mask.sum()) for mask in masks)
        return masks

    monkeypatch.setattr(run, "_jumps", counting)
    assert check_case(case(cls, torch.bfloat16)).passed
    assert len(counted) == 3 * 5, "3 steps of 5 weights"
    assert sum(counted) in jumps


@triton.jit
def store_another_scale(planes, offsets, mask, value, start, noise):  # type: ignore[no-untyped-def]
    store_int8(planes, offsets, mask, value * 2.0, start, noise)


@triton.jit
def store_without_shift(planes, offsets, mask, value, start, noise):  # type: ignore[no-untyped-def]
    store_int8(planes, offsets, mask, value, start, (noise[0], noise[1], noise[2], noise[3], noise[4], 0))


class Fixed:
    """Stand-in for random bits: those that round to nearest, or always up."""

    def __init__(self, bits: int) -> None:
        self.bits = bits

    def bits16(self, plane: torch.Tensor) -> torch.Tensor:
        return torch.full_like(plane, self.bits, dtype=torch.int64)


INT8 = STATE_FORMATS["int8"][SIGNED]


def rounds_to_nearest(planes: Any, value: torch.Tensor, noise: Any) -> None:
    INT8.encode(planes, value, Fixed(0x8000))


def rounds_up(planes: Any, value: torch.Tensor, noise: Any) -> None:
    INT8.encode(planes, value, Fixed(0))


def has_no_shift(planes: Any, value: torch.Tensor, noise: Any) -> None:
    INT8.encode(planes, value, noise._replace(shift=0))


def has_another_scale(planes: Any, value: torch.Tensor, noise: Any) -> None:
    INT8.encode(planes, value, noise)
    planes[1].mul_(2)


def is_one_up(planes: Any, value: torch.Tensor, noise: Any) -> None:
    INT8.encode(planes, value, noise)
    planes[0].copy_((planes[0].int() + 1).clamp(max=127))


def loses_the_sign(planes: Any, value: torch.Tensor, noise: Any) -> None:
    INT8.encode(planes, value.abs(), noise)


@needs_kernels
@pytest.mark.parametrize(
    "wrong",
    [
        {"store": store_another_scale},
        {"store": store_without_shift},
        {"encode": rounds_to_nearest},
        {"encode": has_no_shift},
    ],
    ids=["kernel stores another scale", "kernel has no shift", "twin rounds to nearest", "twin has no shift"],
)
def test_a_wrong_half_of_a_format_fails(wrong: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    right = case(tritopt.SGD, state_dtype="int8", momentum=0.9)
    assert check_case(right).passed
    monkeypatch.setitem(STATE_FORMATS["int8"], SIGNED, INT8._replace(**wrong))
    row = check_case(right)
    assert "state 0 of weight" in row.reason
    assert "fused and reference differ by" in row.reason


@pytest.mark.usefixtures("sizes_of_a_gpu")
@pytest.mark.parametrize("wrong", [has_another_scale, is_one_up, loses_the_sign])
def test_a_wrong_format_is_far_from_the_truth(wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = case(tritopt.SGD, state_dtype="int8", momentum=0.9)
    assert check_case(right).passed
    monkeypatch.setitem(STATE_FORMATS["int8"], SIGNED, INT8._replace(encode=wrong))
    assert "reference and truth differ by" in check_case(right).reason


@needs_kernels
def test_states_that_sums_round_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """LANS makes another weight of a moment that was rounded apart, and rightly so."""
    lans, sgd = case(tritopt.LANS, state_dtype="int8"), case(tritopt.SGD, state_dtype="int8", momentum=0.9)
    monkeypatch.setitem(STATE_FORMATS["int8"], SIGNED, INT8._replace(encode=rounds_up))
    row = check_case(lans)
    assert row.passed, row
    assert row.states is not None
    assert row.states >= 1
    assert not check_case(sgd).passed
    monkeypatch.setattr(compare, "_differ", lambda name, ours, expected: torch.zeros_like(ours[name], dtype=torch.bool))
    reason = check_case(lans).reason
    assert reason.startswith("step 0, weight")
    assert "fused and reference differ by" in reason


def test_weights_that_states_are_reread_for_are_not_compared_with_the_truth() -> None:
    row = check_case(case(tritopt.LAMB, state_dtype="fp8"))
    assert row.passed
    assert row.reason.endswith("weights not compared with the truth: they are computed from states as these are stored")
    assert (row.fused_vs_truth, row.reference_vs_truth) == (None, None)
    assert row.states is not None
    assert 0 < row.states <= 1


OF_STATES = [(name, kind) for name, kinds in STATE_FORMATS.items() for kind in kinds]


@pytest.mark.parametrize(("name", "kind"), OF_STATES)
def test_neighbours(name: str, kind: str) -> None:
    """Neighbours of every number that a format has, at scales 1 and 4 in turn."""
    fmt = STATE_FORMATS[name][kind]
    n = 256 ** fmt.dtypes[0].itemsize
    codes = torch.arange(n, device="cpu").to(torch.int8 if n == 256 else torch.int16).view(fmt.dtypes[0])
    scale = torch.tensor([1.0, 4.0], device="cpu").repeat(n // 128) if fmt.block else torch.ones(1, device="cpu")
    planes = (codes, scale.to(fmt.dtypes[1])) if fmt.block else (codes,)
    numbers = fmt.decode(planes, torch.float32)
    finite = numbers.isfinite()
    low, high = (contender._neighbour(fmt, planes, places)[finite] for places in (-1, 1))
    spread = scale.repeat_interleave(n // len(scale))[finite]
    numbers = numbers[finite] / spread
    known = numbers.unique().tolist()
    at = {number: i for i, number in enumerate(known)}
    places = [at[number] for number in numbers.tolist()]
    assert (low / spread).tolist() == [known[max(i - 1, 0)] for i in places]
    assert (high / spread).tolist() == [known[min(i + 1, len(known) - 1)] for i in places]
    if name == "int8":
        given = [-2, -1, 0, 1, 126] if kind == SIGNED else [254, 255, 0, 1, 126]
        higher = [-1, 0, 1, 2, 127] if kind == SIGNED else [255, 255, 1, 2, 127]
        before, after = (torch.tensor(codes_of, dtype=fmt.dtypes[0], device="cpu") for codes_of in (given, higher))
        neighbour = contender._neighbour(fmt, (before, planes[-1][:1]), 1)
        assert torch.equal(neighbour, fmt.decode((after, planes[-1][:1]), torch.float32))


def test_neighbours_lie_in_memory_as_the_state_does() -> None:
    opt = tritopt.SGD(momentum=0.9, state_dtype="int8")
    weight = torch.zeros(6, 11, device="cpu").t()
    run = Contender(opt, [weight], None)
    codes, scales = run.states[0]
    codes.copy_(torch.arange(66, device="cpu").view(11, 6) - 33)
    scales.copy_(torch.tensor([1.0, 1024.0], device="cpu"))
    name = "state 0 of weight 0"
    number, (low, high) = run.tensors()[name], run.neighbours()[name]
    assert number.stride() == low.stride() == high.stride() == weight.stride()
    scale = torch.ones(11, 6, device="cpu")
    scale[9:, 5] = 1024.0
    for neighbour, step in ((low, -1), (number, 0), (high, 1)):
        code = codes.float() + step
        assert torch.equal(neighbour, code**3 * code.abs() * scale)


@pytest.mark.parametrize(("config", "block"), [(run.SMALL, 0), (run.SMALL_OF_STATES, BLOCK)])
def test_weights_of_a_check(config: Config, block: int) -> None:
    """Several chunks, one of several blocks, and a tail; unaligned; transposed, with more than a block of states."""
    assert not block or not (config.block_size % block or config.chunk_size % block)
    state_dtype = "int8" if block else None
    weights = run._weights(case(tritopt.SGD, state_dtype=state_dtype), torch.Generator("cpu").manual_seed(0), config)
    _, _, long, unaligned, transposed = weights
    assert long.numel() > config.chunk_size >= 2 * config.block_size
    assert config.block_size < long.numel() % config.chunk_size < 2 * config.block_size
    assert unaligned.data_ptr() % 16
    assert not transposed.is_contiguous()
    assert transposed.numel() > block


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
    assert not row.passed
    assert re.fullmatch(r"ZeroDivisionError: no scalars today \(test_check.py, line \d+\)", row.reason)


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
    (here / "broken.py").write_text("from tests.tools.test_check import Ported")
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
    monkeypatch.setattr(plan, "HAS_TRITON", False)
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
        ("broken:Ascendin", "has no 'Ascendin'; did you mean 'Ascending'? its optimizers: Ascending, Face"),
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


@needs_kernels
def test_compiled_kernels_are_checked_without_a_gpu(here: Path) -> None:
    """The compiler must find kernels that are not interpreted, so this needs a process of its own."""
    (here / "broken.py").write_text(BROKEN)
    env = {**os.environ, "TRITON_INTERPRET": "0", "COLUMNS": "200"}
    command = [sys.executable, "-m", "tritopt", "check", "broken:Ascending", "test", "--quick", "--compiled"]
    command += ["--format", "fp32", "--format", "split8"]
    done = subprocess.run([*command, "--json"], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    answer = json.loads(done.stdout)
    assert (answer["device"], answer["compiled_for"], answer["interpreter"]) == ("PTX machine", "sm_90", False)
    assert {(row["optimizer"], row["passed"]) for row in answer["rows"]} == {("ascending", False), ("test", True)}
    assert len(answer["rows"]) >= 4
    assert all(row["fused_vs_reference"] is not None for row in answer["rows"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--compiled", "--target", "sm_70"], "--target sm_70 must be one of sm_80, sm_90, sm_100"),
        (["--target", "sm_90"], "--target sm_90 needs --compiled"),
        pytest.param(["--compiled"], "TRITON_INTERPRET=1: unset it", marks=needs_interpreter),
    ],
)
def test_what_cannot_be_compiled_is_a_usage_error(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["check", *arguments])
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())


MADE = """
import os, tritopt

def make(stop):
    class Made(tritopt.Test):
        def step(self, indices, weights, grads, states):
            print("a step")
            if self.wd == 0:
                stop()
            super().step(indices, weights, grads, states)
    return Made

Made, Dying = make(int), make(lambda: os._exit(3))
"""


def shared(name: str, n: int = 2) -> list[CheckResult]:
    """Results of an optimizer, by so many processes."""
    selection = Selection([name], quick=True)
    return list(processes.run_cases(selection, selection.cases(), n))


def test_many_checks_are_shared_by_processes(
    here: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are the same in the same order. The class prints, no name leads to it, and it lies in another folder."""
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "broken.py").write_text(MADE)
    monkeypatch.syspath_prepend(folder)
    expected = list(run_checks([load_optimizer("broken:Made")], quick=True))
    assert shared("broken:Made") == expected
    assert all(row.passed for row in expected)


def test_a_process_that_dies_fails_what_it_checked(here: Path) -> None:
    """Another takes its place and checks the rest."""
    (here / "broken.py").write_text(MADE)
    first, *rest = shared("broken:Dying", 1)
    assert first.option == "plain"
    assert first.reason == "the process that was to check it ended with exit code 3"
    assert len(rest) == 6
    assert all(row.passed and row.option != "plain" for row in rest)


def test_a_process_that_is_killed_says_by_what() -> None:
    worker = processes._Worker(
        [sys.executable, "-c", "import os; print('ready', flush=True); os.kill(os.getpid(), 9)"], {}
    )
    assert worker.measure(0) is None
    assert worker.fate() == "was ended by SIGKILL (as the system does when memory runs out; --jobs 1 takes least)"
    worker.close()


def test_processes_that_cannot_start(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is checked where they cannot find the cases, and it does not go on and on."""
    monkeypatch.setattr(processes, "interprets", lambda: not INTERPRETED)  # which this process does not
    (here / "broken.py").write_text(f"import os\nif os.getpid() != {os.getpid()}: os._exit(5)\n{MADE}")
    result = CliRunner().invoke(app, ["check", "broken:Made", "--quick", "--jobs", "1"])
    assert result.exit_code == 1
    assert "a process for checks ended with exit code 5 before the first: it says why above" in result.output


def test_processes_pay_where_kernels_run_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "n_processes", lambda n_cases: 8)
    interpreted, compiled = Selection([]), Selection([], target="sm_90")
    assert processes.n_processes(interpreted, 100) == 8
    assert processes.n_processes(interpreted, 100, jobs=3) == 3
    assert processes.n_processes(interpreted, 100, jobs=1) == processes.n_processes(interpreted, 20) == 0
    assert processes.n_processes(interpreted, 2, jobs=4) == 2
    assert processes.n_processes(compiled, 20) == 8
    assert processes.n_processes(compiled, 20, jobs=1) == 1
    monkeypatch.setattr(processes, "interprets", lambda: not INTERPRETED)  # which this process does not
    assert processes.n_processes(interpreted, 100, jobs=1) == 1
    monkeypatch.setattr(processes, "device", lambda: torch.device("cuda"))
    assert processes.n_processes(interpreted, 100, jobs=4) == 0


def machine(folder: Path, monkeypatch: pytest.MonkeyPatch, **files: str) -> None:
    """Let the kernel's files be these, whose names have two underscores for a stroke."""
    for name, text in files.items():
        path = folder / name.replace("__", "/").replace("_max", ".max").replace("_current", ".current")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(resources, "PROC", folder / "proc")
    monkeypatch.setattr(resources, "CGROUPS", folder / "cgroup")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)


def test_processes_are_as_many_as_cores_and_memory_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(tmp_path, monkeypatch)
    assert resources.free_memory() is None
    assert (resources.n_processes(10_000), resources.n_processes(40), resources.n_processes(1)) == (16, 2, 1)
    machine(
        tmp_path, monkeypatch, proc__meminfo="MemTotal: 9 kB\nMemAvailable:    2000000 kB\nHugePages_Total:       0\n"
    )
    assert resources.free_memory() == 2_048_000_000
    assert resources.n_processes(10_000) == 3  # of half a gigabyte each
    machine(tmp_path, monkeypatch, proc__self__cgroup="1:cpu:/\n0::/pod/box\n", cgroup__pod__cpu_max="1150000 100000\n")
    assert resources.cores() == 11
    machine(
        tmp_path, monkeypatch, cgroup__pod__box__cpu_max="max 100000\n", cgroup__pod__box__memory_max="3000000000\n",
        cgroup__pod__box__memory_current="2500000000\n", cgroup__pod__memory_max="max\n",
    )  # fmt: skip
    assert resources.cores() == 11
    assert resources.free_memory() == 500_000_000
    assert resources.n_processes(10_000) == 1
    (tmp_path / "cgroup" / "pod" / "box" / "memory.stat").write_text("anon 7\ninactive_file 600000000\nactive_file 1\n")
    assert resources.free_memory() == 1_100_000_001


SLOW = """
import os, time, tritopt

with open("pids", "a") as pids:
    print(os.getpid(), file=pids)

class Slow(tritopt.Test):
    def step(self, indices, weights, grads, states):
        open("steps", "w").close()
        time.sleep(1)
        super().step(indices, weights, grads, states)
"""


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(holds: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes as Linux shows them")


@needs_proc
def test_ctrl_c_ends_all_processes(here: Path) -> None:
    """The whole group gets it, as from a terminal; the command says how far it came."""
    (here / "broken.py").write_text(SLOW)
    own = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tritopt", "check", "broken:Slow", "--quick", "--jobs", "1"]
    with subprocess.Popen(
        command, env={**own, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
        # What was started in the background ignores it, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as running:  # fmt: skip
        wait_until((here / "steps").exists, 120)
        pids = {int(pid) for pid in (here / "pids").read_text().split()}
        os.killpg(running.pid, signal.SIGINT)
        _, errors = running.communicate(timeout=60)
    assert running.returncode == 130
    assert re.fullmatch(r"interrupted: \d of 7 cases were checked, 0 failed\n", errors), errors
    assert len(pids - {running.pid}) == (1 if HAS_TRITON and not torch.cuda.is_available() else 0)
    assert not any(map(is_running, pids))


@needs_proc
def test_a_process_ends_with_who_started_it(here: Path) -> None:
    """The system closes the other end of its pipe, and it ends in the middle of a case."""
    (here / "broken.py").write_text(SLOW)
    workers = processes._Workers(Selection(["broken:Slow"], quick=True), 1)
    (worker,) = workers._all
    assert worker._process.stdin is not None
    worker._process.stdin.write("0\n")
    worker._process.stdin.flush()
    wait_until((here / "steps").exists, 120)
    worker._process.stdin.close()
    assert worker._process.wait(timeout=20) == 0
    worker.close()


def test_ctrl_c_in_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[Case] = []

    def check(selection: Selection, case: Case) -> CheckResult:
        if len(checked) == 2:
            raise KeyboardInterrupt
        checked.append(case)
        return check_case(case, 1)

    monkeypatch.setattr(Selection, "check", check)
    result = CliRunner().invoke(app, ["check", "test", "--quick", "--jobs", "1"])
    assert result.exit_code == 130
    assert result.output.endswith("interrupted: 2 of 11 cases were checked, 0 failed\n")


def test_formats_are_chosen_by_name() -> None:
    chosen = find_cases([tritopt.AdamW], formats=["split16", "split8+int8"])
    assert {case.storage for case in chosen} == {"split16", "split8+int8"}
    assert {case.storage for case in find_cases([tritopt.AdamW])} == set(CHECKED)
    assert case(tritopt.SGD, torch.float64, "kahan").storage == ""
    result = CliRunner().invoke(app, ["check", "test", "--format", "splt16"], env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert "unknown format 'splt16'; did you mean 'split16'" in result.output


def test_json() -> None:
    result = CliRunner().invoke(app, ["check", "--quick", "--optimizer", "test", "--optimizer", "SGD", "--json"])
    assert result.exit_code == 0
    answer = json.loads(result.stdout, parse_constant=pytest.fail)
    assert (answer["passed"], answer["quick"], answer["torch"]) == (True, True, torch.__version__)
    assert {row["optimizer"] for row in answer["rows"]} == {"test", "sgd"}
    assert set(answer["rows"][0]) == {field.name for field in fields(CheckResult)}


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


def test_mutations_fit_the_code() -> None:
    """Every text that `python -m tests.mutations` breaks exists, once; running it takes minutes."""
    for mutation in mutations.collect():
        text = mutations.path_of(mutation, ROOT).read_text()
        assert text.count(mutation.old) == 1, mutation
    counted = Counter(mutation.optimizer for mutation in mutations.collect())
    shipped = [name for name, cls in registry.registered().items() if cls.__module__.startswith("tritopt.")]
    assert not {name: counted[name] for name in shipped if counted[name] < 5}
