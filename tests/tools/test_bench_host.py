"""`tritopt bench --host`: what is replaced is replaced, and what is left is compared."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from tritopt import optim
from tritopt.commands.app import app
from tritopt.kernels.language import INTERPRETED
from tritopt.tools.bench import host
from tritopt.tools.bench.host import CASES, Case, HostTime, case_times, host_times
from tritopt.tools.bench.peers import PEERS
from tritopt.tools.bench.without_kernels import FOREACH, OF_FUSED

pytestmark = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="there are no launches to leave out"
)
SMALL = Case(8, 1, True)
NAMES = ("tritopt", "torch fused", "torch foreach")


def test_lists_are_those_of_the_targets() -> None:
    assert {case[:2] for case in CASES} == {(400, 1), (400, 400), (4000, 1)}
    assert {case.clip for case in CASES} == {False, True}


@pytest.mark.parametrize("case", [SMALL, Case(8, 8, False), Case(7, 3, True), Case(40, 2, True, sets=3)])
def test_rows(case: Case) -> None:
    rows = [row for row in host_times([case], rounds=5) if row.contestant.startswith(("tritopt", "torch"))]
    assert [row.contestant for row in rows] == list(NAMES)
    for row in rows:
        assert Case(row.tensors, row.groups, row.clip, row.sets) == case
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

    def step(name: str, times: list[float]) -> Callable[[], None]:
        def run() -> None:
            nonlocal now
            order.append(name)
            now += times.pop(0)

        return run

    a, b = [7.0, 70.0, 1.0, 2.0] * 2, [8.0, 80.0, 5.0, 4.0, 9.0, 90.0, 3.0, 6.0]
    found = host.interleaved([(step("a", a), nullcontext), (step("b", b), nullcontext)], 2, lambda: now)
    assert order == [*"aaaabbbb"] * 2
    assert found == [([7.0, 7.0], [1.0, 2.0, 1.0, 2.0]), ([8.0, 9.0], [5.0, 4.0, 3.0, 6.0])]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("clip", [False, True])
def test_no_kernel_runs(name: str, clip: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With gradients of 1 and a decay every weight would move."""
    made: list[torch.nn.Parameter] = []
    groups = host._groups

    def remembered(case: Case) -> Any:
        found = groups(case)
        made.extend(param for group in found for param in group["params"])
        for param in made:
            param.data.fill_(1)
            param.grad = torch.ones_like(param)
        return found

    monkeypatch.setattr(host, "_groups", remembered)
    contestant = next(c for c in [host._ours(), *host._torch(NAMES[1:])] if c.name == name)
    with contestant.without_kernels():
        step = contestant.make(Case(4, 2, clip))
        for _ in range(4):
            step()
    assert all(torch.equal(param, torch.ones_like(param)) for param in made)
    assert all(param.grad is not None and torch.equal(param.grad, torch.ones_like(param)) for param in made)
    step()
    if name != "tritopt":  # whose launches are left out once and for all
        assert not any(torch.equal(param, torch.ones_like(param)) for param in made)


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
    monkeypatch.setattr(host, "fused_unavailable", lambda: "no Triton here")
    with pytest.raises(RuntimeError, match="no Triton here"):
        case_times(SMALL)


@pytest.mark.parametrize("as_json", [False, True])
def test_the_command(as_json: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(host, "CASES", (SMALL, Case(8, 8, False)))
    path = tmp_path / "host.json"
    chosen = ["--json"] if as_json else []
    arguments = ["bench", "--host", "--rounds", "3", "--peer", "torch fused", "--save", str(path), *chosen]
    found = CliRunner().invoke(app, arguments)
    assert found.exit_code == 0, found.output
    saved = json.loads(path.read_text())
    assert {"cpu", "date", "torch", "triton", "tritopt", "commit"} <= set(saved["machine"])
    rows = [HostTime(**row) for row in saved["rows"]]
    assert [(row.contestant, row.groups) for row in rows] == [
        ("tritopt", 1), ("torch fused", 1), ("tritopt", 8), ("torch fused", 8),
    ]  # fmt: skip
    if as_json:
        assert json.loads(found.stdout) == saved
    else:
        assert "replaced, torch fused: torch._fused_adamw_" in found.output
