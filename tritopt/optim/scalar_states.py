"""What an optimizer keeps per parameter as a single number: the step, and for NAdam a product."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from tritopt.group import Array

CPU = torch.device("cpu")
MAX_LISTS = 64
_ONE = np.float32(1)


class ScalarStates:
    """One fp32 vector per name over all parameters; `state[p][name]` is a 0-d view of it, where torch has 0-d tensors.

    So a step advances all of them at once, and checkpoints look like torch's. A number that was replaced (loaded,
    unpickled, assigned) is noticed and taken up. The vectors move to a device when a step needs them there.

    Args:
        initial: the value of each name before the first step.
    """

    def __init__(self, initial: Mapping[str, float]) -> None:
        self.initial = dict(initial)
        self.device = CPU
        self._vectors: dict[str, torch.Tensor] = {}
        self._arrays: dict[str, Array] = {}
        """The same memory, on the CPU: NumPy takes a fifth of what torch's dispatcher does."""
        self._views: list[dict[str, torch.Tensor]] = []
        self._taken: set[int] = set()
        self._places: dict[tuple[int, ...], torch.Tensor | slice] = {}
        self._shared: tuple[Sequence[int], list[bytes], list[float]] | None = None
        """What `shared` found last, and of which numbers."""
        self._of_lists: dict[int, tuple[Sequence[int], torch.Tensor | slice]] = {}
        """By `id` of lists, which are kept and must not change."""

    def bind(self, states: Sequence[dict[str, Any]], device: torch.device) -> None:
        """Make the numbers of all states (empty ones have none yet) views of vectors on `device`."""
        is_bound = len(self._views) == len(states) and self.device == device
        if is_bound and all(
            all(state.get(name) is view for name, view in views.items()) if state else position not in self._taken
            for position, (state, views) in enumerate(zip(states, self._views, strict=True))
        ):
            return
        self.device = device
        self._places.clear()
        self._of_lists.clear()
        self._shared = None
        for name, initial in self.initial.items():
            values = [torch.as_tensor(state.get(name, initial)).detach().reshape(()) for state in states]
            self._vectors[name] = torch.stack([value.to(device, torch.float32) for value in values])
        self._arrays.clear()
        self._views = [{name: vector[i] for name, vector in self._vectors.items()} for i in range(len(states))]
        self._taken = {position for position, state in enumerate(states) if state}
        for position in self._taken:
            states[position].update(self._views[position])

    def views(self, position: int) -> dict[str, torch.Tensor]:
        """The numbers of a parameter that gets its first gradient."""
        self._taken.add(position)
        return self._views[position]

    def get(self, name: str, positions: Sequence[int]) -> torch.Tensor:
        """These parameters' numbers, fp64 [positions]."""
        return self._vectors[name][self._at(positions)].double()

    def shared(self, positions: Sequence[int]) -> list[float] | None:
        """The numbers of these parameters, where all have the same; on the CPU."""
        # Not their versions: what writes to `.data` has others.
        numbers = self._bytes()
        if self._shared is not None and self._shared[0] is positions and self._shared[1] == numbers:
            return self._shared[2]
        at, found = self._at(positions), []
        for values in self._on_host().values():
            some = values[at] if isinstance(at, slice) else values[at.numpy()]
            if not (some == some[0]).all():
                return None
            found.append(float(some[0]))
        self._shared = (positions, numbers, found)
        return found

    def advance(self, positions: Sequence[int], skip: torch.Tensor | None, on_host: bool) -> None:
        """Count one step of these parameters, none where `skip`, a bool [] on the device, is true.

        on_host: the numbers are on the CPU, and not as a device's.
        """
        vector, at = self._vectors["step"], self._at(positions)
        if on_host:
            known = self._shared
            is_known = known is not None and known[0] is positions and known[1] == self._bytes()
            self._on_host()["step"][at if isinstance(at, slice) else at.numpy()] += _ONE
            self._shared = None
            if known is not None and is_known:
                count, *others = known[2]
                found = [float(np.float32(count) + _ONE), *others]
                self._shared = (positions, self._bytes(), found)
            return
        self._shared = None
        increment = 1.0 if skip is None else 1.0 - skip.float()
        if isinstance(at, slice):
            vector[at] += increment
        else:
            vector.index_add_(0, at, torch.ones(len(positions), device=self.device) * increment)

    def copies(self, on_host: bool) -> list[Any]:
        """Of all numbers, for `restore`."""
        if on_host:
            return [values.copy() for values in self._on_host().values()]
        return [vector.clone() for vector in self._vectors.values()]

    def restore(self, copies: Sequence[Any]) -> None:
        """As they were."""
        self._shared = None
        for vector, before in zip(self._vectors.values(), copies, strict=True):
            vector.copy_(torch.as_tensor(before))

    def multiply(self, name: str, positions: Sequence[int], factors: torch.Tensor, skip: torch.Tensor | None) -> None:
        """Multiply these parameters' numbers by factors, fp64 [positions], in fp32."""
        self._shared = None
        at = self._at(positions)
        factors = factors.float() if skip is None else torch.where(skip, 1.0, factors.float())
        self._vectors[name][at] = self._vectors[name][at] * factors

    def _bytes(self) -> list[bytes]:
        return [values.tobytes() for values in self._on_host().values()]

    def _on_host(self) -> dict[str, Array]:
        if not self._arrays:
            self._arrays = {name: vector.numpy() for name, vector in self._vectors.items()}
        return self._arrays

    def _at(self, positions: Sequence[int]) -> torch.Tensor | slice:
        known = self._of_lists.get(id(positions))
        if known is not None:
            return known[1]
        key = tuple(positions)
        if key not in self._places:
            is_run = key == tuple(range(key[0], key[0] + len(key)))
            self._places[key] = slice(key[0], key[0] + len(key)) if is_run else torch.tensor(key, device=self.device)
        if len(self._of_lists) >= MAX_LISTS:
            self._of_lists.clear()
        self._of_lists[id(positions)] = (positions, self._places[key])
        return self._places[key]
