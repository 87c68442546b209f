"""The recorder: it listens to one program that the interpreter runs, and writes its tape."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from tritopt.tools.interpreter.operations import STORES, Call, function_of, is_impure, is_live_only
from tritopt.tools.interpreter.tape import Branch, Event, Operation, Replay, Tape, getter

if TYPE_CHECKING:
    from tritopt.tools.interpreter.private import InterpreterParts

MOST_EVENTS = 20_000
"""Length of a tape beyond which its kernel is not recorded: it would take more than it saves."""


class Recorder:
    """Listener to a program.

    Args:
        tape: gets what is new in the program.
        inputs: what holds its arguments.
        replay: how far the program came from the tape.
        parts: of the interpreter.
    """

    def __init__(self, tape: Tape, inputs: list[Any], replay: Replay, parts: InterpreterParts) -> None:
        self.last_operation: tuple[Any, tuple[Any, ...], Any] | None = None
        """NumPy's function, operands and result of the call that is under way."""
        self.is_busy = False
        """Whether an operation is under way; those that it calls are not recorded."""
        *before, last = replay.path
        self.tape, self._parts = tape, parts
        # After an error, a branch that nobody replays.
        self._branch = last if replay.n_events is None else Branch()
        events = [event for branch in before for event in branch.events] + last.events[: replay.n_events]
        self._events: Iterator[Event] | None = iter(events)
        self._registers = replay.registers
        # By identity; the handle as well, so that no other one gets it.
        self._known: dict[int, tuple[Any, int]] = {id(handle): (handle, i) for i, handle in enumerate(inputs)}

    def stop(self) -> None:
        """Give up: what this kernel does cannot be recorded. The program itself goes on."""
        self.tape.give_up()
        recorders.current = None

    def enter(self, function: Any, jit_function: Any = None) -> None:
        """Note that the program calls a function, as `Tape.enter` has it."""
        if not self.tape.enter(function, jit_function):
            self.stop()

    def call(self, method: Callable[..., Any], name: str, builder: Any, args: tuple[Any, ...], named: Any) -> Any:
        """Carry out, and note, one operation of the interpreter. Returns its result."""
        event = self._next(name)
        if event is not None:
            if event.register is None:
                return None if name in STORES else method(builder, *args, **named)
            result = self._parts.handle(self._registers[event.register], event.dtype)
            self._known[id(result)] = result, event.register
            return result
        self.last_operation = None
        result = method(builder, *args, **named)
        is_handle = type(result) is self._parts.handle
        inputs = self._inputs(args)
        if inputs is None or named or is_live_only(name) or not (is_handle or result is None):
            self.stop()
        elif is_handle or name in STORES:
            self._append(Call(name, method, builder, args, result), inputs)
        else:
            self._note(Event(name, None, None))
        return result

    def constant(self, handle: Any) -> None:
        """Note what was made of a number of Python's."""
        event = self._next("constant")
        if event is None:
            event = Event("constant", self.tape.new_register(handle.data), handle.dtype)
            self._note(event)
        assert event.register is not None
        self._known[id(handle)] = handle, event.register

    def reduced(self, function: Callable[[Any], Any], operand: Any, result: Any) -> None:
        """Note a reduction. function: gives the result's array for that of the operand; both are handles here."""
        event = self._next("reduced")
        if event is None:
            known = self._known.get(id(operand))
            if known is None:
                self.stop()
                return
            event = Event("reduced", self.tape.new_register(), result.dtype)
            assert event.register is not None
            n_before = len(self._branch.events)
            self._branch.operations.append(Operation(function, getter([known[1]]), event.register, n_before))
            self._note(event)
        assert event.register is not None
        self._known[id(result)] = result, event.register

    def looked(self, handle: Any, value: Any, seen: Callable[[Any], Any]) -> None:
        """Note that Python looks at a value. seen: gives what it sees of an array."""
        known = self._known.get(id(handle))
        if known is None:
            self.stop()
            return
        register = known[1]
        if register in self.tape.constants or self._next("looked") is not None:
            return
        if self._branch.looked_at is None:
            self._branch.looked_at = register, seen
        elif self._branch.looked_at[0] != register:  # Python code that is not the same each time
            self.stop()
            return
        self._branch.after[value] = after = Branch()
        self._branch = after
        # The first of what comes after it.
        self._note(Event("looked", None, None))

    def _next(self, name: str) -> Event | None:
        """Return what the tape has next; None: the program is past its end."""
        if self._events is None:
            return None
        event = next(self._events, None)
        if event is None:
            self._events = None
        elif event.name != name:
            raise RuntimeError(
                f"the kernel came to {name} where it had come to {event.name}: its Python code is not the same each "
                "time; launch it within tritopt.tools.interpreter.live()"
            )
        return event

    def _inputs(self, args: tuple[Any, ...]) -> list[int] | None:
        """Return registers of the operands; None: one of them was made otherwise."""
        registers, handle = [], self._parts.handle
        for arg in args:
            kind = type(arg)
            if kind is handle:
                known = self._known.get(id(arg))
                if known is None:
                    return None
                registers.append(known[1])
            elif (kind is list or kind is tuple) and any(type(one) is handle for one in arg):
                return None
        return registers

    def _append(self, call: Call, inputs: list[int]) -> None:
        name, result = call.name, call.result
        tape, branch = self.tape, self._branch
        if not is_impure(name) and tape.constants.issuperset(inputs):
            register = tape.new_register(result.data)
        else:
            register = tape.new_register()
            function = function_of(call, self.last_operation, self._parts)
            branch.operations.append(Operation(function, getter(inputs), register, len(branch.events)))
        if result is None:
            self._note(Event(name, None, None))
        else:
            self._known[id(result)] = result, register
            self._note(Event(name, register, result.dtype))

    def _note(self, event: Event) -> None:
        self._branch.events.append(event)
        self.tape.n_events += 1
        if self.tape.n_events > MOST_EVENTS:
            self.stop()


class _Recorders(threading.local):
    """Recorder of each thread, while one records."""

    current: Recorder | None = None


recorders = _Recorders()
