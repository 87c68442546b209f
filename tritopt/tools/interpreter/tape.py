"""Tapes: what the programs of a kernel do, kept as NumPy's operations in a row, which later programs repeat.

Programs of a kernel do the same operations on values of the same types and shapes, until its Python code looks at a
value: whether a loop has ended, say. So a tape is a tree, whose branches are the values that were seen. A program that
comes to a value which none before it had is run by the interpreter from its start: it is handed what the operations up
to there have given, and nothing is loaded or stored twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple


class Operation(NamedTuple):
    """One call of a function of NumPy's arrays."""

    function: Callable[..., Any]
    inputs: tuple[int, ...]
    """Registers of its arguments."""
    output: int
    """Register of what it returns."""


class Event(NamedTuple):
    """One thing that the interpreter came to: a program that is run once more comes to the same, in the same order."""

    name: str
    register: int | None
    """Register of the result; None: there is none."""
    dtype: Any
    """Triton's type of the result."""


class Branch:
    """Operations up to where Python looks at a value, or to the end."""

    def __init__(self) -> None:
        self.operations: list[Operation] = []
        self.events: list[Event] = []
        self.looked_at: tuple[int, Callable[[Any], Any]] | None = None
        """Register that Python looks at, and what it sees of an array; None: the program ends."""
        self.after: dict[Any, Branch] = {}
        """Branches that come then, by the value that is seen."""


class Dependency(NamedTuple):
    """A name that must mean what it meant when the tape was recorded."""

    names: dict[Any, Any]
    name: Any
    value: Any


class Tape:
    """All programs of a kernel with the same compile-time arguments and types.

    Args:
        n_inputs: number of arguments, which are the first registers.
    """

    def __init__(self, n_inputs: int) -> None:
        self.first: Branch | None = None
        self.registers: list[Any] = [None] * n_inputs
        """Values of all registers at a program's start."""
        self.constants: set[int] = set()
        """Registers whose values are the same in every program."""
        self._depends_on: dict[int, list[Dependency]] = {}
        self.is_usable = True

    @property
    def is_current(self) -> bool:
        """Whether the kernel, and all that it calls, are what they were."""
        return all(names.get(name) is value for several in self._depends_on.values() for names, name, value in several)

    def enter(self, function: Any, jit_function: Any = None) -> None:
        """Note that a program calls a function.

        Args:
            function: what the interpreter has made of it.
            jit_function: the one that a kernel calls; None: it is the kernel.
        """
        if id(function) in self._depends_on:
            return
        names = function.__globals__
        needed = [name for name in function.__code__.co_names if hasattr(names.get(name), "rewritten_fn")]
        depends_on = [Dependency(names, name, names[name]) for name in needed]
        if jit_function is not None:
            depends_on.append(Dependency(jit_function.rewritten_fn, jit_function.fn, function))
        self._depends_on[id(function)] = depends_on

    def new_register(self, constant: Any = None) -> int:
        """Return the number of a register that no branch has. constant: its array, in every program."""
        if constant is not None:
            self.constants.add(len(self.registers))
        self.registers.append(constant)
        return len(self.registers) - 1


class Replay(NamedTuple):
    """Stretch that a program came without the interpreter."""

    path: list[Branch]
    registers: list[Any]
    is_done: bool


def replay(tape: Tape, inputs: Sequence[Any]) -> Replay:
    """Run a program on these arrays, to its end or to a value that is new."""
    if tape.first is None:
        tape.first = Branch()
        return Replay([tape.first], [], is_done=False)
    registers = tape.registers.copy()
    registers[: len(inputs)] = inputs
    branch = tape.first
    path = [branch]
    while True:
        for function, places, output in branch.operations:
            registers[output] = function(*[registers[place] for place in places])
        if branch.looked_at is None:
            return Replay(path, registers, is_done=True)
        register, seen = branch.looked_at
        after = branch.after.get(seen(registers[register]))
        if after is None:
            return Replay(path, registers, is_done=False)
        branch = after
        path.append(branch)
