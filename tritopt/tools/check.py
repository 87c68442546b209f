"""Check optimizers on this machine: fused against reference, and both against a float64 truth.

Every step starts all of them from the same tensors, so an error is that of one step. It is compared with what rounding
can do and with the distance that the step moved: weights barely move, so any formula is close to the old weight.
"""

from __future__ import annotations

import importlib
import platform
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import combinations, islice, product, repeat
from pathlib import Path
from typing import Any, NamedTuple

import torch

import tritopt
from tritopt.engine import plan, walk
from tritopt.engine.driver import Apply
from tritopt.engine.tuning.config import GENERIC, Config
from tritopt.engine.validate import did_you_mean
from tritopt.kernels.formats.format import PLAIN, Format
from tritopt.kernels.formats.scales import BLOCK
from tritopt.kernels.formats.weights import MASTERS
from tritopt.kernels.language import HAS_TRITON, INTERPRETED, triton
from tritopt.mxnet import registry
from tritopt.mxnet.optimizer import Optimizer
from tritopt.tools.cost import fresh_state, tensors_of


class Tolerance(NamedTuple):
    """How far two results may lie apart: the sum of these allowances."""

    stored: float
    """Ulp of the dtype that the tensor is stored in."""
    computed: float
    """Ulp of the dtype of the arithmetic."""
    moved: float
    """Share of the tensor's largest movement in this step, in epsilons of the dtype of the arithmetic."""
    reason: str
    codes: float = 0
    """Distances to the next number, on the other result's side, that a state of fewer bits could have been stored as.
    Its `stored` is that of fp32, which it is compared as."""


# The only tolerances there are. An ulp is that of the larger of an element's old and expected new value.
TOLERANCES = {
    "identical": Tolerance(0, 0, 0, "nothing: both do the same operations in the same order, each rounded to nearest"),
    "reordered": Tolerance(
        1,
        1,
        8,
        "a few roundings: for sums in another order, torch's root in fp64, a user's own choice of operations",
        codes=2,  # each result is less than one from what it was before rounding
    ),
    "truth": Tolerance(
        0.5,
        2,
        16,
        "half an ulp for the store, two roundings of the weight, and 16 operations that make the movement",
        codes=1,  # as rounding goes up or down by chance
    ),
    # In place of these two, where a weight or master is stored otherwise. A master is compared as the fp32 number that
    # is behind it, and an ulp is that of fp32.
    "kahan master, truth": Tolerance(
        128, 2, 16, "2^-16: a compensation of 8 bits, below half an ulp of bf16, so that it is one of its weight"
    ),
    "kahan master, reordered": Tolerance(128, 1, 8, "2^-16: two of these, rounded apart"),
    "split8 master, truth": Tolerance(256, 2, 16, "2^-15: one unit of 16 bits, as rounding goes up or down by chance"),
    "split8 master, reordered": Tolerance(256, 1, 8, "2^-15: the bits drawn are the same, and one unit may be crossed"),
    "split8 weight, truth": Tolerance(0.51, 2, 16, "half an ulp for the store, and one of the master behind it"),
    "stochastic weight, truth": Tolerance(1, 2, 16, "one ulp, as rounding goes up or down by chance"),
}

JUMP = 0.5
"""Share of the largest movement. No smooth formula turns a few roundings into so much; a sign at 0 does."""
LEARNING_RATE = 0.1
"""A tenth of the weights' size for optimizers that normalise: movement stands out from rounding in every dtype."""
LR_MULT = {2: 0.5}
"""One parameter has its own rate, so the table of scalars has two rows."""
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    # A third of the gradients is clipped, and wd * w is too small to cancel any of them.
    "wd, clip, rescale": {"wd": 0.05, "clip_gradient": 1.5, "rescale_grad": 2.0},
}
FORMATS: tuple[tuple[torch.dtype, str | None, str | None, tuple[torch.dtype, ...]], ...] = (
    (torch.float32, None, None, (torch.float32, torch.bfloat16)),
    (torch.float64, None, None, (torch.float64,)),
    (torch.float16, None, None, (torch.float16,)),
    (torch.float16, "fp32", None, (torch.float16, torch.float32)),
    (torch.bfloat16, None, None, (torch.bfloat16,)),
    (torch.bfloat16, "fp32", None, (torch.bfloat16, torch.float32)),
    *((torch.bfloat16, master, None, (torch.bfloat16,)) for master in MASTERS if master != "fp32"),
    # A state's format and a weight's know nothing of each other: some pairs will do.
    (torch.bfloat16, "split16", "bf16", (torch.bfloat16,)),
    (torch.bfloat16, "split16", "fp16", (torch.bfloat16,)),
    (torch.bfloat16, "split8", "int8", (torch.bfloat16,)),
    (torch.bfloat16, "split8", "fp8", (torch.bfloat16,)),
    (torch.float32, None, "int8", (torch.float32,)),
    (torch.float32, None, "fp8", (torch.float32,)),
)
"""Dtype of the weights, `master` of the optimizer or None without multi_precision, its `state_dtype`, and dtypes of the
gradients."""

N_STEPS = {False: 3, True: 2}
"""Steps of each case, by whether checks are quick."""
SMALL = Config(block_size=32, chunk_size=64)
"""For the interpreter, which takes about a millisecond per function call and block, however long the block is."""
SMALL_OF_STATES = Config(block_size=64, chunk_size=128)
"""As many blocks a chunk, of states that share scales."""


@dataclass(frozen=True)
class Case:
    """One optimizer with one set of arguments on one kind of tensors."""

    cls: type[Optimizer]
    variant: dict[str, Any]
    weight_dtype: torch.dtype
    grad_dtype: torch.dtype
    master: str | None
    """The optimizer's argument; None: no multi_precision."""
    state_dtype: str | None
    """Likewise; None: states of the (master) weight's dtype."""
    option: str

    @property
    def arguments(self) -> dict[str, Any]:
        """What the optimizer is constructed with."""
        master: dict[str, Any] = {"multi_precision": True} if self.master else {}
        if self.master not in (None, "fp32"):
            master["master"] = self.master
        states = {} if self.state_dtype is None else {"state_dtype": self.state_dtype}
        option = {key: value for key, value in OPTIONS[self.option].items() if key != "wd" or self.cls.decays}
        return {"learning_rate": LEARNING_RATE, **self.variant, **option, **master, **states}

    @property
    def has_kernel(self) -> bool:
        """Whether the optimizer, left alone, takes a fused step where it can."""
        if self.cls.fused_step is not Optimizer.fused_step:
            return True
        return self.cls.step is Optimizer.step and bool(self.cls(**self.arguments).phases)

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of the arithmetic. A step of the user's own works in the weights' dtype."""
        if self.cls.step is not Optimizer.step and not self.master:
            return self.weight_dtype
        return torch.float64 if self.weight_dtype == torch.float64 else torch.float32


@dataclass
class Row:
    """The outcome of a case. Errors are the largest of all steps and elements, in ulp of the dtype of storage.

    That of a state in fewer bits is the distance to the next number that it could have been stored as.
    """

    optimizer: str
    arguments: dict[str, Any]
    """To construct it with."""
    variant: dict[str, Any]
    """Those of the arguments that are a variant of the optimizer."""
    option: str
    """Key of OPTIONS."""
    weight_dtype: str
    grad_dtype: str
    master: str | None
    """How the weights' master is kept, a key of MASTERS. None: there is none."""
    state_dtype: str | None
    """How states are stored. None: in the (master) weight's dtype."""
    fused_vs_reference: float | None = None
    """Of the weights, as the two below. None: not compared."""
    fused_vs_truth: float | None = None
    reference_vs_truth: float | None = None
    states: float | None = None
    """The largest of the three for states and masters."""
    passed: bool = True
    reason: str = ""
    """Why it failed, or why something was not compared."""

    def enter(self, column: str, error: float) -> None:
        """Keep the larger error. Infinity becomes the largest number, which JSON can say."""
        setattr(self, column, max(getattr(self, column) or 0.0, min(error, sys.float_info.max)))

    def fail(self, reason: str) -> None:
        """Mark as failed; the first reason stays."""
        if self.passed:
            self.passed, self.reason = False, reason


@dataclass
class Contender:
    """An optimizer and the tensors that it updates."""

    optimizer: Optimizer
    weights: list[torch.Tensor]
    master: str | None
    """How masters are kept. The truth has none: its weights stand for both."""

    def __post_init__(self) -> None:
        self.optimizer.set_lr_mult(LR_MULT)
        self.states = [fresh_state(self.optimizer, i, weight) for i, weight in enumerate(self.weights)]

    def tensors(self) -> dict[str, torch.Tensor]:
        """By name: the weight, the master if there is one, and the states of each parameter, decoded."""
        found = {}
        for i, (weight, state) in enumerate(zip(self.weights, self.states, strict=True)):
            found[f"weight {i}"] = weight
            if self._format.companion:
                planes = (weight, *tensors_of(state)[:1])
                found[f"master {i}"] = (
                    self._format.decode(planes, torch.float32) if self._has_companion(weight) else weight
                )
        for name, (fmt, planes) in self._planes().items():
            found[name] = planes[0] if fmt is PLAIN else fmt.decode(planes, torch.float32)
        return found

    def neighbours(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Of each state in fewer bits, by name: the next lower and the next higher number that it could have held.

        Its largest and smallest number are their own.
        """
        return {
            name: (_neighbour(fmt, planes, -1), _neighbour(fmt, planes, 1))
            for name, (fmt, planes) in self._planes().items()
            if fmt is not PLAIN
        }

    @property
    def _format(self) -> Format:
        return PLAIN if self.master is None else MASTERS[self.master]

    def _has_companion(self, weight: torch.Tensor) -> bool:
        return bool(self._format.companion) and plan.is_low_precision(weight.dtype)

    def _planes(self) -> dict[str, tuple[Format, tuple[torch.Tensor, ...]]]:
        """The states of each parameter, by name: their format and planes."""
        found = {}
        for i, (weight, state) in enumerate(zip(self.weights, self.states, strict=True)):
            tensors = tensors_of(state)[self._has_companion(weight) :]
            formats = [PLAIN] * len(tensors) if self.optimizer.state_dtype is None else self.optimizer.state_formats()
            rest = iter(tensors)
            for at, fmt in enumerate(formats):
                found[f"state {at} of weight {i}"] = fmt, tuple(islice(rest, fmt.n_planes))
        return found

    def start_from(self, other: Contender) -> None:
        """Take over all values. The truth's weights come from the masters, which stand behind the weights."""
        if self.weights[0].dtype == other.weights[0].dtype:
            for mine, value in zip(self._stored(), other._stored(), strict=True):
                mine.copy_(value)
            return
        values = other.tensors()
        for name, tensor in self.tensors().items():
            tensor.copy_(values[name])

    def _stored(self) -> list[torch.Tensor]:
        return [*self.weights, *tensors_of(self.states)]

    def step(self, grads: Sequence[torch.Tensor]) -> None:
        """One update of all parameters."""
        self.optimizer.update_multi_precision(list(range(len(grads))), self.weights, list(grads), self.states)


def cases(classes: Sequence[type[Optimizer]] | None = None, quick: bool = False) -> list[Case]:
    """All cases of the optimizers (None: of all that are registered); `quick` leaves out most combinations."""
    found = []
    for cls in registered() if classes is None else classes:
        for variant, (weight_dtype, master, state_dtype, grad_dtypes), option in product(
            cls.variants, FORMATS, OPTIONS
        ):
            # What the options do comes before anything is stored: one of them will do for most formats.
            is_special = master not in (None, "fp32") or state_dtype is not None
            if option == "plain" and (is_special or (quick and weight_dtype != torch.float32)):
                continue
            if is_special and not _goes_with(cls, variant, master, state_dtype):
                continue
            for grad_dtype in (weight_dtype,) if quick else grad_dtypes:
                found.append(Case(cls, dict(variant), weight_dtype, grad_dtype, master, state_dtype, option))
    return found


def _goes_with(cls: type[Optimizer], variant: dict[str, Any], master: str | None, state_dtype: str | None) -> bool:
    """Whether the optimizer takes these, as its documentation says, and they change anything."""
    if cls.step is not Optimizer.step or cls.fused_step is not Optimizer.fused_step:
        return False
    try:
        opt = cls(**variant, state_dtype=state_dtype)
        launches, formats = opt.phases, opt.state_formats()
    except Exception:  # the row that shows it will say why
        return True
    if state_dtype is not None and all(fmt is PLAIN for fmt in formats):
        return False
    draws = master is not None and MASTERS[master].draws
    return not draws or all(isinstance(phase, Apply) for phase in launches)


def run_checks(classes: Sequence[type[Optimizer]] | None = None, quick: bool = False) -> Iterator[Row]:
    """A row for each of `cases(classes, quick)`, as soon as it is known. Nothing is raised: what raises has failed.

    >>> import tritopt
    >>> all(row.passed for row in run_checks([tritopt.SGD], quick=True))
    True
    """
    yield from map(check_case, cases(classes, quick), repeat(N_STEPS[quick]))


def registered(names: Sequence[str] | None = None) -> list[type[Optimizer]]:
    """The optimizers registered under these names (None: all); ValueError for an unknown one."""
    return [registry.find(name) for name in (registry.names() if names is None else names)]


def find_optimizers(names: Sequence[str]) -> list[type[Optimizer]]:
    """The optimizers that users name: as registered, or as "package.module:Class" (see `load_optimizer`), each once."""
    return list(dict.fromkeys(load_optimizer(name) if ":" in name else _find(name) for name in names))


def _find(name: str) -> type[Optimizer]:
    try:
        return registry.find(name)
    except ValueError as error:
        raise ValueError(f"{error}; one of your own is named as in my_module:MyOptimizer") from error


def device() -> torch.device:
    """Return the device of the checks: the GPU, unless there is none or kernels take tensors of the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() and plan.kernel_device == "cuda" else "cpu")


def fused_unavailable() -> str | None:
    """Why no kernel can run here and what to do about it, or None."""
    return plan.unavailable(torch.empty(0, dtype=torch.float32, device=device()))


def environment(compiled_for: str | None = None) -> dict[str, Any]:
    """Describe the machine and the versions that the outcome may depend on.

    compiled_for: the GPU that the PTX machine stands in for, if that is used.
    """
    on_gpu, here = device().type == "cuda", "Triton's interpreter" if INTERPRETED else "cpu"
    return {
        "tritopt": tritopt.__version__,
        "torch": torch.__version__,
        "triton": triton.__version__ if HAS_TRITON else None,
        "python": platform.python_version(),
        "machine": platform.platform(),
        "device": "PTX machine" if compiled_for else torch.cuda.get_device_name() if on_gpu else here,
        "interpreter": INTERPRETED,
        "compiled_for": compiled_for,
        "fused_unavailable": None if compiled_for else fused_unavailable(),
        "walk": walk.description(),
    }


def load_optimizer(target: str) -> type[Optimizer]:
    """Import and register the optimizer class that `target`, "package.module:Class", names; modules here come first.

    A class of the torch.optim face stands for its rule.

    Raises:
        ValueError: the target cannot be imported. TypeError: it is no subclass of `Optimizer`.
    """
    module_name, colon, name = target.partition(":")
    if not (module_name and colon and name):
        raise ValueError(f"{target!r} must name a module and a class in it, as in my_module:MyOptimizer")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise ValueError(f"cannot import module {module_name!r}: {type(error).__name__}: {error}") from error
    if not hasattr(module, name):
        known = [
            key for key, value in vars(module).items() if _is_optimizer(value) and value.__module__ == module.__name__
        ]
        raise ValueError(
            f"module {module_name!r} has no {name!r}{did_you_mean(name, known)} "
            f"its optimizers: {', '.join(known) or 'none'}"
        )
    cls: type[Optimizer] = getattr(module, name)
    if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer):
        cls = getattr(cls, "rule", cls)
    if not _is_optimizer(cls):
        raise TypeError(f"{target} is {cls!r:.80}, not a subclass of tritopt.Optimizer")
    return Optimizer.register(cls)


def _is_optimizer(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, Optimizer)


def case_row(case: Case) -> Row:
    """The row of a case that was not checked yet."""
    return Row(
        case.cls.__name__.lower(),
        case.arguments,
        case.variant,
        case.option,
        str(case.weight_dtype).removeprefix("torch."),
        str(case.grad_dtype).removeprefix("torch."),
        case.master,
        case.state_dtype,
    )


def check_case(case: Case, n_steps: int = 3, config: Config | None = None) -> Row:
    """Run one case. Whatever an optimizer raises makes a failed row.

    config: how kernels are launched; None: in small blocks in the interpreter, otherwise as tuned or by default.
    """
    row = case_row(case)
    if config is None and INTERPRETED:
        config = SMALL if case.state_dtype is None else SMALL_OF_STATES
    try:
        _run(case, n_steps, row, config)
    except Exception as error:
        row.fail(f"{type(error).__name__}: {error}")
    return row


def _run(case: Case, n_steps: int, row: Row, config: Config | None) -> None:
    random = torch.Generator("cpu").manual_seed(0)
    weights = _weights(case, random, config or GENERIC)
    weights = [weight if _accepts(case, weight) else weight.reshape(1, -1) for weight in weights]
    runs = {"reference": _contender(case, weights, use_fused_step=False)}
    if not case.has_kernel:
        row.reason = "no kernel: reference only"
    elif reason := fused_unavailable():
        row.reason = f"reference only: {reason}"
    else:
        runs = {"fused": _contender(case, weights, use_fused_step=True), **runs}
        runs["fused"].optimizer._planner.config = config
    if _rereads(case):
        note = "weights not compared with the truth: they are computed from states as these are stored"
        row.reason = f"{row.reason}; {note}" if row.reason else note
    exact = [weight.double() for weight in weights]
    runs["truth"], *probes = (
        _contender(replace(case, state_dtype=None), exact, use_fused_step=False) for _ in range(3)
    )
    first, *others = runs.values()
    for step in range(n_steps):
        for other in (*others, *probes):
            other.start_from(first)
        start = {name: tensor.clone() for name, tensor in runs["truth"].tensors().items()}
        grads = [_random_like(weight, case.grad_dtype, random) for weight in weights]
        if step == 0:
            grads[-1].zero_()
        # With the other sign a gradient adds to what it cancelled: the data change, the tolerances do not.
        for grad, jumps in zip(grads, _jumps(probes, grads, case.compute_dtype), strict=True):
            grad.copy_(torch.where(jumps, -grad, grad))
        for name, run in runs.items():
            given = [grad.double() if name == "truth" else _copy(grad) for grad in grads]
            run.step(given)
            if name != "truth" and not all(map(torch.equal, given, grads)):
                row.fail(f"step {step}: {name} wrote to a gradient, which belongs to the caller; work on a copy of it")
        _compare(case, step, start, runs, row)


def _rereads(case: Case) -> bool:
    """Whether the weights depend on how the new states were rounded."""
    return case.state_dtype is not None and case.cls.rereads_states


def _accepts(case: Case, weight: torch.Tensor) -> bool:
    """Whether the optimizer takes a weight of this shape; one that does not is given a matrix of one row."""
    try:
        fresh_state(case.cls(**case.arguments), 0, weight)
    except ValueError:
        return False
    return True


def _contender(case: Case, weights: Sequence[torch.Tensor], use_fused_step: bool) -> Contender:
    arguments = {**case.arguments, "use_fused_step": use_fused_step}
    return Contender(case.cls(**arguments), [_copy(weight) for weight in weights], case.master)


def _jumps(probes: Sequence[Contender], grads: Sequence[torch.Tensor], compute: torch.dtype) -> list[torch.Tensor]:
    """Where no arithmetic can agree with the truth: it jumps within rounding, as does the sign of a sum that cancels.

    Only the truth decides: from states a few roundings below and above, its `probes` arrive more than a `JUMP` apart.
    """
    starts = [weight.clone() for weight in probes[0].weights]
    apart = TOLERANCES["truth"].moved * torch.finfo(compute).eps
    for probe, factor in zip(probes, (1 - apart, 1 + apart), strict=True):
        for state in tensors_of(probe.states):
            if state.is_floating_point():
                state.mul_(factor)
        probe.step([_copy(grad).double() for grad in grads])
    found = []
    for start, low, high in zip(starts, *(probe.weights for probe in probes), strict=True):
        moved = (low - start).abs().max() if start.numel() else 0.0
        found.append((high - low).abs() > JUMP * moved)
    return found


def _compare(case: Case, step: int, start: dict[str, torch.Tensor], runs: dict[str, Contender], row: Row) -> None:
    """Enter the differences between all runs into the row."""
    for one, other in combinations(runs, 2):
        kind = "truth" if other == "truth" else _fused_tolerance(case, runs["fused"].optimizer)
        ours, expected = runs[one].tensors(), runs[other].tensors()
        neighbours = [runs[name].neighbours() for name in (one, other)]
        for name, tensor in ours.items():
            is_state = name.startswith("state")
            if _rereads(case) and kind == "truth" and not is_state:
                continue
            value = tensor
            if _rereads(case) and not is_state:
                value = torch.where(_differ(name, ours, expected), expected[name], tensor)
            tolerance = _tolerance(case, kind, name)
            gap = _gap(tensor, expected[name], *(found.get(name) for found in neighbours))
            error, is_within = _error(value, expected[name], start[name], gap, tolerance, case.compute_dtype)
            row.enter(f"{one}_vs_{other}" if name.startswith("weight") else "states", error)
            if not is_within:
                codes = f", and {tolerance.codes:.3g} of its codes" if name in neighbours[0] and tolerance.codes else ""
                row.fail(
                    f"step {step}, {name} of shape {tuple(tensor.shape)}: {one} and {other} differ by {error:.3g} ulp; "
                    f"allowed is {tolerance.reason}{codes}"
                )


def _differ(name: str, ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> torch.Tensor:
    """Where any state of this weight or master does: rounded apart by chance, which its tolerance allows or not."""
    number = name.rpartition(" ")[2]
    states = [key for key in ours if key.endswith(f" of weight {number}")]
    return torch.stack([ours[key] != expected[key] for key in states]).any(0)


def _gap(
    value: torch.Tensor,
    expected: torch.Tensor,
    ours: tuple[torch.Tensor, torch.Tensor] | None,
    theirs: tuple[torch.Tensor, torch.Tensor] | None,
) -> torch.Tensor:
    """From each element to its neighbour on the other's side, the larger where both have some; 0 where none."""
    gap = torch.zeros_like(value, dtype=torch.float64)
    for x, y, neighbours in ((value, expected, ours), (expected, value, theirs)):
        if neighbours is not None:
            low, high = (neighbour.double() - x.double() for neighbour in neighbours)
            gap = torch.maximum(gap, torch.where(y > x, high, -low))
    return gap


def _neighbour(fmt: Format, planes: Sequence[torch.Tensor], places: int) -> torch.Tensor:
    """The numbers that lie so many places from those stored, among all that the format has under the same scales."""
    in_order, place_of = (table.to(planes[0].device) for table in _order(fmt))
    places_now = place_of[planes[0].view(_INTEGERS[planes[0].itemsize]).long() % len(place_of)]
    codes = in_order[(places_now + places).clamp(0, len(in_order) - 1)]
    # Codes are decoded as they lie in memory.
    return fmt.decode((torch.empty_like(planes[0]).copy_(codes), *planes[1:]), torch.float32)


_INTEGERS = {1: torch.int8, 2: torch.int16}


@cache
def _order(fmt: Format) -> tuple[torch.Tensor, torch.Tensor]:
    """The codes of finite numbers in their order, one for each number; and of each code, read unsigned, the place."""
    n = 256 ** fmt.dtypes[0].itemsize
    codes = torch.arange(n, dtype=torch.int64, device="cpu").to(_INTEGERS[fmt.dtypes[0].itemsize]).view(fmt.dtypes[0])
    scales = [torch.ones(n // fmt.block, dtype=fmt.dtypes[1], device="cpu")] if fmt.block else []
    numbers = fmt.decode((codes, *scales), torch.float32)
    order = numbers.argsort()
    order = order[numbers[order].isfinite()]
    is_new = torch.ones_like(order, dtype=torch.bool)
    is_new[1:] = numbers[order].diff() > 0  # zero has two codes
    order = order[is_new]
    places = torch.searchsorted(numbers[order], numbers).clamp(max=len(order) - 1)
    return codes[order], places


def _tolerance(case: Case, kind: str, name: str) -> Tolerance:
    """For the tensor of this name: its format's own, if it has one."""
    return TOLERANCES.get(f"{case.master} {name.partition(' ')[0]}, {kind}", TOLERANCES[kind])


def _fused_tolerance(case: Case, optimizer: Optimizer) -> str:
    is_ours = case.cls.__module__.partition(".")[0] == tritopt.__name__
    sums = any(phase.sums_elements for phase in optimizer.phases)
    return "identical" if is_ours and not sums and case.compute_dtype == torch.float32 else "reordered"


def _error(
    value: torch.Tensor,
    expected: torch.Tensor,
    start: torch.Tensor,
    gap: torch.Tensor,
    tolerance: Tolerance,
    compute: torch.dtype,
) -> tuple[float, bool]:
    """Largest difference in ulp of the value's dtype, or in gaps, and whether every element is within the tolerance."""
    if value.numel() == 0:
        return 0.0, True
    ours, expected = value.double(), expected.double()
    is_same = (ours == expected) | (ours.isnan() & expected.isnan())
    difference = torch.where(is_same, 0.0, (ours - expected).abs().nan_to_num(nan=torch.inf))
    size = torch.maximum(expected.abs(), start.abs())
    moved = (expected - start).abs().max()
    stored_ulp = _ulp(size, value.dtype)
    allowed = (
        tolerance.stored * stored_ulp
        + tolerance.computed * _ulp(size, compute)
        + tolerance.moved * torch.finfo(compute).eps * moved
        + tolerance.codes * gap
    )
    in_ulp = torch.where(is_same, 0.0, difference / torch.maximum(stored_ulp, gap)).nan_to_num(nan=torch.inf)
    return float(in_ulp.max()), bool((is_same | (difference <= allowed)).all())


def _ulp(size: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Distance between neighbouring numbers of the dtype around each element of `size`; 1 for integers."""
    if not dtype.is_floating_point:
        return torch.ones_like(size)
    info = torch.finfo(dtype)
    exponent = torch.frexp(size.clamp(min=info.tiny)).exponent
    return torch.exp2((exponent - 1).double()) * info.eps


def _weights(case: Case, random: torch.Generator, config: Config) -> list[torch.Tensor]:
    """One of each kind: a single tiny element, empty, several chunks and a tail, unaligned and zero, transposed."""
    block, chunk = config.block_size, config.chunk_size
    # MXNet's `weight[:] = ...`, which a ported step is full of, does not take a 0-d tensor.
    smallest = () if case.cls.step is Optimizer.step else (1,)
    # A few elements more than share a scale.
    width = 5 if case.state_dtype is None else BLOCK // 6 + 1
    new = partial(torch.zeros, dtype=case.weight_dtype, device=device())
    weights = [
        new(smallest),
        new((3, 0)),
        new(chunk + block + block // 4 + 1),
        new(block // 2 + 1)[1:],
        new((6, width)).t(),
    ]
    weights[0].fill_(2.0**-12)
    for i in (2, 4):
        weights[i].copy_(_random_like(weights[i], case.weight_dtype, random))
    return weights


def _random_like(tensor: torch.Tensor, dtype: torch.dtype, random: torch.Generator) -> torch.Tensor:
    """Values of either sign between 1/8 and 2, as many in each octave, laid out like the tensor."""
    # On the CPU, so that they are the same on every machine.
    size = torch.empty(tensor.shape, dtype=torch.float64, device="cpu").uniform_(-3, 1, generator=random).exp2()
    sign = torch.randint(0, 2, tensor.shape, generator=random, dtype=torch.int64, device="cpu") * 2 - 1
    return torch.empty_like(tensor, dtype=dtype).copy_(sign * size)


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    """A copy at the same address modulo 16 bytes, which `clone` would align."""
    room = torch.empty(tensor.numel() + 16, dtype=tensor.dtype, device=tensor.device)
    skip = (tensor.data_ptr() - room.data_ptr()) % 16 // tensor.element_size()
    return room[skip:].as_strided(tensor.shape, tensor.stride()).copy_(tensor)
