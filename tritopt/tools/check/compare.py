"""Comparison of what a step made: whether results lie within the tolerances of each other."""

from __future__ import annotations

from itertools import combinations

import torch

import tritopt
from tritopt.mxnet.optimizer import Optimizer
from tritopt.tools.check.cases import Case, CheckResult
from tritopt.tools.check.contender import Contender
from tritopt.tools.check.tolerance import TOLERANCES, Tolerance, with_products


def compare_runs(
    case: Case, step: int, start: dict[str, torch.Tensor], runs: dict[str, Contender], result: CheckResult
) -> None:
    """Enter the differences between all runs into the result."""
    products = runs["truth"].optimizer.product_dtype
    for one, other in combinations(runs, 2):
        kind = "truth" if other == "truth" else _fused_tolerance(case, runs["fused"].optimizer)
        ours, expected = runs[one].tensors(), runs[other].tensors()
        neighbours = [runs[name].neighbours() for name in (one, other)]
        for name, tensor in ours.items():
            is_state = name.startswith("state")
            if case.rereads_states and kind == "truth" and not is_state:
                continue
            value = tensor
            if case.rereads_states and not is_state:
                value = torch.where(_differ(name, ours, expected), expected[name], tensor)
            tolerance = _tolerance(case, kind, name)
            if products is not None and (power := _power_of_products(runs["truth"].optimizer, name)):
                tolerance = with_products(tolerance, products, case.compute_dtype, power)
            gap = _gap(tensor, expected[name], *(neighbour.get(name) for neighbour in neighbours))
            error, is_within = largest_error(value, expected[name], start[name], gap, tolerance, case.compute_dtype)
            result.enter(f"{one}_vs_{other}" if name.startswith("weight") else "states", error)
            if not is_within:
                codes = f", and {tolerance.codes:.3g} of its codes" if name in neighbours[0] and tolerance.codes else ""
                result.fail(
                    f"step {step}, {name} of shape {tuple(tensor.shape)}: {one} and {other} differ by {error:.3g} ulp; "
                    f"allowed is {tolerance.reason}{codes}"
                )


def _power_of_products(optimizer: Optimizer, name: str) -> int:
    """Power of the matrix products, if there are any, that a tensor is made of; 0 for the momentum before them."""
    kind, _, rest = name.partition(" ")
    if kind != "state":
        return 1
    return 2 if optimizer.state_names[int(rest.split()[0])] in optimizer.wide_states else 0


def _differ(name: str, ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mark where any state of this weight or master was rounded apart by chance, which its tolerance allows or not."""
    number = name.rpartition(" ")[2]
    states = [key for key in ours if key.endswith(f" of weight {number}")]
    return torch.stack([ours[key] != expected[key] for key in states]).any(0)


def _gap(
    value: torch.Tensor,
    expected: torch.Tensor,
    ours: tuple[torch.Tensor, torch.Tensor] | None,
    theirs: tuple[torch.Tensor, torch.Tensor] | None,
) -> torch.Tensor:
    """Measure from each element to its neighbour on the other's side, the larger where both have some; 0 where none."""
    gap = torch.zeros_like(value, dtype=torch.float64)
    for x, y, neighbours in ((value, expected, ours), (expected, value, theirs)):
        if neighbours is not None:
            low, high = (neighbour.double() - x.double() for neighbour in neighbours)
            gap = torch.maximum(gap, torch.where(y > x, high, -low))
    return gap


def _tolerance(case: Case, kind: str, name: str) -> Tolerance:
    """Find the tolerance for the tensor of this name: its format's own, if it has one."""
    return TOLERANCES.get(f"{case.master} {name.partition(' ')[0]}, {kind}", TOLERANCES[kind])


def _fused_tolerance(case: Case, optimizer: Optimizer) -> str:
    is_ours = case.cls.__module__.partition(".")[0] == tritopt.__name__
    sums = any(phase.sums_elements for phase in optimizer.phases)
    return "identical" if is_ours and not sums and case.compute_dtype == torch.float32 else "reordered"


def largest_error(
    value: torch.Tensor,
    expected: torch.Tensor,
    start: torch.Tensor,
    gap: torch.Tensor,
    tolerance: Tolerance,
    compute: torch.dtype,
) -> tuple[float, bool]:
    """Measure the largest difference, in ulp of the value's dtype or in gaps, and whether all are tolerated."""
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
    """Measure the distance between neighbouring numbers of the dtype around each element of `size`; 1 for integers."""
    if not dtype.is_floating_point:
        return torch.ones_like(size)
    info = torch.finfo(dtype)
    exponent = torch.frexp(size.clamp(min=info.tiny)).exponent
    return torch.exp2((exponent - 1).double()) * info.eps
