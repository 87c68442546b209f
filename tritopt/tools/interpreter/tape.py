"""Tapes: what the programs of a kernel do, kept as NumPy's operations in a row, which later programs repeat.

Programs of a kernel do the same operations on values of the same types and shapes, until its Python code looks at a
value: whether a loop has ended, say. So a tape is a tree, whose branches are the values that were seen. A program that
comes to a value which none before it had is run by the interpreter from its start: it is handed what the operations up
to there have given, and nothing is loaded or stored twice.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from operator import itemgetter
from types import CodeType
from typing import Any, NamedTuple

_PRINTS = {"print", "static_print"}


class Operation(NamedTuple):
    """One call of a function of NumPy's arrays."""

    function: Callable[..., Any]
    given: Callable[[list[Any]], Sequence[Any]]
    """Takes its arguments from the registers."""
    output: int
    """Register of what it returns."""
    n_before: int
    """Number of events of its branch that come before it."""


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
        self.n_events = 0
        """Number of events of all branches."""
        self._depends_on: dict[tuple[int, int], list[Dependency]] = {}
        self.is_usable = True

    @property
    def is_current(self) -> bool:
        """Whether the kernel, and all that it calls, are what they were."""
        return all(names.get(name) is value for several in self._depends_on.values() for names, name, value in several)

    def give_up(self) -> None:
        """Let the interpreter run every program from now on."""
        self.is_usable, self.first = False, None
        self.registers, self.constants = [], set()

    def enter(self, function: Any, jit_function: Any = None) -> bool:
        """Note that a program calls a function. Returns whether that can be replayed.

        Args:
            function: what the interpreter has made of it.
            jit_function: the one that a kernel calls; None: it is the kernel.
        """
        key = id(function), id(jit_function)
        if key not in self._depends_on:
            depends_on = _dependencies(function)
            if depends_on is None:
                return False
            if jit_function is not None:
                depends_on.append(Dependency(jit_function.rewritten_fn, jit_function.fn, function))
            self._depends_on[key] = depends_on
        return True

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
    n_events: int | None = None
    """Number of events of the last branch before the one that raised an error; None: none did."""


def getter(places: Sequence[int]) -> Callable[[list[Any]], Sequence[Any]]:
    """Return what takes the values of these registers, in half the time of a comprehension."""
    first = min(places, default=0)
    return itemgetter(*places) if len(places) > 1 else itemgetter(slice(first, first + len(places)))


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
        try:
            for operation in branch.operations:
                function, given, output, _ = operation
                registers[output] = function(*given(registers))
        except Exception:  # which the interpreter words, and says where in the kernel
            return Replay(path, registers, is_done=False, n_events=operation.n_before)
        if branch.looked_at is None:
            return Replay(path, registers, is_done=True)
        register, seen = branch.looked_at
        after = branch.after.get(seen(registers[register]))
        if after is None:
            return Replay(path, registers, is_done=False)
        branch = after
        path.append(branch)


def _dependencies(function: Any) -> list[Dependency] | None:
    """Return the global names that a function reads, itself or in Python's functions; None: it prints, or is nested.

    Triton's own are taken to stay: who replaces them asks for `live`. Items and attributes that change in place are
    not seen.
    """
    depends_on: list[Dependency] = []
    functions, known = [function], set[int]()
    while functions:
        function = inspect.unwrap(functions.pop())
        if id(function) in known or is_of_triton(function.__module__):
            continue
        known.add(id(function))
        used = _names(function.__code__)
        if used & _PRINTS or function.__closure__:
            return None
        spaces, walked = [function.__globals__], set[int]()
        while spaces:
            names = spaces.pop()
            walked.add(id(names))
            for name in used:
                value = names.get(name)
                depends_on.append(Dependency(names, name, value))
                if inspect.ismodule(value):
                    if not is_of_triton(value.__name__) and id(vars(value)) not in walked:
                        spaces.append(vars(value))
                elif not hasattr(value, "rewritten_fn"):  # A jit function is entered when it is called.
                    functions += filter(inspect.isfunction, (value, getattr(value, "fn", None)))
    return depends_on


def _names(code: CodeType) -> set[str]:
    """Return the names of globals and of attributes in a function's code, and in what is defined in it."""
    nested = (_names(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return {*code.co_names}.union(*nested)


def is_of_triton(module: str | None) -> bool:
    """Whether a module is one of Triton's."""
    return (module or "").partition(".")[0] == "triton"
