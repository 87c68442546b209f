"""Parts that the tests of tritopt.optim share: the classes, small parameters, gradients, and how close is close."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

import tritopt.optim
from tritopt.engine.driver import Apply
from tritopt.engine.phase import LaunchSpec, run_phases

Params = list[torch.nn.Parameter]

CLASSES: list[Any] = [
    cls
    for cls in vars(tritopt.optim).values()
    if inspect.isclass(cls) and issubclass(cls, tritopt.optim.Optimizer) and hasattr(cls, "rule")
]


def one_of_each_kind(classes: Sequence[Any], rule: Callable[[Any], Any] = lambda cls: cls.rule()) -> list[Any]:
    """The first class of each kind: as many states, and launches that move and sum up as much.

    What loads and stores for a class, and what prepares its launches, knows no more of it.

    rule: makes a class's rule; `tritopt.create` for names.
    """
    first: dict[Any, Any] = {}
    for cls in classes:
        made = rule(cls)
        # An Apply says what it moves behind its function.
        moves = [phase[1:] if isinstance(phase, Apply) else () for phase in made.phases]
        phases = tuple((type(phase), move) for phase, move in zip(made.phases, moves, strict=True))
        first.setdefault((phases, len(made.state_names)), cls)
    return list(first.values())


def with_each(
    classes: Sequence[Any], options: Sequence[Any], rule: Callable[[Any], Any] = lambda cls: cls.rule()
) -> list[tuple[Any, Any]]:
    """Every class with one of the options in turn, and one of each kind with all of them."""
    kinds = one_of_each_kind(classes, rule)
    return [
        (cls, option)
        for i, cls in enumerate(classes)
        for j, option in enumerate(options)
        if cls in kinds or i % len(options) == j
    ]


EVERY_CLASS = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
PRECISIONS = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
SHAPES = ((5, 7), (3, 2), (1, 4))  # matrices, which all take
OF_MATRICES = (tritopt.optim.GroupAdaGrad, tritopt.optim.Muon)
"""Classes that take no other parameters."""

RELATIVE = 1e-5  # of the distance moved: both sides round each of some ten operations, in another order, to fp32
IN_BF16 = 8 * 2.0**-7  # of the distance moved, for Muon: products are rounded to bf16, see tools/check/tolerance.py
ULPS_A_STEP = 2  # of the weight: torch rounds it after the decay and again after the update


def twin(cls: Any) -> Any:
    """torch's class of the same name, or None."""
    return getattr(torch.optim, cls.__name__, None)


def parameters(dtype: torch.dtype = torch.float32, shapes: Sequence[tuple[int, ...]] = SHAPES, seed: int = 0) -> Params:
    """The same for the same seed."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def clone(params: Sequence[torch.Tensor]) -> Params:
    """Equal parameters, without gradients."""
    return [torch.nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad) for p in params]


def set_grads(params: Sequence[torch.Tensor], step: int, scale: float = 1.0) -> None:
    """Gradients that depend on the step only."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(1000 + step)
    for p in params:
        drawn = torch.randn(p.shape, generator=generator)
        p.grad = (scale * drawn).to(p.dtype) if p.requires_grad else None


def counts(opt: Any, params: Sequence[torch.Tensor]) -> list[float]:
    """Steps of some of the optimizer's parameters, which their states show unless torch's class keeps none."""
    owned = [(p, group) for group in opt.param_groups for p in group["params"]]
    place_of = {id(p): i for i, (p, _) in enumerate(owned)}
    places = [place_of[id(p)] for p in params]
    steps: list[float] = opt._stepper._scalar_states.get("step", places).tolist()
    for p, place, count in zip(params, places, steps, strict=True):
        state = opt.state.get(p, {})
        assert ("step" in state) == opt.layout_of(*owned[place]).shows_numbers
        if "step" in state:
            assert (float(state["step"]), state["step"].dtype, state["step"].shape) == (count, torch.float32, ())
    return steps


def train(
    opt: torch.optim.Optimizer, params: Sequence[torch.Tensor], steps: range, each: Callable[[], None] | None = None
) -> None:
    """Steps with those gradients; `each` is called after each."""
    for step in steps:
        set_grads(params, step)
        opt.step()
        if each is not None:
            each()


def named(params: Sequence[torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
    """Name parameters as `model.named_parameters()` does."""
    return [(f"layer{i}.weight", p) for i, p in enumerate(params)]


def options_of(cls: Any, **wanted: Any) -> dict[str, Any]:
    """Options that the class has; a learning rate that moves its weights noticeably."""
    known, lr = inspect.signature(cls).parameters, {"Adadelta": 1.0, "LARS": 10.0}.get(cls.__name__, 0.01)
    refused = {"weight_decay"} if cls.__name__ == "GroupAdaGrad" else set()  # it takes 0 only
    return {name: value for name, value in {"lr": lr, **wanted}.items() if name in known and name not in refused}


def record_launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, LaunchSpec]]:
    """A list that gets, for each pass over phases, the number of groups of tensors and what is launched for them."""
    launches: list[tuple[int, LaunchSpec]] = []

    def recording(groups: Sequence[Any], launch: LaunchSpec, n_tasks: int) -> Any:
        launches.append((len(groups), launch))
        return run_phases(groups, launch, n_tasks)

    for name, module in list(sys.modules.items()):
        if name.startswith("tritopt.") and getattr(module, "run_phases", None) is run_phases:
            monkeypatch.setattr(module, "run_phases", recording)
    return launches


def everything(opt: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Copies of all weights and state tensors, in an order that is always the same."""
    tensors = []
    for group in opt.param_groups:
        for p in group["params"]:
            tensors.append(p.detach().clone())
            state = opt.state.get(p, {})
            tensors += [state[name].detach().clone() for name in sorted(state) if isinstance(state[name], torch.Tensor)]
    return tensors


def assert_same(got: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> None:
    """Bit for bit, dtypes included; NaN equals NaN."""
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def assert_follows(
    got: Sequence[torch.Tensor],
    expected: Sequence[torch.Tensor],
    start: Sequence[torch.Tensor],
    steps: int,
    cls: Any = None,
) -> None:
    """fp32 weights after some steps, within the rounding of the steps of a class; and they did move."""
    relative, least = (IN_BF16, 4) if cls is tritopt.optim.Muon else (RELATIVE, 100)
    assert len(got) == len(expected)
    for a, b, first in zip(got, expected, start, strict=True):
        a, b, first = a.detach().double(), b.detach().double(), first.detach().double()
        moved, size = (b - first).abs().max(), b.abs().max()
        limit = relative * moved + ULPS_A_STEP * steps * torch.finfo(torch.float32).eps * size
        assert moved > least * limit, f"moved {moved:.2e}, which proves nothing within {limit:.2e}"
        error = (a - b).abs().max()
        assert error <= limit, f"off by {error:.2e}, allowed are {limit:.2e}; moved {moved:.2e}"
