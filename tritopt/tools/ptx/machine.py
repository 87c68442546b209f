"""The machine: runs each instruction of a kernel once, for all threads of many programs, as NumPy operations.

Threads of a warp that branch apart come together again because the block that runs next is always the first, in the
text, at which threads stand: a loop before what follows it. Programs share nothing but global memory, so many run at
once; between two barriers the warps of a program run in lockstep, or one after the other (`Options.warp_seed`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np

from tritopt.tools.ptx.access import decode_access, decode_matrices
from tritopt.tools.ptx.arithmetic import decode_arithmetic
from tritopt.tools.ptx.conversions import decode_conversion, decode_move
from tritopt.tools.ptx.floats import Array
from tritopt.tools.ptx.memory import Fault, Memory
from tritopt.tools.ptx.operands import Execute
from tritopt.tools.ptx.program import Instruction, Program
from tritopt.tools.ptx.threads import DONE, Options, Selection, Threads, among, dtype_of
from tritopt.tools.ptx.warps import decode_reduction, decode_shuffle

_OPTIONS = Options()
BATCH = 16384
"""Threads that run together: enough to hide Python's time, few enough for the caches."""
_DECODE = {
    "cvt": decode_conversion,
    "mov": decode_move,
    "cvta": decode_move,
    "ld": decode_access,
    "st": decode_access,
    "shfl": decode_shuffle,
    "redux": decode_reduction,
    "ldmatrix": decode_matrices,
    "stmatrix": decode_matrices,
}


Step: TypeAlias = tuple[Instruction, Execute]


class Machine:
    """Runs one kernel.

    Args:
        program: the kernel.
        shared: bytes of shared memory of each program.

    NotImplementedError, with its text, for an instruction that is not known.
    """

    def __init__(self, program: Program, shared: int = 0) -> None:
        self.program = program
        self._shared = shared
        _steps(self, False)

    def launch(
        self, arguments: Sequence[Any], grid: Sequence[int], memory: Memory, options: Options = _OPTIONS
    ) -> None:
        """Run all programs of a grid. Fault at the first mistake.

        Args:
            arguments: numbers, addresses among them, in the order of the kernel's parameters.
            grid: number of programs along x, y, z.
            memory: memory that the kernel may touch.
            options: options of the launch.
        """
        typed = zip(self.program.parameters, arguments, strict=True)
        parameters = {name: _parameter(value, dtype_of(kind)) for (name, kind), value in typed}
        numbers = np.arange(int(np.prod(grid)))
        numbers = numbers if options.order is None else options.order(numbers)
        n = max(1, BATCH // self.program.n_threads)
        with np.errstate(all="ignore"):
            for first in range(0, len(numbers), n):
                batch = numbers[first : first + n]
                threads = Threads(self.program, parameters, batch, grid, self._shared, memory, options)
                try:
                    self._run(threads, options)
                except Fault as fault:
                    raise fault.locate(self.program.name, threads.instruction, self.program.n_threads) from None
        memory.check_races(self.program.name, self.program.n_threads)

    def _run(self, threads: Threads, options: Options) -> None:
        steps, turns = _steps(self, options.inexact), _turns(threads, options.warp_seed)
        while True:
            for turn in next(turns):
                while (selection := _next(threads, turn)) is not None:
                    self._run_block(steps, threads, selection)
            if not threads.is_waiting.any():
                return
            is_missing = ~threads.is_waiting.reshape(threads.n_programs, -1)
            missing = is_missing & ~is_missing.all(1, keepdims=True)
            if missing.any():
                threads.instruction = steps[int(threads.at[threads.is_waiting][0]) - 1][-1][0]
                raise Fault("a barrier that this thread never reaches", threads.id[int(missing.argmax())])
            threads.is_waiting[:] = False
            threads.shared.pass_barrier()

    def _run_block(self, steps: list[list[Step]], threads: Threads, selection: Selection) -> None:
        block = int(threads.at[selection][0])
        threads.at[selection] = block + 1 if block + 1 < len(steps) else DONE
        for instruction, execute in steps[block]:
            threads.instruction = instruction
            active: Selection | None = selection
            if instruction.guard is not None:
                threads.check_defined([instruction.guard], selection, "predicate")
                holds = threads.registers[instruction.guard][selection]
                active = among(~holds if instruction.is_negated else holds, selection)
            if active is not None:
                execute(threads, active)

    def decode(self, inexact: bool) -> list[list[Step]]:
        """Instructions of each block, with what executes them. inexact: as `Options` has it."""
        if inexact:
            return [
                [(said, self._execute(said, True) if said.is_approximate else execute) for said, execute in block]
                for block in _steps(self, False)
            ]
        return [[(said, self._execute(said, False)) for said in block] for block in self.program.blocks]

    def _execute(self, instruction: Instruction, inexact: bool) -> Execute:
        try:
            execute = self._control(instruction) or decode_arithmetic(instruction, self.program, inexact)
            if execute is None and instruction.name in _DECODE:
                execute = _DECODE[instruction.name](instruction, self.program)
        except (KeyError, ValueError, IndexError) as error:
            raise NotImplementedError(f"{self.program.name}: the machine does not know `{instruction}`") from error
        if execute is None:
            raise NotImplementedError(f"{self.program.name}: the machine does not know `{instruction}`")
        return execute

    def _control(self, instruction: Instruction) -> Execute | None:
        if instruction.name in ("bra", "ret", "exit"):
            return _jump(self.program.labels[instruction.operands[0]] if instruction.name == "bra" else DONE)
        if instruction.opcode == "bar.warp.sync":
            return _wait_for_warp
        if instruction.opcode in ("bar.sync", "barrier.sync") and instruction.operands == ("0",):
            return _wait
        return None


@lru_cache(maxsize=64)
def _steps(machine: Machine, inexact: bool) -> list[list[Step]]:
    """`Machine.decode` of those that ran last: a decoded kernel is tens of thousands of objects."""
    return machine.decode(inexact)


def _jump(block: int) -> Execute:
    def execute(threads: Threads, selection: Selection) -> None:
        threads.at[selection] = block

    return execute


def _wait_for_warp(threads: Threads, selection: Selection) -> None:
    threads.warps(selection, "a barrier")


def _wait(threads: Threads, selection: Selection) -> None:
    _wait_for_warp(threads, selection)
    threads.is_waiting[selection] = True


def _parameter(value: Any, dtype: np.dtype[Any]) -> Array:
    if dtype.kind == "f":
        return np.array([value], dtype).view(f"u{dtype.itemsize}")
    return np.array([int(value) % 256**dtype.itemsize], f"u{dtype.itemsize}")


def _turns(threads: Threads, seed: int | None) -> Iterator[list[Array | None]]:
    """Groups of threads that run up to a barrier, one group after the other; None: all threads."""
    if seed is None:
        while True:
            yield [None]
    random = np.random.default_rng(seed)
    while True:
        yield [threads.warp == warp for warp in random.permutation(int(threads.warp.max()) + 1)]


def _next(threads: Threads, turn: Array | None) -> Selection | None:
    """Threads of the first block at which some stand; None if all wait or have returned."""
    at = np.where(threads.is_waiting, DONE, threads.at)
    at = at if turn is None else np.where(turn, at, DONE)
    block = at.min()
    return None if block == DONE else among(at == block, slice(0, threads.n))
