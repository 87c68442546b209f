"""`tritopt bench --host`: what is replaced is replaced, and what is left is compared."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import product
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from tritopt import optim
from tritopt.commands.app import app
from tritopt.kernels.language import INTERPRETED
from tritopt.optim.step.build import Build
from tritopt.tools.bench import contestants, host
from tritopt.tools.bench.contestants import Case, Step
from tritopt.tools.bench.host import CASES, HostTime, case_times, host_times
from tritopt.tools.bench.peers import PEERS
from tritopt.tools.bench.without_kernels import FOREACH, OF_FUSED

pytestmark = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="there are no launches to leave out"
)
SMALL = Case(8, 1, True)
NAMES = ("tritopt", "torch fused", "torch foreach")


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    assert torch.get_num_threads() == before


def test_lists_are_those_of_the_targets() -> None:
    fused = [case for case in CASES if case.fused]
    assert {case[:2] for case in fused} == {(400, 1), (400, 400), (4000, 1)}
    assert {case.clip for case in fused} == {False, True}
    titles = [case.title for case in CASES]
    assert len(set(titles)) == len(titles)
    for wanted in (
        "400 tensors: replayed",
        "400 tensors, 4 sets of gradients: replayed",
        "400 tensors, a new set of gradients each step: built",
        "400 tensors, tritopt.create: replayed",
        "400 tensors, tritopt.Trainer: replayed",
        "100 tensors of 10,000 elements, fused=False, one thread: replayed",
    ):
        assert wanted in titles


@pytest.mark.parametrize(
    "case",
    [
        SMALL,
        Case(8, 8),
        Case(7, 3, True),
        Case(40, 2, True, sets=3),
        Case(8, face="mxnet"),
        Case(8, 2, True, fused=False, elements=100),
        Case(8, face="mxnet", fused=False),
        Case(8, face="gluon"),
    ],
    ids=lambda case: case.title,
)
def test_rows(case: Case) -> None:
    rows = [row for row in host_times([case], rounds=5) if row.contestant.startswith(("tritopt", "torch"))]
    assert [row.contestant for row in rows] == (list(NAMES) if case.fused else ["tritopt", "torch for-loop"])
    for row in rows:
        assert Case(**{name: getattr(row, name) for name in Case._fields}) == case
        assert row.title == case.title
        assert row.refused is None
        assert row.ms is not None
        assert row.best_ms is not None
        assert row.cold_ms is not None
        assert 0 < row.best_ms <= row.ms
        assert row.cold_ms > 0
        assert row.ratio == pytest.approx(row.ms / (rows[1].ms or 0))
        assert row.replaced


def test_contestants_take_turns_whose_first_steps_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "SETTLING", 2)
    monkeypatch.setattr(host, "TURN", 2)
    now, order = 0.0, []

    def step(name: str, times: list[float]) -> Step:
        def run() -> None:
            nonlocal now
            order.append(name)
            now += times.pop(0)

        def prepare() -> None:
            nonlocal now
            now += 1000.0  # which is not timed

        return Step(run, prepare)

    a, b = [7.0, 70.0, 1.0, 2.0] * 2, [8.0, 80.0, 5.0, 4.0, 9.0, 90.0, 3.0, 6.0]
    measured = host.interleaved([(step("a", a), nullcontext), (step("b", b), nullcontext)], 2, lambda: now)
    assert order == [*"aaaabbbb"] * 2
    assert measured == [([7.0, 7.0], [1.0, 2.0, 1.0, 2.0]), ([8.0, 9.0], [5.0, 4.0, 3.0, 6.0])]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("clip", [False, True])
def test_no_kernel_runs(name: str, clip: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every weight would move, with gradients of 1 and a decay."""
    made: list[torch.nn.Parameter] = []
    groups = contestants.groups_of

    def remembered(case: Case) -> Any:
        made_groups = groups(case)
        made.extend(param for group in made_groups for param in group["params"])
        for param in made:
            param.data.fill_(1)
            param.grad = torch.ones_like(param)
        return made_groups

    monkeypatch.setattr(contestants, "groups_of", remembered)
    case = Case(4, 2, clip)
    contestant = next(c for c in contestants.contestants(case, NAMES[1:]) if c.name == name)
    with contestant.without_kernels():
        step = contestant.make(case)
        for _ in range(4):
            step()
    assert all(torch.equal(param, torch.ones_like(param)) for param in made)
    assert all(param.grad is not None and torch.equal(param.grad, torch.ones_like(param)) for param in made)
    step()
    if name != "tritopt":  # whose launches are left out once and for all
        assert not any(torch.equal(param, torch.ones_like(param)) for param in made)


@pytest.mark.parametrize("face", contestants.FACES)
def test_the_reference_computes_what_the_for_loop_does(face: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is replaced there, and the arithmetic has one thread."""
    made: list[list[torch.nn.Parameter]] = []
    groups = contestants.groups_of

    def remembered(case: Case) -> Any:
        made_groups = groups(case)
        made.append([param for group in made_groups for param in group["params"]])
        return made_groups

    monkeypatch.setattr(contestants, "groups_of", remembered)
    case = Case(3, face=face, fused=False, elements=50)
    for contestant in contestants.contestants(case, NAMES):
        with contestant.without_kernels():
            assert torch.get_num_threads() == 1
            step = contestant.make(case)
            for _ in range(3):
                step()
    ours, theirs = made
    for a, b in zip(ours, theirs, strict=True):
        assert a.device.type == b.device.type == "cpu"
        assert a.abs().min() > 1e-3
        # MXNet adds its eps, 1e-6, to a root that is not corrected yet, 0.03 |g| after one step; no |g| is below 1e-3.
        torch.testing.assert_close(a, b, rtol=1e-5 if face == "torch" else 0.05, atol=0)


@pytest.mark.parametrize(("sets", "built"), [(1, 0), (4, 0), (82, 0), (83, 83)])
def test_steps_are_built_where_their_sets_are_not_kept(sets: int, built: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """82 sets of 399 gradients fit into the 2^15 that are kept, 83 do not: each goes before it comes again."""
    case, builds = Case(400, sets=sets), 0

    class Counted(Build):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            nonlocal builds
            builds += 1
            super().__init__(*args, **kwargs)

    assert case.is_built == (built > 0)
    ours = contestants.contestants(case, [])[0]
    with ours.without_kernels():
        step = ours.make(case)
        for _ in range(sets + 2):  # states of all are there after the second
            step()
        monkeypatch.setattr("tritopt.optim.step.stepper.Build", Counted)
        for _ in range(sets):
            step()
    assert builds == built


def test_what_was_replaced_is_put_back() -> None:
    before = {name: getattr(torch, name) for name in (*FOREACH, *OF_FUSED)}
    host_times([SMALL], rounds=1)
    assert all(getattr(torch, name) is value for name, value in before.items())
    param = torch.nn.Parameter(torch.ones(64))
    param.grad = torch.ones_like(param)
    optim.AdamW([param], lr=1e-3, max_grad_norm=1.0).step()
    assert not torch.equal(param, torch.ones_like(param))


def test_a_peer_whose_kernels_need_a_gpu_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available() and any(map(importlib.util.find_spec, ("optimi", "apex"))):
        pytest.skip("these run here")
    monkeypatch.setattr(type(PEERS[0]), "missing", lambda self: None if self.name in ("optimi", "apex") else "absent")
    rows = {row.contestant: row for row in case_times(SMALL, rounds=1)}
    assert set(rows) == {*NAMES, "optimi", "apex"}
    for name in ("optimi", "apex"):
        assert rows[name].ms is None
        assert rows[name].ratio is None
        expected = "ModuleNotFoundError" if torch.cuda.is_available() else "RuntimeError: its kernels need a GPU"
        assert (rows[name].refused or "").startswith(expected)


def test_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="rounds=0 must be at least 1"):
        host_times(rounds=0)
    with pytest.raises(ValueError, match="unknown peer 'appex'; did you mean 'apex'"):
        case_times(SMALL, chosen_peers=["appex"])
    with pytest.raises(ValueError, match="face='jax' must be one of 'torch', 'mxnet', 'gluon'"):
        case_times(Case(8, face="jax"))
    refused: tuple[dict[str, Any], ...] = ({"groups": 2}, {"clip": True}, {"sets": 2})
    for face, more in product(("mxnet", "gluon"), refused):
        with pytest.raises(ValueError, match=rf"face='{face}' has no groups.*leave them out, or take face='torch'"):
            case_times(Case(8, face=face, **more))
    monkeypatch.setattr(host, "fused_unavailable", lambda: "no Triton here")
    with pytest.raises(RuntimeError, match="no Triton here"):
        case_times(SMALL)


@pytest.mark.parametrize("as_json", [False, True])
def test_the_command(as_json: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    reference = Case(8, fused=False, elements=10)
    monkeypatch.setattr(host, "CASES", (SMALL, Case(8, face="mxnet"), reference))
    path = tmp_path / "host.json"
    chosen = ["--json"] if as_json else []
    arguments = ["bench", "--host", "--rounds", "3", "--peer", "torch fused", "--save", str(path), *chosen]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    saved = json.loads(path.read_text())
    assert {"cpu", "date", "torch", "triton", "tritopt", "commit"} <= set(saved["machine"])
    rows = [HostTime(**row) for row in saved["rows"]]
    fused = ["8 tensors, clipped: replayed", "8 tensors, tritopt.create: replayed"]
    assert [(row.title, row.contestant) for row in rows] == [
        *((title, name) for title in fused for name in NAMES[:2]),
        (reference.title, "tritopt"),
        (reference.title, "torch for-loop"),
    ]
    if as_json:
        assert json.loads(result.stdout) == saved
    else:
        lines = result.output.splitlines()
        at = [next(i for i, line in enumerate(lines) if title in line) for title in (*fused, reference.title)]
        assert at == sorted(at)
        assert [name in lines[at[2] + 2] for name in NAMES] == [False] * 3
        assert "torch for-loop" in lines[at[2] + 2]
        assert "replaced, torch fused: torch._fused_adamw_" in result.output
        assert "replaced, torch for-loop: nothing, with fused=False" in result.output
