"""Run the cases: one step at a time, all contenders from the same tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import repeat

import torch

from tritopt.engine.tuning.config import GENERIC, Config
from tritopt.kernels.formats.scales import BLOCK
from tritopt.kernels.language import INTERPRETED
from tritopt.mxnet.optimizer import Optimizer
from tritopt.tools.check.cases import Case, CheckResult, find_cases, unchecked
from tritopt.tools.check.compare import compare_runs
from tritopt.tools.check.contender import Contender
from tritopt.tools.check.explain import reason_of
from tritopt.tools.check.tolerance import TOLERANCES
from tritopt.tools.cost import fresh_state, tensors_of
from tritopt.tools.environment import device, fused_unavailable

JUMP = 0.5
"""Share of the largest movement. No smooth formula turns a few roundings into so much; a sign at 0 does."""


N_STEPS = {False: 3, True: 2}
"""Steps of each case, by whether checks are quick."""
SMALL = Config(block_size=32, chunk_size=64)
"""Blocks and chunks for the interpreter, which takes about a millisecond per function call and block of any length."""
SMALL_OF_STATES = Config(block_size=64, chunk_size=128)
"""Blocks and chunks for states of which 64 share a scale; as many blocks a chunk."""


def run_checks(classes: Sequence[type[Optimizer]] | None = None, quick: bool = False) -> Iterator[CheckResult]:
    """Check `find_cases(classes, quick)`, and yield each result as soon as it is known. What raises has failed.

    >>> import tritopt
    >>> all(result.passed for result in run_checks([tritopt.SGD], quick=True))
    True
    """
    yield from map(check_case, find_cases(classes, quick), repeat(N_STEPS[quick]))


def check_case(case: Case, n_steps: int = 3, config: Config | None = None) -> CheckResult:
    """Run one case. Whatever an optimizer raises makes a failed result.

    config: launch configuration of kernels; None: in small blocks in the interpreter, otherwise as tuned or by default.
    """
    result = unchecked(case)
    if config is None and INTERPRETED:
        config = SMALL if case.state_dtype is None else SMALL_OF_STATES
    try:
        _run(case, n_steps, result, config)
    except Exception as error:
        result.fail(reason_of(error))
    return result


def _run(case: Case, n_steps: int, result: CheckResult, config: Config | None) -> None:
    random = torch.Generator("cpu").manual_seed(0)
    weights = _weights(case, random, config or GENERIC)
    weights = [weight if _accepts(case, weight) else weight.reshape(1, -1) for weight in weights]
    runs = {"reference": _contender(case, weights, use_fused_step=False)}
    if not case.has_kernel:
        result.reason = "no kernel: reference only"
    elif reason := fused_unavailable():
        result.reason = f"reference only: {reason}"
    else:
        runs = {"fused": _contender(case, weights, use_fused_step=True), **runs}
        runs["fused"].optimizer._planner.config = config
    if case.rereads_states:
        note = "weights not compared with the truth: they are computed from states as these are stored"
        result.reason = f"{result.reason}; {note}" if result.reason else note
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
                result.fail(
                    f"step {step}: {name} wrote to a gradient, which belongs to the caller; work on a copy of it"
                )
        compare_runs(case, step, start, runs, result)


def _accepts(case: Case, weight: torch.Tensor) -> bool:
    """Tell whether the optimizer takes a weight of this shape; one that does not is given a matrix of one row."""
    try:
        fresh_state(case.cls(**case.arguments), 0, weight)
    except ValueError:
        return False
    return True


def _contender(case: Case, weights: Sequence[torch.Tensor], use_fused_step: bool) -> Contender:
    arguments = {**case.arguments, "use_fused_step": use_fused_step}
    return Contender(case.cls(**arguments), [_copy(weight) for weight in weights], case.master)


def _jumps(probes: Sequence[Contender], grads: Sequence[torch.Tensor], compute: torch.dtype) -> list[torch.Tensor]:
    """Mark where no arithmetic can agree with the truth: it jumps within rounding, as the sign of a sum that cancels.

    Only the truth decides: from states a few roundings below and above, its `probes` arrive more than a `JUMP` apart.
    """
    starts = [weight.clone() for weight in probes[0].weights]
    apart = TOLERANCES["truth"].moved * torch.finfo(compute).eps
    for probe, factor in zip(probes, (1 - apart, 1 + apart), strict=True):
        for state in tensors_of(probe.states):
            if state.is_floating_point():
                state.mul_(factor)
        probe.step([_copy(grad).double() for grad in grads])
    masks = []
    for start, low, high in zip(starts, *(probe.weights for probe in probes), strict=True):
        moved = (low - start).abs().max() if start.numel() else 0.0
        masks.append((high - low).abs() > JUMP * moved)
    return masks


def _weights(case: Case, random: torch.Generator, config: Config) -> list[torch.Tensor]:
    """Make a weight of each kind: one tiny element, empty, several chunks and tail, unaligned and zero, transposed."""
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
    """Draw values of either sign between 1/8 and 2, as many in each octave, laid out like the tensor."""
    # On the CPU, so that they are the same on every machine.
    size = torch.empty(tensor.shape, dtype=torch.float64, device="cpu").uniform_(-3, 1, generator=random).exp2()
    sign = torch.randint(0, 2, tensor.shape, generator=random, dtype=torch.int64, device="cpu") * 2 - 1
    return torch.empty_like(tensor, dtype=dtype).copy_(sign * size)


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    """Copy to the same address modulo 16 bytes, which `clone` would align."""
    room = torch.empty(tensor.numel() + 16, dtype=tensor.dtype, device=tensor.device)
    skip = (tensor.data_ptr() - room.data_ptr()) % 16 // tensor.element_size()
    return room[skip:].as_strided(tensor.shape, tensor.stride()).copy_(tensor)
