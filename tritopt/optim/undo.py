"""What a step has changed before its kernels run, to be taken back where it fails."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tritopt.launch import launches
from tritopt.optim.members import Member
from tritopt.optim.scalar_states import ScalarStates
from tritopt.optim.states import Replaced, put_back

if TYPE_CHECKING:
    from tritopt.optim.optimizer import Optimizer


class Undo:
    """States and numbers as they were before a step; calling it puts back those of parameters that were not updated.

    Args:
        opt: the optimizer.
        numbers: those of its parameters.
    """

    def __init__(self, opt: Optimizer, numbers: ScalarStates) -> None:
        self.replaced: Replaced = []
        """States that the step has completed; none any more once it updates, since a complete one says the same."""
        self._opt = opt
        self._numbers = numbers
        self._before: list[Any] | None = None
        """Copies of all numbers; None before any could change."""
        self._positions: Sequence[int] = ()
        """Positions of the parameters whose numbers the step changes."""
        self._updated: list[Iterable[Member]] = []
        """Members whose update has begun."""

    def remember(self, positions: Sequence[int], on_host: bool) -> None:
        """Note the numbers of these parameters, before they change."""
        self._before, self._positions = self._numbers.copies(on_host), positions

    @contextmanager
    def but_for(self, members: Iterable[Member], written: Callable[[], Any]) -> Iterator[None]:
        """Around an update of members, which stay as they are from then on; unless it fails before it writes.

        written: another value once something was written.
        """
        before = written()
        is_done = False
        try:
            yield
            is_done = True
        finally:
            if is_done or written() != before:
                self._updated.append(members)

    def __call__(self) -> None:
        """Put back."""
        put_back(self._opt, self.replaced)
        if self._before is not None:
            updated = {member.position for members in self._updated for member in members}
            self._numbers.restore(self._before, sorted(set(self._positions) - updated))


def n_launches() -> int:
    """Launches that this thread has begun: what `Undo.but_for` asks about kernels."""
    return launches.n_begun
