"""What an optimizer keeps per parameter as a single number: the step, and for NAdam a product."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

CPU = torch.device("cpu")


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
        self._views: list[dict[str, torch.Tensor]] = []
        self._taken: set[int] = set()
        self._places: dict[tuple[int, ...], torch.Tensor | slice] = {}

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
        for name, initial in self.initial.items():
            values = [torch.as_tensor(state.get(name, initial)).detach().reshape(()) for state in states]
            self._vectors[name] = torch.stack([value.to(device, torch.float32) for value in values])
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

    def advance(self, positions: Sequence[int], skip: torch.Tensor | None) -> None:
        """Count one step of these parameters, none where `skip`, a bool [] on the device, is true."""
        increment = 1.0 if skip is None else 1.0 - skip.float()
        vector, at = self._vectors["step"], self._at(positions)
        if isinstance(at, slice):
            vector[at] += increment
        else:
            vector.index_add_(0, at, torch.ones(len(positions), device=self.device) * increment)

    @contextmanager
    def restored_on_error(self) -> Iterator[None]:
        """Put all numbers back if the body raises."""
        before = {name: vector.clone() for name, vector in self._vectors.items()}
        try:
            yield
        except BaseException:
            for name, vector in before.items():
                self._vectors[name].copy_(vector)
            raise

    def multiply(self, name: str, positions: Sequence[int], factors: torch.Tensor, skip: torch.Tensor | None) -> None:
        """Multiply these parameters' numbers by factors, fp64 [positions], in fp32."""
        at = self._at(positions)
        factors = factors.float() if skip is None else torch.where(skip, 1.0, factors.float())
        self._vectors[name][at] = self._vectors[name][at] * factors

    def _at(self, positions: Sequence[int]) -> torch.Tensor | slice:
        key = tuple(positions)
        if key not in self._places:
            is_run = key == tuple(range(key[0], key[0] + len(key)))
            self._places[key] = slice(key[0], key[0] + len(key)) if is_run else torch.tensor(key, device=self.device)
        return self._places[key]
