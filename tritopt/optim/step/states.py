"""State of parameters in a step: made when it is missing, checked, handed to the engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch

from tritopt.engine import validate
from tritopt.engine.group import Array
from tritopt.engine.plan import Planner, Task
from tritopt.engine.state_dtype import stored
from tritopt.kernels.formats.format import PLAIN
from tritopt.optim import distributed
from tritopt.optim.convert import COMPANIONS, completes, is_stored_as, received, take_companion, take_states
from tritopt.optim.distributed import is_dtensor
from tritopt.optim.layout import Layout, keys_of
from tritopt.optim.step.counts import ScalarStates
from tritopt.optim.step.members import Member
from tritopt.optim.step.owner import Owner

_NO_NOISE = (0, 0, 0, 0)
Replaced: TypeAlias = list[tuple[torch.Tensor, dict[str, Any]]]
"""Parameters, and the states that they had; an empty one where a parameter had none."""


class Complete:
    """Parameters whose states were found complete, and as their layout says, when a step was built.

    That holds as long as no state is replaced, and the parameter lies as it lay.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[Layout, int, tuple[int, ...], torch.device]] = {}
        """Layout, address, strides and device of parameters, by position."""
        self._extents: dict[int, Array] = {}
        """Addresses where the tensors that a step writes begin and end, int64 [tensors, 2], by position."""

    def has(self, member: Member) -> bool:
        """Whether nothing of the member's states is to be looked at again."""
        known, param = self._known.get(member.position), member.param
        if known is None or is_dtensor(param):
            return False
        # One that had no gradient meanwhile may have moved, also into another's memory.
        return known[0] is member.layout and known[1:] == (param.data_ptr(), param.stride(), param.device)

    def are_apart(self, members: Sequence[Member]) -> bool:
        """Whether no tensor of these, of which nothing is to be looked at again, reaches into another's memory."""
        extents = np.concatenate([self._extents[member.position] for member in members])
        starts, ends = extents[np.argsort(extents[:, 0])].T
        return not (ends[:-1] > starts[1:]).any()

    def add(self, members: Sequence[Member], tasks: Sequence[Task]) -> None:
        """Note members that were checked, and their tensors."""
        for member, task in zip(members, tasks, strict=True):
            param = member.param
            if not is_dtensor(param):
                self._known[member.position] = member.layout, param.data_ptr(), param.stride(), param.device
                extents = [(start := t.data_ptr(), start + validate.extent_of(t)) for t in task.written()]
                self._extents[member.position] = np.array(extents, np.int64)


def create_missing(opt: Owner, members: Sequence[Member], scalar_states: ScalarStates, replaced: Replaced) -> None:
    """Complete states, whose scalar states are bound. `replaced` gets what they were before."""
    for member in members:
        param, layout = member.param, member.layout
        expected, fmt, formats = layout.expected, layout.format, layout.formats
        kept = opt.state.get(param, {})
        state = received(kept)  # where a wrapper has put what it was sent
        is_foreign = not COMPANIONS.isdisjoint(state.keys() - expected.keys())  # the group's `master` has changed
        is_complete = ("step" in state or not layout.shows_numbers) and (
            not fmt.companion or (fmt.companion in state and completes(param, state, fmt))
        )
        if (
            is_complete
            and state is kept
            and not is_foreign
            and all(is_stored_as(param, state, name, of_state, expected) for name, of_state in formats.items())
        ):
            continue
        if layout.owner.begins_anew(state):
            scalar_states.begin_anew(member.position)
        made = {
            **state,
            **(scalar_states.views(member.position) if layout.shows_numbers and "step" not in state else {}),
        }
        take_companion(param, made, fmt)
        take_states(param, made, formats, layout.kinds, expected)
        part = member.part(param).detach()
        if fmt is not PLAIN or member.group["state_dtype"] is not None:
            part = part.to(torch.promote_types(torch.float32, part.dtype))
        inner = member.rule.create_state(member.name, part)
        values = [value for value in (inner if isinstance(inner, tuple) else (inner,)) if value is not None]
        for (name, of_state), value in zip(formats.items(), values, strict=True):
            keys = keys_of(name, of_state)
            if not all(key in expected and key not in made for key in keys):
                continue
            for key, plane in zip(keys, stored(of_state, value), strict=True):
                made[key] = (
                    distributed.laid_out(param, plane)
                    if member.needs_whole
                    else distributed.like(param, plane, expected[key].shape, expected[key].per_block)
                )
        if not made:
            continue
        replaced.append((param, kept))
        opt.state[param] = made
        scalar_states.take(member.position)


def put_back(opt: Owner, replaced: Replaced) -> None:
    """Put back the states as they were, after a failure."""
    for param, state in replaced:
        if state:
            opt.state[param] = state
        else:
            opt.state.pop(param, None)


def task_of(opt: Owner, member: Member, is_complete: bool = False) -> Task:
    """The parameter's tensors, checked: their local parts, unless the reference must see them whole.

    is_complete: whether its states are known to be right (`Complete`).
    """
    param, state, part = member.param, opt.state.get(member.param, {}), member.part
    grad = member.grad
    if is_complete and grad.layout is torch.strided and not member.group.get("differentiable"):
        weight = param.detach()
        validate.weight_and_grad(member.name, weight, grad)
        return complete_task(opt, member, weight, grad, state)
    if grad.layout != torch.strided:
        error = opt.sparse_error_of(member.group)
        if error is not None:
            raise RuntimeError(error)
        grad = grad.to_dense()
    weight = part(param) if member.group.get("differentiable") else part(param).detach()
    fmt, formats = member.layout.format, member.layout.state_formats
    planes = (weight,) if not fmt.companion else (weight, part(state[fmt.companion]))
    values = tuple(map(part, member.layout.owner.planes(member.layout, state)))
    validate.weight_and_grad(member.name, weight, part(grad))
    task = Task(planes, fmt, part(grad), values, state_formats=formats)
    if not is_complete:
        _check_states(member, task)
    if not member.layout.draws:
        return task
    return task._replace(noise=distributed.noise_of(opt.rounding_seed, member.name, param))


def complete_task(opt: Owner, member: Member, weight: torch.Tensor, grad: torch.Tensor, state: dict[str, Any]) -> Task:
    """The tensors of a parameter that is no DTensor, whose states are known to be right."""
    layout, fmt = member.layout, member.layout.format
    planes = (weight, state[fmt.companion]) if fmt.companion else (weight,)
    noise = distributed.noise_of(opt.rounding_seed, member.name, member.param) if layout.draws else _NO_NOISE
    return Task(planes, fmt, grad, layout.owner.planes(layout, state), None, noise, layout.state_formats)


def _check_states(member: Member, task: Task) -> None:
    weight, fmt = task.weight[0], task.format
    for value in task.weight[1:]:
        dtype = fmt.dtype_of_companion(weight.dtype)
        validate.state_tensor(member.name, value, weight, weight.shape, dtype, validate.TORCHS)
    shapes = member.rule.state_shapes(weight.shape)
    for of_state, in_format, shape in zip(task.states(), task.state_formats, shapes, strict=True):
        validate.state_planes(member.name, of_state, weight, shape, in_format, validate.TORCHS)


def check_aliases(planner: Planner, members: Sequence[Member], tasks: Sequence[Task]) -> None:
    """ValueError if the step would write an element twice."""
    pairs = [(m.name, task) for m, task in zip(members, tasks, strict=True) if not m.needs_whole]
    planner.check_aliases("step", [name for name, _ in pairs], [task for _, task in pairs])
