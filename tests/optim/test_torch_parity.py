"""Trajectories of tritopt.optim beside those of the torch classes of the same names.

`python -m tests.optim.test_torch_parity` prints the largest error per class.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from rich.console import Console
from rich.table import Table

import tests.conftest  # noqa: F401  # chooses where kernels run, before they are imported
import tritopt.optim

STEPS = 100
SHORT = 12  # past the step in which RAdam begins to divide
RATES = {"Adadelta": 1.0, "Adafactor": 0.25}  # the first gets nowhere with less; the second crosses 1 / sqrt(step)
RATE = 2.0**-6  # the others'; as a tensor the same in every precision

# Options of torch's signatures with the values that are tried, and three more dimensions: param_groups with values of
# their own, a scheduler of torch's, and capturable, which torch refuses on a CPU and which must change nothing.
COMMON: dict[str, tuple[Any, ...]] = {
    "lr": ("float", "tensor"),
    "weight_decay": (0.0, 0.1),
    "maximize": (False, True),
    "foreach": (None, False, True),
    "capturable": (False, True),
    "groups": (1, 3),
    "scheduler": (None, "StepLR", "OneCycleLR"),
}
BETAS = {"betas": ((0.9, 0.999), (0.7, 0.4)), "eps": (1e-8, 1e-3)}
DECOUPLED = {"decoupled_weight_decay": (False, True)}
OPTIONS: dict[str, dict[str, tuple[Any, ...]]] = {
    "SGD": {**COMMON, "momentum": (0.0, 0.9), "dampening": (0.0, 0.3), "nesterov": (False, True)},
    "Adam": {**COMMON, **BETAS, **DECOUPLED, "amsgrad": (False, True)},
    "AdamW": {**COMMON, **BETAS, "amsgrad": (False, True)},
    "Adagrad": {**COMMON, "lr_decay": (0.0, 0.1), "initial_accumulator_value": (0.0, 0.5), "eps": (1e-10, 1e-3)},
    "Adadelta": {**COMMON, "rho": (0.9, 0.5, 1.0), "eps": (1e-6, 1e-3)},
    "RMSprop": {
        **COMMON,
        "alpha": (0.99, 0.5),
        "eps": (1e-8, 1e-3),
        "momentum": (0.0, 0.9),
        "centered": (False, True),
    },
    "Adamax": {**COMMON, **BETAS},
    "NAdam": {**COMMON, **BETAS, **DECOUPLED, "momentum_decay": (4e-3, 0.5)},
    "RAdam": {**COMMON, **BETAS, **DECOUPLED},
    "Adafactor": {**COMMON, "beta2_decay": (-0.8, -0.5), "eps": ((None, 1e-3), (1e-3, 2.0)), "d": (1.0, 1.5)},
}
SUMS = ("Adafactor",)  # whose kernels add up in another order than the reference, and are slow to interpret

# The error of a run is its largest distance, over the elements of a tensor, to torch's own run in fp64 from the same
# numbers. Ours may be FACTOR times that of torch in the same precision (for our fp64, of torch in fp32, times
# 2^-29), and ULPS ulps of the tensor's largest element.
FACTOR = 2.0  # both run into the same roundings of weight and states, one after the other, but not into equal ones
ULPS = 6.0  # a step rounds the weight up to three times, each by up to half an ulp: a random walk of 100 steps


class Case(NamedTuple):
    """A class of torch.optim and values of its options."""

    name: str
    options: tuple[tuple[str, Any], ...]

    def __str__(self) -> str:
        first = {option: values[0] for option, values in OPTIONS[self.name].items()}
        return "-".join([self.name, *[f"{key}={value}" for key, value in self.options if value != first[key]]])


def case_of(name: str, options: Mapping[str, Any]) -> Case:
    return Case(name, tuple(options.items()))


def rate_of(case: Case, dtype: torch.dtype) -> Any:
    rate = RATES.get(case.name, RATE)
    return torch.tensor(rate, dtype=dtype) if dict(case.options)["lr"] == "tensor" else rate


def accepts(case: Case) -> bool:
    """Whether torch takes these options together."""
    options = dict(case.options)
    if case.name == "Adafactor" and options["lr"] == "tensor" and options["foreach"]:
        return (
            False  # where the step bounds the rate of some parameters only, torch stacks tensors and floats: TypeError
        )
    try:
        getattr(torch.optim, case.name)([torch.zeros(())], **arguments_of(case, torch.float32))
    except ValueError:
        return False
    return True


def arguments_of(case: Case, dtype: torch.dtype) -> dict[str, Any]:
    """Select those of the options that torch's constructor takes."""
    kept = {key: value for key, value in case.options if key not in ("capturable", "groups", "scheduler")}
    return {**kept, "lr": rate_of(case, dtype)}


@cache
def cases(name: str) -> list[Case]:
    """The default, and so many more that each pair of values of two options that go together is in one of them."""
    options, chance = OPTIONS[name], random.Random(0)
    chosen = [{key: values[0] for key, values in options.items()}]
    missing = dict.fromkeys(
        ((a, x), (b, y))
        for (a, xs), (b, ys) in itertools.combinations(options.items(), 2)
        for x, y in itertools.product(xs, ys)
    )
    while missing:
        for pair in itertools.combinations(chosen[-1].items(), 2):
            missing.pop(pair, None)
        while missing:
            pair = next(iter(missing))
            drawn = [{key: chance.choice(values) for key, values in options.items()} for _ in range(60)]
            candidates = [case for case in ({**each, **dict(pair)} for each in drawn) if accepts(case_of(name, case))]
            if candidates:
                chosen.append(
                    max(candidates, key=lambda case: len(missing.keys() & set(itertools.combinations(case.items(), 2))))
                )
                break
            del missing[pair]  # torch refuses it
    return [case_of(name, options) for options in chosen]


ALL = [case for name in OPTIONS for case in cases(name)]


class Run(NamedTuple):
    """Result of a run, fp64 on the CPU."""

    weights: list[torch.Tensor]
    moved: list[torch.Tensor]
    """Distance that each element went."""


class Problem:
    """Parameters of every layout, and gradients for each step: the same numbers in every precision."""

    def __init__(self, name: str, n_steps: int) -> None:
        generator = torch.Generator("cpu").manual_seed(0)
        # torch's Adafactor divides by the number of elements.
        shapes = [(), (7,), (6, 5), (2, 3, 4, 2), (3, 2, 5), (9,), *[(0,)] * (name != "Adafactor")]
        self.starts = [torch.randn(shape, generator=generator, device="cpu") for shape in shapes]
        self.grads = [
            [
                (torch.randn(shape, generator=generator, device="cpu") + 0.5) * 10.0 ** (i % 3 - 1)
                for i, shape in enumerate(shapes)
            ]
            for _ in range(n_steps)
        ]
        for step, grads in enumerate(self.grads):
            grads[1][::3] = 0.0  # elements that never get a gradient, others in every second step only
            grads[2][1:3] *= step % 2

    def parameters(self, dtype: torch.dtype) -> list[torch.nn.Parameter]:
        """Contiguous, transposed, channels_last and unaligned."""
        device = torch.get_default_device()
        made = [start.to(device, dtype, copy=True) for start in self.starts]
        made[2] = made[2].T.contiguous().T
        made[3] = made[3].contiguous(memory_format=torch.channels_last)
        made[5] = torch.cat([made[5].new_zeros(1), made[5]])[1:]
        return [torch.nn.Parameter(tensor) for tensor in made]

    def set_grads(self, step: int, params: Sequence[torch.nn.Parameter]) -> None:
        """Set the gradients of a step; some have none at times, one gets its first late, and not all are laid out like
        the parameter."""
        for i, (param, grad) in enumerate(zip(params, self.grads[step], strict=True)):
            is_missing = (i == 1 and step % 5 == 3) or (i == 4 and step < 2)
            param.grad = None if is_missing else torch.empty_like(param).copy_(grad)
            if i == 2 and step % 2 and param.grad is not None:
                param.grad = param.grad.contiguous()

    def outcome(self, params: Sequence[torch.nn.Parameter]) -> Run:
        """Result of a run from these starts."""
        weights = [param.detach().double().cpu() for param in params]
        return Run(weights, [(w - start.double()).abs() for w, start in zip(weights, self.starts, strict=True)])


@cache
def problem_of(name: str, n_steps: int) -> Problem:
    return Problem(name, n_steps)


def groups_of(params: Sequence[torch.nn.Parameter], options: dict[str, Any], rate: float) -> Any:
    """One group, or three with a learning rate, a decay and moments of their own."""
    if options["groups"] == 1:
        return list(params)
    own = {"betas": (0.8, 0.9), "momentum": 0.5, "rho": 0.6, "alpha": 0.8, "d": 1.25, "lr_decay": 0.05}
    third = {key: value for key, value in own.items() if options.get(key)}
    return [
        {"params": list(params[:2])},
        {"params": list(params[2:4]), "lr": rate / 2, "weight_decay": 0.05},
        {"params": list(params[4:]), **third},
    ]


def scheduler_of(opt: torch.optim.Optimizer, options: dict[str, Any], n_steps: int) -> Any:
    """One of torch's; OneCycleLR cycles betas or momentum as well."""
    if options["scheduler"] == "StepLR":
        return torch.optim.lr_scheduler.StepLR(opt, step_size=7, gamma=0.9)
    if options["scheduler"] == "OneCycleLR":
        cycles = "betas" in options or "momentum" in options
        return torch.optim.lr_scheduler.OneCycleLR(
            opt, float(opt.defaults["lr"]), total_steps=n_steps + 1, cycle_momentum=cycles
        )
    return None


def run(
    make: Callable[..., torch.optim.Optimizer], case: Case, dtype: torch.dtype, n_steps: int = STEPS, **extra: Any
) -> Run:
    """The case with this class."""
    options, arguments = dict(case.options), arguments_of(case, dtype)
    problem = problem_of(case.name, n_steps)
    params = problem.parameters(dtype)
    if make is not getattr(torch.optim, case.name):
        arguments["capturable"] = options["capturable"]
    opt = make(groups_of(params, options, float(arguments["lr"])), **arguments, **extra)
    scheduler = scheduler_of(opt, options, n_steps)
    for step in range(n_steps):
        problem.set_grads(step, params)
        opt.step()
        if scheduler is not None:
            scheduler.step()
    return problem.outcome(params)


@cache
def truth(case: Case, n_steps: int = STEPS) -> Run:
    return run(getattr(torch.optim, case.name), case, torch.float64, n_steps)


@cache
def torchs(case: Case, n_steps: int = STEPS) -> Run:
    return run(getattr(torch.optim, case.name), case, torch.float32, n_steps)


def ours(case: Case, dtype: torch.dtype, fused: bool | None, n_steps: int = STEPS) -> Run:
    return run(getattr(tritopt.optim, case.name), case, dtype, n_steps, fused=fused)


def errors(actual: Run, expected: Run) -> list[float]:
    """The largest of each tensor."""
    pairs = zip(actual.weights, expected.weights, strict=True)
    return [float((w - x).abs().max()) if w.numel() else 0.0 for w, x in pairs]


def bounds(case: Case, dtype: torch.dtype, n_steps: int = STEPS) -> Iterator[float]:
    """Bounds on the errors of each tensor."""
    expected = truth(case, n_steps)
    unit = torch.finfo(dtype).eps
    for error, weight, moved in zip(
        errors(torchs(case, n_steps), expected), expected.weights, expected.moved, strict=True
    ):
        bound = FACTOR * error * unit / torch.finfo(torch.float32).eps
        if weight.numel():
            bound += ULPS * unit * float(torch.maximum(weight.abs(), moved).max())
            assert bound < 1e-3 * float(moved.max()), "the bound would pass anything"
        yield bound


def assert_near(actual: Run, case: Case, dtype: torch.dtype, n_steps: int = STEPS) -> None:
    for i, (error, bound) in enumerate(
        zip(errors(actual, truth(case, n_steps)), bounds(case, dtype, n_steps), strict=True)
    ):
        assert error <= bound, f"tensor {i}"


def test_every_pair_of_options_is_tried() -> None:
    for name, options in OPTIONS.items():
        tried = {pair for case in cases(name) for pair in itertools.combinations(case.options, 2)}
        for (a, xs), (b, ys) in itertools.combinations(options.items(), 2):
            for x, y in itertools.product(xs, ys):
                if ((a, x), (b, y)) not in tried:
                    first = {key: values[0] for key, values in options.items()}
                    more = {"momentum": 0.9} if name == "SGD" else {}  # without which there is no nesterov
                    assert not accepts(case_of(name, {**first, **more, a: x, b: y})), (name, a, x, b, y)


@pytest.mark.parametrize("case", ALL, ids=str)
def test_reference_goes_where_torch_goes(case: Case) -> None:
    """Both precisions share torch's runs."""
    for dtype in (torch.float32, torch.float64):
        assert_near(ours(case, dtype, fused=False), case, dtype)


@pytest.mark.parametrize("case", [cases(name)[0] for name in OPTIONS], ids=str)
def test_kernel_goes_where_torch_goes(case: Case) -> None:
    n_steps = SHORT if case.name in SUMS else STEPS
    assert_near(ours(case, torch.float32, fused=None, n_steps=n_steps), case, torch.float32, n_steps)


@pytest.mark.parametrize("case", ALL, ids=str)
def test_kernel_is_the_reference(case: Case) -> None:
    if case.name in SUMS:
        assert_near(ours(case, torch.float32, fused=None, n_steps=3), case, torch.float32, n_steps=3)
        return
    actual = ours(case, torch.float32, fused=None, n_steps=SHORT)
    for w, x in zip(actual.weights, ours(case, torch.float32, fused=False, n_steps=SHORT).weights, strict=True):
        torch.testing.assert_close(w, x, rtol=0, atol=0)


def error_table() -> Table:
    """The largest errors of all cases of a class, as shares of the largest distance that a tensor's weights went."""
    table = Table(title=f"Largest error after {STEPS} steps / largest distance moved")
    for heading in ("class", "cases", "torch fp32", "tritopt fp32", "tritopt fp32, kernel", "tritopt fp64"):
        table.add_column(heading, justify="left" if heading == "class" else "right")
    for name in OPTIONS:
        rows = [
            (
                share(torchs(case), case),
                share(ours(case, torch.float32, fused=False), case),
                share(ours(case, torch.float32, fused=None), case) if case in cases(name)[:1] else 0.0,
                share(ours(case, torch.float64, fused=False), case),
            )
            for case in cases(name)
        ]
        table.add_row(name, str(len(rows)), *[f"{max(column):.1e}" for column in zip(*rows, strict=True)])
    return table


def share(actual: Run, case: Case) -> float:
    expected = truth(case)
    pairs = zip(errors(actual, expected), expected.moved, strict=True)
    return max(error / float(moved.max()) for error, moved in pairs if moved.numel())


if __name__ == "__main__":
    Console().print(error_table())
