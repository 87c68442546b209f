"""Numbers that an optimizer keeps per parameter: the step, and for NAdam a product."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from tritopt.engine.device import is_capturing
from tritopt.engine.group import FIRST_STEP, Array
from tritopt.engine.private import is_fake, is_zero_tensor
from tritopt.engine.recent import Recent

CPU = torch.device("cpu")
MAX_LISTS = 64
State = dict[str, Any]


class ScalarStates:
    """One fp32 vector per name over all parameters; `state[p][name]` is a 0-d view of it, where torch has 0-d tensors.

    So a step advances all of them at once, and checkpoints look like torch's. Whatever tensor stands in a state when a
    step begins is read, and the one that stands there afterwards shows the new number: a tensor that was assigned,
    loaded, unpickled or given other memory is laid over the vector again. One that lies in shared memory belongs to
    several processes and stays where it is: its number is copied out of it and back. The vectors move to a device when
    a step needs them there.

    Steps are counted in fp64 beside the vector, which as torch's holds them exactly up to 2^24 only.

    Args:
        initial: the value of each name before the first step.
    """

    def __init__(self, initial: Mapping[str, float]) -> None:
        self.initial = dict(initial)
        self.device = CPU
        self._vectors: dict[str, torch.Tensor] = {}
        self._exact = torch.empty(0, dtype=torch.float64, device=CPU)
        """Steps, fp64 [parameters]; where the vector has another number, somebody wrote that."""
        self._common: tuple[Sequence[int], float] | None = None
        """List of positions of the last step, and the exact count that they have in common, if they have one."""
        self._tensors: list[dict[str, torch.Tensor]] = []
        """Tensors in the state of each parameter, by name of the number."""
        self._taken: set[int] = set()
        """Positions of parameters that had a state when numbers were bound, or got one since."""
        self._elsewhere: list[tuple[str, int, torch.Tensor]] = []
        """Tensors in shared memory, with their names and positions."""
        self.n_bindings = 0
        """Times that numbers were taken up anew: steps of before would count in memory that no state shows."""
        self.n_made = 0
        """Number of states that parameters got in steps."""
        self._places: Recent[torch.Tensor | slice] = Recent()
        self._of_lists: dict[int, tuple[Sequence[int], torch.Tensor | slice]] = {}
        """Places by `id` of lists of positions, which are kept and must not change."""

    @property
    def is_shared(self) -> bool:
        """Whether numbers lie in memory that other processes write to."""
        return bool(self._elsewhere)

    def bind(
        self,
        states: Sequence[State],
        device: torch.device,
        is_shown: Callable[[int], bool] = lambda position: True,
        first: Callable[[State], float] = lambda state: 0.0,
    ) -> None:
        """Take up the numbers of all states (empty ones have none yet) into vectors on `device`.

        is_shown: whether the state of the parameter at a position is to have them. first: the step that a state stands
        for which has none.
        """
        if not self._is_bound(states, device):
            self._rebind(states, device, is_shown, first)
        for name, position, tensor in self._elsewhere:
            self._vectors[name][position] = tensor.reshape(())

    def _is_bound(self, states: Sequence[State], device: torch.device) -> bool:
        if len(self._tensors) != len(states) or self.device != device or is_fake(self._exact):
            return False
        starts = {name: vector.data_ptr() for name, vector in self._vectors.items()}
        elsewhere = {id(tensor) for *_, tensor in self._elsewhere}
        for position, (state, tensors) in enumerate(zip(states, self._tensors, strict=True)):
            if bool(state) != (position in self._taken):
                return False
            for name, start in starts.items():
                tensor = state.get(name)
                if tensor is not tensors.get(name):
                    return False
                if tensor is None or id(tensor) in elsewhere:
                    continue
                lies_there = tensor.dtype == torch.float32 and tensor.numel() == 1 and not tensor.is_neg()
                if not lies_there or tensor.data_ptr() != start + 4 * position:
                    return False
        return True

    def _rebind(
        self,
        states: Sequence[State],
        device: torch.device,
        is_shown: Callable[[int], bool],
        first: Callable[[State], float],
    ) -> None:
        if is_capturing(device):
            raise RuntimeError(FIRST_STEP)
        exact, vectors = torch.empty(0, dtype=torch.float64, device=device), {}
        for name, initial in self.initial.items():
            values = [
                state[name] if name in state else first(state) if state and name == "step" else initial
                for state in states
            ]
            wide = torch.stack([_number(value, device) for value in values])
            vectors[name] = wide.float()
            if name == "step":
                exact = wide
        tensors: list[dict[str, torch.Tensor]] = [{} for _ in states]
        elsewhere: list[tuple[str, int, torch.Tensor]] = []
        seen: set[int] = set()
        for position, state in enumerate(states):
            for name, vector in vectors.items():
                old: Any = state.get(name)
                if not state or (old is None and not is_shown(position)):
                    continue
                if id(old) in seen or not _can_stay(old):  # two parameters cannot count in one tensor
                    state[name] = vector[position]
                elif old.device == device == CPU and old.is_shared():
                    elsewhere.append((name, position, old))
                elif old.device == device and old.dtype == torch.float32:
                    old.data = vector[position].view(old.shape)
                else:
                    state[name] = vector[position]
                tensors[position][name] = state[name]
                seen.add(id(state[name]))
        self._vectors, self._exact, self._tensors, self._elsewhere = vectors, exact, tensors, elsewhere
        self._taken = {position for position, state in enumerate(states) if state}
        self._places, self._of_lists, self._common = Recent(), {}, None
        self.device = device
        self.n_bindings += 1

    def views(self, position: int) -> dict[str, torch.Tensor]:
        """The numbers of a parameter, for a state that is to show them."""
        self._tensors[position] = {name: vector[position] for name, vector in self._vectors.items()}
        return self._tensors[position]

    def take(self, position: int) -> None:
        """Note that a parameter got a state."""
        self._taken.add(position)
        self.n_made += 1

    def begin_anew(self, position: int) -> None:
        """Set a parameter's numbers to their first values."""
        for name, initial in self.initial.items():
            self._vectors[name][position] = initial

    def get(self, name: str, positions: Sequence[int]) -> torch.Tensor:
        """These parameters' numbers, fp64 [positions]; steps after they were advanced."""
        vector = self._exact if name == "step" else self._vectors[name]
        return vector[self._at(positions)].double()

    def shared(self, positions: Sequence[int]) -> list[float] | None:
        """The numbers of these parameters, where all have the same; on the CPU, after steps were advanced."""
        at = self._at(positions)
        common = []
        for name, vector in self._vectors.items():
            if name == "step" and self._common is not None and self._common[0] is positions:
                common.append(self._common[1])
                continue
            values = (self._exact if name == "step" else vector).numpy()
            own = values[at] if isinstance(at, slice) else values[at.numpy()]
            if not (own == own[0]).all():
                return None
            common.append(float(own[0]))
        return common

    def tensors(self) -> list[torch.Tensor]:
        """All that steps read and write on the device."""
        places = [at for at in self._places.values() if isinstance(at, torch.Tensor)]
        return [*self._vectors.values(), self._exact, *places]

    def advance(self, positions: Sequence[int], skip: torch.Tensor | None, on_host: bool) -> None:
        """Count one step of these parameters, none where `skip`, a bool [] on the device, is true.

        on_host: the numbers are on the CPU, and not as a device's.
        """
        at = self._at(positions)
        if on_host:
            index = at if isinstance(at, slice) else at.numpy()
            # Not kept: sharing a tensor with another process moves the vector's memory, and frees it.
            shown, counted = self._vectors["step"].numpy(), self._exact.numpy()
            before, self._common = self._common, None
            if before is not None and before[0] is positions and (shown[index] == np.float32(before[1])).all():
                counted[index] = shown[index] = before[1] + 1
                self._common = positions, before[1] + 1
            else:
                counts = _counted(counted[index], shown[index], np.where) + 1
                counted[index] = shown[index] = counts
                if (counts == counts[0]).all():
                    self._common = positions, float(counts[0])
        else:
            self._common = None
            shown_, counted_ = self._vectors["step"], self._exact
            increment = 1.0 if skip is None else 1.0 - skip.double()
            counts = _counted(counted_[at], shown_[at], torch.where) + increment
            counted_[at] = counts
            shown_[at] = counts.float()
        self._show()

    def copies(self, on_host: bool) -> list[Any]:
        """Copies of all numbers, for `restore`."""
        vectors = (*self._vectors.values(), self._exact)
        return [vector.numpy().copy() if on_host else vector.clone() for vector in vectors]

    def restore(self, copies: Sequence[Any], positions: Sequence[int] | None = None) -> None:
        """Set numbers, of all parameters or of these, to what they were."""
        self._common = None
        at = slice(None) if positions is None else list(positions)
        for vector, before in zip((*self._vectors.values(), self._exact), copies, strict=True):
            before = torch.from_numpy(before) if isinstance(before, np.ndarray) else before
            vector[at] = before[at]
        self._show()

    def multiply(self, name: str, positions: Sequence[int], factors: torch.Tensor, skip: torch.Tensor | None) -> None:
        """Multiply these parameters' numbers by factors, fp64 [positions], in fp32."""
        at = self._at(positions)
        factors = factors.float() if skip is None else torch.where(skip, 1.0, factors.float())
        self._vectors[name][at] = self._vectors[name][at] * factors
        self._show()

    def _show(self) -> None:
        for name, position, tensor in self._elsewhere:
            tensor.copy_(self._vectors[name][position].view(tensor.shape))

    def _at(self, positions: Sequence[int]) -> torch.Tensor | slice:
        known = self._of_lists.get(id(positions))
        if known is not None:
            return known[1]
        key = tuple(positions)
        at = self._places.get(key)
        if at is None:
            is_run = key == tuple(range(key[0], key[0] + len(key)))
            at = slice(key[0], key[0] + len(key)) if is_run else _index(key, self.device)
            self._places.put(key, at, len(key))
        if len(self._of_lists) >= MAX_LISTS:
            self._of_lists.clear()
        self._of_lists[id(positions)] = (positions, at)
        return at


def _index(positions: Sequence[int], device: torch.device) -> torch.Tensor:
    return torch.tensor(positions, dtype=torch.int64, device=device)


def _number(value: Any, device: torch.device) -> torch.Tensor:
    """A number out of a state, fp64 []."""
    if isinstance(value, torch.Tensor):
        return value.detach().reshape(()).to(device, torch.float64)
    # `torch.tensor` under FakeTensorMode keeps the number, and a deepcopy then breaks torch 2.13's heap.
    return torch.full((), float(value), dtype=torch.float64, device=device)


def _can_stay(value: Any) -> bool:
    """Whether a tensor can be laid over a vector, or be copied to: whoever holds it sees it count on."""
    if type(value) is not torch.Tensor or value.layout is not torch.strided or value.numel() != 1:
        return False
    return not (value.requires_grad or value.is_inference() or value.is_neg() or is_zero_tensor(value))


def _counted(counted: Array | Any, shown: Any, where: Callable[..., Any]) -> Any:
    """Steps so far, fp64: the exact count, or what somebody wrote in its place."""
    narrow = counted.astype(np.float32) if isinstance(counted, np.ndarray) else counted.float()
    return where(narrow == shown, counted, shown)
