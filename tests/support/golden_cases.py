"""Replay trajectories recorded from MXNet through tritopt, and compare.

`python -m tests.support.golden_cases --help` runs them outside pytest and prints a table.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
import warnings
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from tritopt import Optimizer

BUNDLED = Path(__file__).resolve().parents[1] / "data" / "golden"
PATHS = ("step", "fused")
MASTER = "master_weight"
Tensors = list[torch.Tensor]

# Largest deviation, as a share of the distance that the weights have moved (of the largest entry, for states).
TOLERANCE = 2e-4  # MXNet computes in float32, its fused kernels with float32 hyperparameters (1 - beta2 is 1.3e-5 off)
TOLERANCE_LANS = 5e-4  # two normalisations in float32: MXNet's own formula, evaluated in float64, leaves 2e-4
TOLERANCE_FLOAT64 = {"step": 1e-6, "fused": 5e-5}  # clip bounds are float32 in MXNet; and so are fused hyperparameters
TOLERANCE_FLOAT64_LARS = 1e-5  # the norms are float32

# Decisions for which tritopt leaves MXNet's trajectory, and about twice the deviation that they bring in the full set.
# None: nothing can be compared from the step on in which the trajectories part.
DECISIONS: dict[str, float | None] = {
    "M6": 0.05,  # AdamW's step decays the moved weight
    "M7": 0.01,  # LANS's step decays the moved weight in its second half
    "M8": None,  # Nadam's schedule product is shared by all parameters
    "M21": 2e-3,  # fused LARS and LANS take the norm of the float16 weight instead of its float32 master
    "M24": None,  # the schedule is looked up for a parameter before those behind it in the list are counted
}


class State(NamedTuple):
    """A state tensor after the last step."""

    name: str
    tensor: int  # position in the list of weights
    value: torch.Tensor


@dataclass(frozen=True, eq=False)
class GoldenCase:
    """A recorded trajectory: what MXNet was given and what came out. Lists run over steps, then over weights."""

    id: str
    optimizer: str
    tag: str
    flags: frozenset[str]
    use_fused_step: bool
    uses_updater: bool
    kwargs: dict[str, Any]
    scheduler: dict[str, Any] | None
    lr_mult: dict[int, float]
    wd_mult: dict[int, float]
    mult_via: str | None
    indices: list[int]
    active: list[list[int]]
    events: list[dict[str, float]]
    grad_rows: list[list[list[int]]] | None
    w0: Tensors
    grads: list[Tensors]
    weights: list[Tensors]
    states: list[State]
    lr_trace: list[list[float | None]] | None
    index_update_count: dict[int, int]
    num_update: int

    @property
    def steps(self) -> int:
        return len(self.weights)

    @property
    def dtype(self) -> torch.dtype:
        return self.w0[0].dtype

    def positions(self, step: int) -> list[int]:
        """Positions of the weights that are updated in this step."""
        return [p for p, index in enumerate(self.indices) if index in self.active[step]]

    def gradient(self, step: int, position: int) -> torch.Tensor:
        """A fresh copy, row-sparse if it was recorded so."""
        grad = self.grads[step][position].clone()
        if self.grad_rows is None:
            return grad
        # Stated, because the tests set another default device where there is a GPU.
        device = grad.device
        rows = torch.tensor(self.grad_rows[step][position], dtype=torch.int64, device=device)
        return torch.sparse_coo_tensor(
            rows[None], grad[rows], grad.shape, device=device, is_coalesced=True, check_invariants=True
        )

    def decisions(self) -> tuple[str, ...]:
        """Decisions that keep tritopt from following this trajectory, keys of DECISIONS; () if it must be followed."""
        holds_of = {
            "M6": self.optimizer == "AdamW" and "fused_step_differ" in self.flags and not self.use_fused_step,
            "M7": self.optimizer == "LANS" and "fused_step_differ" in self.flags and not self.use_fused_step,
            "M8": "nadam_shared_schedule" in self.flags,
            "M21": "fused_norm_of_fp16_weight" in self.flags and self.use_fused_step,
            "M24": self.first_step_of_unequal_rates() < self.steps,
        }
        return tuple(name for name, holds in holds_of.items() if holds)

    def comparable_steps(self) -> int:
        """Leading steps in which the weights can be compared."""
        return 0 if "M8" in self.decisions() else self.first_step_of_unequal_rates()

    def first_step_of_unequal_rates(self) -> int:
        """Step in which MXNet had not counted all parameters when it looked up a rate; `steps` if there is none."""
        if "lr_lookup_order" in self.flags:
            for step, row in enumerate(self.lr_trace or []):
                if len(set(row) - {None}) > 1:
                    return step
        return self.steps

    def tolerance(self) -> float:
        """Tolerance of the path that MXNet recorded, or of the decisions: both paths of tritopt are exact."""
        allowed = [DECISIONS[name] or 0 for name in self.decisions()]
        if self.dtype == torch.float64:
            allowed.append(TOLERANCE_FLOAT64[PATHS[self.use_fused_step]])
            allowed += [TOLERANCE_FLOAT64_LARS] * (self.optimizer == "LARS")
        else:
            allowed.append(TOLERANCE_LANS if self.optimizer == "LANS" else TOLERANCE)
        return max(allowed)


@dataclass(frozen=True)
class ReplayResult:
    """Result that tritopt made of a case; fewer steps than recorded if it was cut short."""

    weights: list[Tensors]
    states: list[Tensors]
    lr_trace: list[list[float | None]]
    index_update_count: dict[Hashable, int]
    num_update: int


@dataclass
class Comparison:
    """Outcome of `compare`; `worst` is the largest deviation in units of what is allowed."""

    set_aside: tuple[str, ...]
    worst: float
    violations: list[str]


def load_cases(directory: Path = BUNDLED, optimizers: Iterable[str] | None = None) -> list[GoldenCase]:
    """The cases of a directory, in the order of its manifest; `optimizers` in lower case, None for all."""
    manifest = json.loads((directory / "manifest.json").read_text())
    wanted = None if optimizers is None else set(optimizers)
    infos = [{**manifest["case_defaults"], **case} for case in manifest["cases"]]
    infos = [info for info in infos if wanted is None or info["optimizer"].lower() in wanted]
    files = {info[key] for info in infos for key in ("file", "inputs_file")}
    arrays = {name: dict(np.load(directory / name)) for name in files}
    return [_case(info, manifest, arrays[info["inputs_file"]], arrays[info["file"]]) for info in infos]


def _case(
    info: dict[str, Any], manifest: dict[str, Any], inputs: dict[str, Any], outputs: dict[str, Any]
) -> GoldenCase:
    keys, shapes = info["keys"], info["shapes"]
    steps = range(info["steps"])
    gradients, weights = inputs[keys["grads"]], outputs[keys["weights"]]
    return GoldenCase(
        id=info["id"],
        optimizer=info["optimizer"],
        tag=info["tag"],
        flags=frozenset(info["flags"]),
        use_fused_step=info["use_fused_step"],
        uses_updater=info["api"] == "updater",
        kwargs=_constructor_arguments(info),
        scheduler=info.get("lr_scheduler"),
        lr_mult=_by_index(info["lr_mult"]),
        wd_mult=_by_index(info["wd_mult"]),
        mult_via=info.get("mult_via"),
        indices=info["indices"],
        active=info.get("active", [info["indices"]] * len(steps)),
        events=info.get("events", []),
        grad_rows=manifest["grad_rows"][info["grad_rows"]] if "grad_rows" in info else None,
        w0=_split(inputs[keys["w0"]], shapes),
        grads=[_split(gradients[t], shapes) for t in steps],
        weights=[_split(weights[t], shapes) for t in steps],
        states=[_state(item, outputs[keys["states"]]) for item in manifest["state_layouts"][info["state_layout"]]],
        lr_trace=info.get("lr_trace"),
        index_update_count=_by_index(info["final_index_update_count"]),
        num_update=info["final_num_update"],
    )


def _constructor_arguments(info: dict[str, Any]) -> dict[str, Any]:
    """All but lr_scheduler and use_fused_step."""
    arguments = {name: math.inf if value == "inf" else value for name, value in info["kwargs"].items()}
    if info["optimizer"] == "Ftrl" and info.get("weight_stype") == "row_sparse":
        arguments["lazy_update"] = True  # MXNet's Ftrl goes by the storage type, which a torch weight has not
    arguments["multi_precision"] = info["multi_precision"]
    if "param_idx2name" in info:
        arguments["param_idx2name"] = _by_index(info["param_idx2name"])
    if info.get("mult_via") == "param_dict":
        lr_mult, wd_mult = _by_index(info["lr_mult"]), _by_index(info["wd_mult"])
        arguments["param_dict"] = {i: SimpleNamespace(lr_mult=lr_mult[i], wd_mult=wd_mult[i]) for i in lr_mult}
    return arguments


def _by_index(mapping: dict[str, Any]) -> dict[int, Any]:
    return {int(index): value for index, value in mapping.items()}


def _split(flat: Any, shapes: Sequence[Sequence[int]]) -> Tensors:
    parts = torch.split(torch.from_numpy(flat), [math.prod(shape) for shape in shapes])
    return [part.reshape(list(shape)).clone() for part, shape in zip(parts, shapes, strict=True)]


def _state(item: dict[str, Any], flat: Any) -> State:
    values = flat[item["offset"] : item["offset"] + math.prod(item["shape"])].astype(item["dtype"])
    return State(item["name"], item["tensor"], torch.from_numpy(values).reshape(item["shape"]))


def build_optimizer(case: GoldenCase, use_fused_step: bool) -> Optimizer:
    """The optimizer of a case, multipliers set."""
    # Not at the top: TRITON_INTERPRET must be decided before tritopt's kernels are imported.
    import tritopt

    scheduler = case.scheduler and getattr(tritopt.lr_scheduler, case.scheduler["class"])(**case.scheduler["kwargs"])
    with warnings.catch_warnings():
        # That a learning_rate replaces a schedule's base_lr is recorded behaviour.
        warnings.simplefilter("ignore", UserWarning)
        optimizer = tritopt.create(case.optimizer, **case.kwargs, lr_scheduler=scheduler or None, use_fused_step=None)
    # Afterwards, because lazy_update=True refuses use_fused_step=False in the constructor, as MXNet does.
    optimizer.use_fused_step = use_fused_step
    if "noise_replaced_by_zero" in case.flags:
        with_noise: Any = optimizer.scalars_of
        vars(optimizer)["scalars_of"] = lambda *item: with_noise(*item)._replace(deviation=0.0)
    if case.mult_via in ("index", "name"):
        names = case.kwargs["param_idx2name"] if case.mult_via == "name" else {i: i for i in case.lr_mult}
        optimizer.set_lr_mult({names[i]: factor for i, factor in case.lr_mult.items()})
        optimizer.set_wd_mult({names[i]: factor for i, factor in case.wd_mult.items()})
    return optimizer


def replay(case: GoldenCase, use_fused_step: bool, steps: int | None = None, device: str = "cpu") -> ReplayResult:
    """Run a case through tritopt, or its first `steps` steps."""
    import tritopt

    optimizer = build_optimizer(case, use_fused_step)
    weights = [weight.clone().to(device) for weight in case.w0]
    updater = tritopt.get_updater(optimizer)
    states = updater.states
    if not case.uses_updater:
        for index, weight in zip(case.indices, weights, strict=True):
            states[index] = optimizer.create_state_multi_precision(index, weight)
    trajectory, lr_trace = [], []
    for step in range(case.steps if steps is None else min(steps, case.steps)):
        _apply_events(optimizer, case.events, step)
        positions = case.positions(step)
        indices = [case.indices[p] for p in positions]
        active = [weights[p] for p in positions]
        grads = [case.gradient(step, p).to(device) for p in positions]
        if case.uses_updater:
            updater(indices, grads, active)
        else:
            optimizer.update_multi_precision(indices, active, grads, [states[i] for i in indices])
        trajectory.append([weight.to("cpu", copy=True) for weight in weights])
        lr_trace.append([optimizer.learning_rate if i in indices else None for i in case.indices])
    return ReplayResult(
        weights=trajectory,
        states=[[tensor.cpu() for tensor in flatten(states[i])] for i in case.indices],
        lr_trace=lr_trace,
        index_update_count=dict(optimizer._index_update_count),
        num_update=optimizer.num_update,
    )


def _apply_events(optimizer: Optimizer, events: Iterable[dict[str, float]], step: int) -> None:
    for event in events:
        if event["step"] == step and "set_learning_rate" in event:
            optimizer.set_learning_rate(event["set_learning_rate"])
        if event["step"] == step and "rescale_grad" in event:
            optimizer.rescale_grad = event["rescale_grad"]


def flatten(state: Any) -> Iterator[torch.Tensor]:
    """The tensors of a state, in order."""
    if isinstance(state, torch.Tensor):
        yield state
    elif state is not None:
        for part in state:
            yield from flatten(part)


def compare(case: GoldenCase, result: ReplayResult) -> Comparison:
    """Hold a replay against the recording; states and counts only if all steps were replayed.

    A weight may deviate by the tolerance, in units of the largest distance that an entry of its tensor has moved so
    far, plus a floor for the rounding of the weight itself: a tolerance relative to the weight would pass anything,
    since weights barely move. A float16 weight may be one ulp off on top; a state, the tolerance of its largest entry.
    """
    outcome = Comparison(case.decisions(), 0.0, [])
    tolerance = case.tolerance()
    comparable = min(case.comparable_steps(), len(result.weights))
    moved = [0.0] * len(case.w0)
    for step in range(comparable):
        for position, gold in enumerate(case.weights[step]):
            moved[position] = max(moved[position], _largest(gold.double() - case.w0[position].double()))
            limit = _weight_limit(gold, tolerance, moved[position])
            _check(outcome, f"step {step}, weight {position}", result.weights[step][position], gold, limit)
    _check_rates(outcome, case, result, comparable)
    if len(result.weights) == case.steps:
        if comparable == case.steps:
            _check_states(outcome, case, result, tolerance, moved)
        _check_counts(outcome, case, result)
    return outcome


def _largest(tensor: torch.Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def _weight_limit(gold: torch.Tensor, tolerance: float, moved: float) -> torch.Tensor:
    floor = 1e-9 if gold.dtype == torch.float64 else 1e-3
    limit = tolerance * (moved + floor * gold.double().abs().clamp(min=1))
    if gold.dtype == torch.float16:
        limit += torch.from_numpy(np.spacing(gold.abs().numpy())).double()
    return limit


def _check(
    outcome: Comparison, what: str, value: torch.Tensor, gold: torch.Tensor, limit: torch.Tensor | float
) -> None:
    if (value.shape, value.dtype) != (gold.shape, gold.dtype):
        outcome.violations.append(
            f"{what}: {value.dtype} {tuple(value.shape)} instead of {gold.dtype} {tuple(gold.shape)}"
        )
        return
    error = (value.double() - gold.double()).abs()
    ratio = torch.where(error == 0, 0, error / limit).nan_to_num(nan=math.inf, posinf=math.inf)
    outcome.worst = max(outcome.worst, _largest(ratio))
    if _largest(ratio) > 1:
        at = int(ratio.argmax())
        outcome.violations.append(
            f"{what}, entry {at}: {float(value.flatten()[at])!r} instead of {float(gold.flatten()[at])!r}, "
            f"{_largest(ratio):.3g} times the allowed deviation"
        )


def _check_rates(outcome: Comparison, case: GoldenCase, result: ReplayResult, steps: int) -> None:
    for step, row in enumerate((case.lr_trace or [])[:steps]):
        for position, (lr, gold) in enumerate(zip(result.lr_trace[step], row, strict=True)):
            same = lr is gold if lr is None or gold is None else math.isclose(lr, gold, rel_tol=1e-12)
            if not same:
                outcome.violations.append(f"step {step}, learning rate of weight {position}: {lr} instead of {gold}")


def _check_states(
    outcome: Comparison, case: GoldenCase, result: ReplayResult, tolerance: float, moved: list[float]
) -> None:
    for position, values in enumerate(result.states):
        expected = [state for state in case.states if state.tensor == position]
        if len(values) != len(expected):
            names = [state.name for state in expected]
            outcome.violations.append(f"weight {position} has {len(values)} states instead of {names}")
            continue
        for value, (name, _, gold) in zip(values, expected, strict=True):
            # Decision M18: a state has at least the precision of its weight; MXNet fixes some to float32.
            gold = gold.to(torch.promote_types(gold.dtype, case.dtype))
            is_master = name == MASTER
            limit = _weight_limit(gold, tolerance, moved[position]) if is_master else tolerance * _largest(gold)
            _check(outcome, f"{name} of weight {position}", value, gold, limit)


def _check_counts(outcome: Comparison, case: GoldenCase, result: ReplayResult) -> None:
    for name in ("index_update_count", "num_update"):
        count, gold = getattr(result, name), getattr(case, name)
        if count != gold:
            outcome.violations.append(f"{name} is {count} instead of {gold}")


@dataclass
class Row:
    """Outcome of the cases of one optimizer on one path."""

    run: int = 0
    passed: int = 0
    worst: float = 0.0
    set_aside: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    def add(self, comparison: Comparison, seconds: float) -> None:
        self.run += 1
        self.passed += not comparison.violations
        self.seconds += seconds
        self.set_aside.update(comparison.set_aside)
        if not comparison.set_aside:
            self.worst = max(self.worst, comparison.worst)


def run_all(cases: Iterable[GoldenCase], paths: Iterable[str], steps: int | None, console: Console) -> dict[str, Row]:
    """Replay the cases on each path, print violations as they come up; rows by optimizer and path."""
    rows: dict[str, Row] = {}
    for case in cases:
        for path in paths:
            start = time.perf_counter()
            result = replay(case, path == "fused", steps, fused_device() if path == "fused" else "cpu")
            comparison = compare(case, result)
            rows.setdefault(f"{case.optimizer} {path}", Row()).add(comparison, time.perf_counter() - start)
            for violation in comparison.violations[:3]:
                console.print(f"{case.id} {path}: {violation}", markup=False, highlight=False, soft_wrap=True)
    return rows


def fused_device() -> str:
    """Device of the fused path: the GPU unless Triton interprets its kernels."""
    return "cuda" if torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1" else "cpu"


def table_of(rows: dict[str, Row]) -> Table:
    """One line for each optimizer and path."""
    table = Table("optimizer", "path", "run", "passed", "set aside for", "worst", "seconds")
    for name, row in rows.items():
        aside = ", ".join(f"{decision} {count}" for decision, count in sorted(row.set_aside.items()))
        table.add_row(*name.split(), str(row.run), str(row.passed), aside, f"{row.worst:.3f}", f"{row.seconds:.1f}")
    table.caption = "worst: largest deviation in units of the allowed one, cases set aside not counted"
    return table


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "directory", nargs="?", type=Path, default=BUNDLED, help="with manifest.json (default: %(default)s)"
    )
    parser.add_argument("--optimizer", action="append", help="only this one; may be repeated (default: all registered)")
    parser.add_argument("--path", choices=PATHS, action="append", help="only this one (default: both)")
    parser.add_argument("--steps", type=int, help="only so many steps (states and counts are then not compared)")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
    import tritopt

    optimizers = [name.lower() for name in arguments.optimizer or tritopt.names()]
    cases = load_cases(arguments.directory, optimizers)
    console = Console()
    rows = run_all(cases, arguments.path or PATHS, arguments.steps, console)
    console.print(table_of(rows))
    raise SystemExit(any(row.passed < row.run for row in rows.values()))


if __name__ == "__main__":
    main()
