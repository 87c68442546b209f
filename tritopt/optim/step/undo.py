"""Changes of a step before its kernels run, to be taken back where it fails."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tritopt.engine.launcher import Updates
from tritopt.optim.step.counts import ScalarStates
from tritopt.optim.step.members import Member
from tritopt.optim.step.owner import Owner
from tritopt.optim.step.states import Replaced, put_back


class Undo:
    """States and numbers as they were before a step; calling it puts back those of parameters that were not updated.

    Args:
        opt: the optimizer.
        scalar_states: scalar states of its parameters.
    """

    def __init__(self, opt: Owner, scalar_states: ScalarStates) -> None:
        self.replaced: Replaced = []
        """States that the step has completed; none any more once it updates, since a complete one says the same."""
        self._opt = opt
        self._scalar_states = scalar_states
        self._before: list[Any] | None = None
        """Copies of all numbers; None before any could change."""
        self._positions: Sequence[int] = ()
        """Positions of the parameters whose numbers the step changes."""
        self.updates: Updates[Member] = Updates()

    def remember(self, positions: Sequence[int], on_host: bool) -> None:
        """Note the numbers of these parameters, before they change."""
        self._before, self._positions = self._scalar_states.copies(on_host), positions

    def __call__(self) -> None:
        """Put back states and numbers of parameters that were not updated."""
        put_back(self._opt, self.replaced)
        if self._before is not None:
            updated = {member.position for member in self.updates.written()}
            self._scalar_states.restore(self._before, sorted(set(self._positions) - updated))
