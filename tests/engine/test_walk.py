"""Walks in C say what those in Python say."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from itertools import chain
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import tritopt
from tritopt import optim
from tritopt.engine import private, walk
from tritopt.engine.walk import IN_PYTHON, Walk, known_states, n_words

CHOSEN = walk._choose()
IN_C = None if CHOSEN.complaint else CHOSEN.walk
pytestmark = pytest.mark.skipif(IN_C is None, reason=CHOSEN.complaint)


class Subclass(torch.Tensor):
    """Like a tensor, but for its gradient."""

    grad = None


@pytest.fixture(params=["c", "python"])
def ask(request: pytest.FixtureRequest) -> Walk:
    chosen = IN_C if request.param == "c" else IN_PYTHON
    assert chosen is not None
    return chosen


def tensors() -> list[torch.Tensor]:
    base = torch.arange(24.0)
    return [base, base[3:], base.view(4, 6).t(), torch.zeros(()), torch.zeros(0, 3), torch.zeros(2).half()]


@pytest.mark.parametrize("size", [0, 1, 3])
def test_an_array_of_another_size_is_refused(size: int) -> None:
    assert IN_C is not None
    ones, out = [torch.zeros(1)] * 2, np.zeros(2, np.int64)
    said = IN_C.describe(ones, out, 8)
    other = np.zeros(size, np.int64)
    for call, arguments in (
        (IN_C.describe, (ones, other, 8)),
        (IN_C.are, (ones, said, other)),
    ):
        with pytest.raises(ValueError, match="bytes"):
            call(*arguments)
    assert not IN_C.states_are({0: {}}, [0], said, other)
    assert not IN_C.states_are([{}], [0], said, other)  # type: ignore[arg-type]


def test_tensors_that_are_as_described(ask: Walk) -> None:
    described = [*tensors(), torch.nn.Parameter(torch.zeros(3)), torch.zeros(2).as_subclass(Subclass)]
    at = np.zeros(len(described), np.int64)
    said = ask.describe(described, at, n_words(described))
    assert at.tolist() == [tensor.data_ptr() for tensor in described]
    assert ask.are(described, said, at)
    assert not ask.are(described[:-1], said, at[:-1])
    for i, data in ((0, described[0].clone()), (2, described[2].t()), (-2, described[-2].view(torch.int32))):
        before, described[i] = described[i], data
        assert not ask.are(described, said, at)
        described[i] = before
    described[-2].data = described[-2].data.clone()
    assert not ask.are(described, said, at)
    empty = np.zeros(0, np.int64)
    assert ask.are([], ask.describe([], empty, 0), empty)


class Wrapper(torch.Tensor):
    """Tensor without memory of its own, like a DTensor."""

    _local_tensor: torch.Tensor

    @staticmethod
    def __new__(cls, part: torch.Tensor) -> Wrapper:
        made: Wrapper = torch.Tensor._make_wrapper_subclass(cls, (2 * part.numel(),))
        made._local_tensor = part
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return Wrapper(args[0]._local_tensor.clone())


def test_states_that_are_as_they_were(ask: Walk) -> None:
    a, b, sparse, wrapper = torch.zeros(2, 2), torch.zeros(3), torch.ones(3).to_sparse(), Wrapper(torch.zeros(4))
    dicts: list[dict[str, Any]] = [
        {"a": a, "step": torch.zeros(())}, {}, {"b": b, "user's": 1, "sparse": sparse, "spread": wrapper}
    ]  # fmt: skip
    states = dict(zip("xyz", dicts, strict=True))
    known = known_states(ask, states)

    def hold() -> bool:
        answers = [ask.states_are(states, *known) for _ in range(2)]
        assert answers[0] == answers[1]
        return answers[0]

    assert hold()
    states["y"] = 3  # type: ignore[assignment]
    assert not hold()
    states["y"] = dicts[1]
    assert hold()
    for state, key, other in (
        (dicts[0], "a", a.clone()),
        (dicts[0], "step", torch.zeros(())),
        (dicts[1], "new", 1),
        (dicts[2], "user's", 2),
        (dicts[2], "sparse", sparse.clone()),
    ):
        before = dict(state)
        state[key] = other
        assert not hold()
        state.clear()
        state.update(before)
        assert hold()
    dicts[0]["renamed"] = dicts[0].pop("step")
    assert not hold()
    dicts[0]["step"] = dicts[0].pop("renamed")
    assert hold()
    dicts[0]["step"], dicts[0]["a"] = dicts[0].pop("a"), dicts[0].pop("step")  # the same values in the same order
    assert not hold()
    dicts[0]["a"], dicts[0]["step"] = dicts[0].pop("step"), dicts[0].pop("a")
    assert hold()
    a.t_()
    assert not hold()
    a.t_()
    assert hold()
    data_of = [(a, a.clone()), (b, torch.zeros(3)), (wrapper._local_tensor, torch.zeros(4))]
    for tensor, data in (*data_of, (dicts[0]["step"], torch.ones(()))):
        before_data, tensor.data = tensor.data, data
        assert not hold()
        tensor.data = before_data
        assert hold()
    for others in (
        {"x": dicts[0], "y": dicts[1]},
        {**states, "w": {}},
        {owner: dict(state) for owner, state in states.items()},
        dict(reversed(states.items())),
        dict(zip("xyw", dicts, strict=True)),
        dict(zip("zyx", dicts, strict=True)),
    ):
        assert not ask.states_are(others, *known)
    assert hold()


def test_states_are_not_kept_alive(ask: Walk) -> None:
    states = {0: {"a": torch.zeros(2)}}
    gone = weakref.ref(states[0]["a"])
    known = known_states(ask, states)
    assert ask.states_are(states, *known)
    states[0]["a"] = torch.zeros(2)
    assert gone() is None
    assert not ask.states_are(states, *known)
    states.clear()
    assert not ask.states_are(states, *known)


def test_descriptions_differ_where_tensors_do(ask: Walk) -> None:
    plain = torch.zeros(4, 4)
    seen: list[Any] = []
    for other in (plain, torch.zeros(4, 4, dtype=torch.int32), torch.zeros(2, 8), torch.zeros(4, 5)[:, :4], plain.t()):
        out = np.zeros(2, np.int64)
        said = ask.describe([plain, other], out, n_words([plain, other]))
        assert out.tolist() == [plain.data_ptr(), other.data_ptr()]
        assert said is not None
        assert said not in seen
        seen.append(said)
    assert ask.describe([plain, torch.zeros(4, 4)], np.zeros(2, np.int64), 12) == seen[0]


def test_what_is_not_as_expected_has_no_description(ask: Walk) -> None:
    plain, out = torch.zeros(4, 4), np.zeros(2, np.int64)
    sparse = plain.to_sparse()
    for other in (sparse, torch._neg_view(plain), torch._efficientzerotensor(4, 4)):
        assert ask.describe([plain, other], out, 12) is None
    assert ask.describe([sparse, plain], out, 12) is None
    assert ask.describe([plain, torch.zeros(4)], out, 12) is None
    assert ask.describe([plain, torch.zeros(4, 1, 4)], out, 12) is None
    assert ask.describe([plain, None], out, 12) is None
    first = ask.describe([plain, None], out, n_words([plain, None]))
    assert first is not None
    assert out.tolist() == [plain.data_ptr(), -1]
    assert ask.describe([plain, torch.zeros(())], out, 8) not in (None, first)


def test_gradients_are_described(ask: Walk) -> None:
    params: list[torch.Tensor] = [torch.nn.Parameter(tensor.float()) for tensor in tensors()]
    params[0].grad = torch.ones_like(params[0])
    params[2].grad = torch.ones(6, 4).t().contiguous().t() if params[2].shape == (6, 4) else torch.ones(params[2].shape)
    grads = [param.grad for param in params]
    out, expected = np.zeros(len(params), np.int64), np.zeros(len(params), np.int64)
    said = ask.describe(grads, expected, n_words(grads))
    assert said is not None
    assert ask.gradients_are(params, said, out)
    assert out.tolist() == expected.tolist()
    ones = torch.ones(params[2].shape)
    for i, other in (
        (1, torch.ones_like(params[1])),
        (0, None),
        (2, ones.to_sparse()),
        (0, torch._neg_view(params[0].grad)),
        (0, torch._efficientzerotensor(params[0].shape)),
    ):
        before, params[i].grad = params[i].grad, other
        assert not ask.gradients_are(params, said, out)
        params[i].grad = before
    moved = params[0].grad.clone()
    params[0].grad.data = moved
    assert ask.gradients_are(params, said, out)
    assert out[0] == moved.data_ptr()
    params[0].grad.data = moved.double()
    assert not ask.gradients_are(params, said, out)
    assert not ask.gradients_are(params[:-1], said, out[:-1])


def test_a_subclass_is_asked_for_its_own_gradient(ask: Walk) -> None:
    param = torch.zeros(3).as_subclass(Subclass).requires_grad_()
    out = np.zeros(1, np.int64)
    said = ask.describe([None], out, 2)
    out[0] = 0
    assert ask.gradients_are([param], said, out)
    assert out.tolist() == [-1]


def test_autograd_learns_of_writes(ask: Walk) -> None:
    with torch.inference_mode():
        without_version = torch.zeros(2)
    base = torch.zeros(2, 2)
    marked = [torch.nn.Parameter(torch.zeros(2)), base[0], Subclass(torch.zeros(2)), without_version]
    ask.mark_written([*marked, marked[0]])
    assert [private.version_of(tensor) for tensor in (*marked[:3], base)] == [2, 1, 1, 1]
    ask.mark_written([])
    with pytest.raises((TypeError, AttributeError)):
        ask.mark_written([None])  # type: ignore[list-item]


def test_the_same_objects(ask: Walk) -> None:
    a = [torch.zeros(2), torch.zeros(2), "x"]
    assert ask.same(a, list(a))
    assert not ask.same(a, a[:2])
    assert not ask.same(a[:2], [a[0], torch.zeros(2)])
    lists = [a[:1], [], a[1:]]
    assert ask.hold(lists, [list(each) for each in lists])
    assert ask.hold([], [])
    for other in ([a[:1]], [a[:1], a[1:]], [[], a[:1], a[1:]], [a[:2], [], a[2:]], [a[:1], [], a[:0:-1]], [a]):
        assert not ask.hold(other, lists)
        assert not ask.hold(lists, other)


def test_dicts_that_have_changed(ask: Walk) -> None:
    value = torch.zeros(2)
    dicts: list[dict[Any, Any]] = [{"a": value, "b": 1.5}, {"a": 2.5}, {}]
    before = [tuple(chain.from_iterable(group.items())) for group in dicts]
    assert ask.changed(dicts, before) == []
    assert ask.changed(dicts, before) == []
    dicts[1]["a"] = float("2.5")  # equal, and another
    assert ask.changed(dicts, before) == [1]
    assert ask.changed(dicts, before) == [1]
    dicts[1]["a"] = before[1][1]
    assert ask.changed(dicts, before) == []
    dicts[1]["other"] = dicts[1].pop("a")
    assert ask.changed(dicts, before) == [1]
    dicts[1]["a"] = dicts[1].pop("other")
    assert ask.changed(dicts, before) == []
    dicts[0]["c"] = 1
    dicts[2]["c"] = 1
    assert ask.changed(dicts, before) == [0, 2]
    del dicts[0]["c"], dicts[2]["c"]
    dicts[0].update(a=torch.zeros(2))
    assert ask.changed(dicts, before) == [0]
    with pytest.raises(ValueError, match="as many"):
        ask.changed(dicts, before[:1])


def test_objects_are_not_kept_alive() -> None:
    assert IN_C is not None
    param = torch.nn.Parameter(torch.zeros(3))
    param.grad = torch.zeros(3)
    out, dicts = np.zeros(1, np.int64), [dict[Any, Any](a=object())]
    states = dict(enumerate(dicts))
    counts = [sys.getrefcount(x) for x in (param, param.grad, dicts[0]["a"], dicts[0])]
    for _ in range(10):
        said = IN_C.describe([param.grad], out, 4)
        assert IN_C.gradients_are([param], said, out)
        assert not IN_C.gradients_are([param, param], said, np.zeros(2, np.int64))
        IN_C.describe([param.grad.to_sparse()], out, 4)
        IN_C.are([param.detach()], said, out)
        assert IN_C.states_are(states, *known_states(IN_C, states))
        IN_C.changed(dicts, [(1,)])
        IN_C.same([param], [param])
        assert IN_C.hold([[param]], [[param]])
        assert not IN_C.hold([[param], []], [[], [param]])
    assert [sys.getrefcount(x) for x in (param, param.grad, dicts[0]["a"], dicts[0])] == counts


@pytest.mark.parametrize(("value", "is_python"), [("python", True), ("", False)])
def test_the_environment_can_insist_on_python(value: str, is_python: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITOPT_WALK", value)
    monkeypatch.setattr(walk, "_chosen", [])
    assert (walk.walk() is IN_PYTHON) == is_python


@pytest.fixture
def not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tritopt.engine._walk", None)  # an import then raises ImportError
    monkeypatch.setattr(walk, "_chosen", [])


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch, not_installed: None) -> None:
    from triton.runtime import build

    def fail(*args: Any, **options: Any) -> None:
        raise RuntimeError("Failed to find C compiler.")

    monkeypatch.setattr(build, "compile_module_from_src", fail)


def step() -> None:
    param = torch.nn.Parameter(torch.zeros(3))
    param.grad = torch.ones(3)
    optim.SGD([param], lr=0.1).step()


def update() -> None:
    tritopt.get_updater(tritopt.create("sgd"))([0], [torch.ones(3)], [torch.zeros(3)])


@pytest.mark.parametrize("step", [step, update])
def test_without_a_compiler_python_walks_and_one_step_says_so(step: Callable[[], None], no_compiler: None) -> None:
    with pytest.warns(UserWarning, match=r"Failed to find C compiler\. Install .* TRITOPT_WALK=python") as caught:
        step()
    step()  # pytest makes an error of another warning
    assert [warning.filename for warning in caught] == [__file__]
    assert walk.walk() is IN_PYTHON
    assert walk.description() == "Python, slow: Failed to find C compiler"


def test_python_that_is_meant_is_not_warned_of(no_compiler: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITOPT_WALK", "python")
    step()
    assert walk.walk() is IN_PYTHON
    assert "TRITOPT_WALK" in walk.description()


def test_what_is_not_installed_is_built(not_installed: None) -> None:
    assert walk.description() == "C, built by Triton"
    step()


@pytest.mark.parametrize("source", [{}, {"source": "unknown"}, {"source": "0" * 64}], ids=str)
def test_a_binary_of_another_source_is_not_used(source: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    stale = SimpleNamespace(**source)
    monkeypatch.setitem(sys.modules, "tritopt.engine._walk", stale)
    choice = walk.in_c()
    assert choice.walk is not stale
    assert choice.origin == "C, built by Triton, since what is installed is of another source"


def test_a_binary_of_this_source_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tritopt.engine._walk", IN_C)
    choice = walk.in_c()
    assert choice.walk is IN_C
    assert choice.origin == "C, installed"


def test_a_walk_that_is_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walk, "_agrees", lambda made: False)
    assert "does not describe tensors" in walk._choose().complaint
