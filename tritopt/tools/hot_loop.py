"""The loops of a compiled kernel in which a thread spends its time: what one iteration executes, and what it moves.

Read off the assembly, NVIDIA's SASS or AMD's GCN. A hot loop is an innermost one with 128-bit accesses to global
memory, which only full blocks get. What counts is its shortest path: a branch for one rare case (a root of a denormal
number, a tensor that was split by columns) does not, nor does what it calls. Lanes are taken to be active.
"""

from __future__ import annotations

import heapq
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

WIDE = 128
"""Bits of the widest access that every GPU has."""
_CALL_COST = 10**6  # any way around a call is shorter


class Instruction(NamedTuple):
    """One line of assembly."""

    name: str
    """Mnemonic with its modifiers, such as LDG.E.128."""
    label: str = ""
    """Label that it may branch to; empty: it does not branch."""
    falls_through: bool = True
    """Whether the next instruction may follow."""
    calls: bool = False
    pipe: str = ""
    """Pipe that has fewer lanes than are issued: "ALU" or "XU"; empty: it has one of full width, or none."""
    is_arithmetic: bool = True
    """Whether it neither accesses memory nor branches."""
    access: tuple[str, int] | None = None
    """Access to global memory: "load" or "store", and bits a thread; None: it makes none."""
    fills: frozenset[int] = frozenset()
    """Numbers of the registers that a load from global memory fills."""
    uses: frozenset[int] = frozenset()
    """Numbers of the registers that it reads or writes, but for those."""
    leaves: int | None = None
    """Number of loads that may be under way when it is done (AMD's s_waitcnt); None: it waits for what it uses."""


class Code(NamedTuple):
    """Assembly of a kernel."""

    instructions: Sequence[Instruction]
    labels: dict[str, int]
    """Position of the instruction behind each label."""


@dataclass(frozen=True)
class HotLoop:
    """One iteration, as written in the source: of an unrolled loop, the share of one."""

    instructions: float
    """Number of instructions that a thread executes."""
    arithmetic: float
    """Number of those that neither access memory nor branch; on AMD, which issues others beside, of vector ones."""
    loads: Counter[int]
    """Number of loads from global memory by their width in bits."""
    stores: Counter[int]
    """Number of stores to global memory by their width in bits."""
    waits: float
    """Number of times that a thread waits for loads issued since it last waited: 1 if all are issued first."""
    alu: float
    """Number of instructions for the pipe of integers, comparisons and choices; on AMD that is the vector unit's: 0."""
    xu: float
    """Number of instructions for the pipe of roots, inverses and conversions."""


_SASS_LINE = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?P<predicate>@!?U?P\w+\s+)?(?P<name>[A-Z][\w.]*)(?P<rest>[^;]*);")
_SASS_REGISTER = re.compile(r"\bR(\d+)(\.64)?")
_SASS_LABEL = re.compile(r"^(\.L_x_\d+):")
_SASS_WIDTHS = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}
# Memory, synchronisation and control.
_SASS_OTHER = re.compile(
    r"(LD|ST|LDG|STG|LDS|STS|LDSM|STSM|LDL|STL|U?LDC|LDCU|RED|ATOM[GS]?|CCTL|MEMBAR|ERRBAR|(LDG)?DEPBAR|BAR|SYNCS)|"
    r"(BRA|BRX|JMP|CALL|RET|EXIT|BSSY|BSYNC|BREAK|BMOV|WARPSYNC|YIELD|NANOSLEEP|NOP)"
)

# MOV goes either way; IMAD, FADD, FMUL and FFMA have a pipe of full or of half width each, which never fills first.
_SASS_PIPES = {
    "XU": re.compile(r"MUFU|I2F|F2I|FRND|F2F"),
    "ALU": re.compile(
        r"IADD3|LOP3|SHF|PRMT|F?SEL|FMNMX|V?IMNMX3?|VIADD|VIADDMNMX|[IF]SETP|PLOP3|LEA|I2FP|F2FP|FCHK|IABS|SGXT|P2R|R2P"
    ),
}
_GCN_SPECIAL = re.compile(r"v_(rcp|rsq|sqrt|exp|log|sin|cos)_")


def parse_sass(text: str) -> Code:
    """Parse what `nvdisasm -c` prints."""
    instructions: list[Instruction] = []
    labels = {}
    for line in text.splitlines():
        if match := _SASS_LABEL.match(line):
            labels[match[1]] = len(instructions)
        elif match := _SASS_LINE.match(line):
            name, *modifiers = match["name"].split(".")
            target = re.search(r"\.L_x_\d+", match["rest"]) if name == "BRA" else None
            # A branch has its condition before the name, or for BRA.U as its first operand.
            is_conditional = bool(match["predicate"]) or "," in match["rest"]
            access = None
            if name in ("LDG", "STG"):
                width = next((_SASS_WIDTHS[m] for m in reversed(modifiers) if m in _SASS_WIDTHS), 32)
                access = ("load" if name == "LDG" else "store", width)
            fills, uses = _sass_registers(match["rest"], access)
            instructions.append(
                Instruction(
                    match["name"],
                    label=target[0] if target else "",
                    falls_through=name not in ("BRA", "EXIT", "RET", "BRX", "JMP") or is_conditional,
                    calls=name == "CALL",
                    pipe=next((pipe for pipe, names in _SASS_PIPES.items() if names.fullmatch(name)), ""),
                    is_arithmetic=not _SASS_OTHER.fullmatch(name),
                    access=access,
                    fills=fills,
                    uses=uses,
                )
            )
    return Code(instructions, labels)


def _sass_registers(operands: str, access: tuple[str, int] | None) -> tuple[frozenset[int], frozenset[int]]:
    """Registers that a load fills, and those that an instruction has to do with otherwise."""
    registers = [(int(first), 2 if is_pair else 1) for first, is_pair in _SASS_REGISTER.findall(operands)]
    moved: frozenset[int] = frozenset()
    if access is not None and registers:
        # The data are the first operand of a load, and the last of a store.
        first, _ = registers.pop(0 if access[0] == "load" else -1)
        moved = frozenset(range(first, first + max(1, access[1] // 32)))
    others = frozenset(register for first, n in registers for register in range(first, first + n))
    is_load = access is not None and access[0] == "load"
    return (moved, others) if is_load else (frozenset(), others | moved)


_GCN_LINE = re.compile(r"^\s+(?P<name>[a-z]\w*)(?P<rest>[^;]*)")
_GCN_LABEL = re.compile(r"^(\.LBB\w+):")
_GCN_ACCESS = re.compile(r"(?:global|buffer|flat)_(load|store)_(\w+)")
_GCN_WAIT = re.compile(r"vmcnt\((\d+)\)")
_GCN_WIDTHS = {"byte": 8, "ubyte": 8, "sbyte": 8, "short": 16, "ushort": 16, "sshort": 16, "dword": 32}


def parse_gcn(text: str) -> Code:
    """Parse Triton's "amdgcn", the assembly of AMD's GPUs."""
    instructions: list[Instruction] = []
    labels = {}
    for line in text.splitlines():
        if match := _GCN_LABEL.match(line):
            labels[match[1]] = len(instructions)
        elif line.lstrip().startswith("."):
            continue
        elif match := _GCN_LINE.match(line):
            name = match["name"]
            target = re.search(r"\.LBB\w+", match["rest"]) if name.startswith(("s_branch", "s_cbranch")) else None
            # Lanes are taken to be active, so what skips a block for want of them does not jump.
            is_skip, is_always = name == "s_cbranch_execz", name in ("s_branch", "s_cbranch_execnz")
            access = _GCN_ACCESS.match(name)
            left = _GCN_WAIT.search(match["rest"]) if name == "s_waitcnt" else None
            instructions.append(
                Instruction(
                    name,
                    label=target[0] if target and not is_skip else "",
                    falls_through=not is_always and name not in ("s_endpgm", "s_setpc_b64"),
                    calls=name == "s_swappc_b64",
                    pipe="XU" if _GCN_SPECIAL.match(name) else "",
                    is_arithmetic=name.startswith("v_"),
                    access=(access[1], _gcn_width(access[2])) if access else None,
                    leaves=int(left[1]) if left else None,
                )
            )
    return Code(instructions, labels)


def _gcn_width(kind: str) -> int:
    kind = kind.split("_")[0]
    return 32 * int(kind[-1]) if kind.startswith("dwordx") else _GCN_WIDTHS[kind]


@dataclass(frozen=True)
class _Loop:
    code: Code
    first: int
    last: int

    @cached_property
    def accesses(self) -> Counter[tuple[str, int]]:
        return _accesses(self.code.instructions[self.first : self.last + 1])

    def holds(self, other: _Loop) -> bool:
        return self != other and self.first <= other.first and other.last <= self.last

    @cached_property
    def path(self) -> list[Instruction]:
        """Find the shortest way from the first instruction to a branch back; empty: it is no loop, only a jump back."""
        code = self.code.instructions
        came_from: dict[int, int] = {}
        queue = [(0, self.first, -1)]
        while queue:
            cost, at, before = heapq.heappop(queue)
            if at in came_from:
                continue
            came_from[at] = before
            if self.code.labels.get(code[at].label) == self.first:
                path = []
                while at >= 0:
                    path.append(code[at])
                    at = came_from[at]
                return path[::-1]
            for following in self._after(at):
                heapq.heappush(queue, (cost + (_CALL_COST if code[at].calls else 1), following, at))
        return []

    def _after(self, at: int) -> Iterator[int]:
        instruction = self.code.instructions[at]
        if instruction.falls_through:
            yield at + 1
        target = self.code.labels.get(instruction.label, -1)
        if self.first < target <= self.last:
            yield target


def straight_code(code: Code) -> HotLoop:
    """Describe NVIDIA's code for a kernel without loops, as a thread goes through it whose elements all exist.

    No branch that has a condition is taken: what it skips is the arithmetic of a thread without elements. ValueError if
    there is a loop or a call on that way.
    """
    path: list[Instruction] = []
    at = 0
    while not path or path[-1].falls_through or path[-1].name != "EXIT":
        instruction = code.instructions[at]
        path.append(instruction)
        target = code.labels.get(instruction.label, len(code.instructions))
        if target <= at or instruction.calls:
            raise ValueError("it has a loop or a call, so that the code does not say how much it does")
        at = at + 1 if instruction.falls_through else target
    return _described(path, 1)


def hot_loops(code: Code, wide_loads: int = 0, are_narrow: bool = False) -> list[HotLoop]:
    """Find the hot loops, in the order of the code; none if the kernel has no 128-bit accesses in a loop.

    wide_loads: number of 128-bit loads of one iteration of the source, whose one hot loop is to be unrolled, which may
    leave no such iteration over; 0: unknown. are_narrow: whether loops with 64-bit accesses are hot if none has wider.
    """
    ends: dict[int, int] = {}
    for at, instruction in enumerate(code.instructions):
        target = code.labels.get(instruction.label, len(code.instructions))
        if target <= at:
            ends[target] = max(at, ends.get(target, 0))
    every = [_Loop(code, first, last) for first, last in sorted(ends.items())]
    loops = [loop for loop in every if _is_wide(loop.accesses) and loop.path]
    if are_narrow and not loops:  # bytes of aligned states beside weights that are not
        loops = [loop for loop in every if _is_wide(loop.accesses, WIDE // 2) and loop.path]
    inner = [loop for loop in loops if not any(loop.holds(other) for other in loops)]
    # An unrolled loop leaves iterations over, for straight code around it or for a loop that is not unrolled.
    remainders = [accesses for block in _blocks(code, inner) if _is_wide(accesses := _accesses(block))]
    whole = [loop for loop in inner if all(_ratio(other.accesses, loop.accesses) < 2 for other in inner)]
    remainders += [loop.accesses for loop in inner if loop not in whole]
    described = []
    # The compiler may unroll those that its own unrolling leaves over, too; they stand behind.
    for loop in whole[:1] if wide_loads else whole:
        n_wide = loop.accesses["load", WIDE]
        times = n_wide // wide_loads if wide_loads and n_wide % wide_loads == 0 else 1
        described.append(
            _described(loop.path, max([1, times, *(_ratio(loop.accesses, other) for other in remainders)]))
        )
    return described


def _blocks(code: Code, loops: Sequence[_Loop]) -> Iterator[Sequence[Instruction]]:
    """Yield runs of instructions outside of the loops, up to the next branch or label."""
    ends = {
        at + 1 for at, instruction in enumerate(code.instructions) if instruction.label or not instruction.falls_through
    }
    cuts = sorted({0, len(code.instructions), *code.labels.values(), *ends})
    for first, end in pairwise(cuts):
        if not any(loop.first <= first <= loop.last for loop in loops):
            yield code.instructions[first:end]


def _described(path: Sequence[Instruction], times_unrolled: int) -> HotLoop:
    accesses = _accesses(path)
    loads, stores = (
        Counter({bits: count // times_unrolled for (kind, bits), count in accesses.items() if kind == wanted})
        for wanted in ("load", "store")
    )
    n_arithmetic = sum(instruction.is_arithmetic for instruction in path)
    pipes = Counter(instruction.pipe for instruction in path)
    counts = (len(path), n_arithmetic, _waits(path), pipes["ALU"], pipes["XU"])
    instructions, arithmetic, waits, alu, xu = (count / times_unrolled for count in counts)
    return HotLoop(instructions, arithmetic, loads, stores, waits, alu, xu)


def _waits(path: Sequence[Instruction]) -> int:
    """Count the waits of one iteration; with one of them, all loads that were issued before it are there.

    An iteration before it may have left loads under way: compilers begin a loop wherever they like.
    """
    under_way: list[frozenset[int]] = []
    for _ in range(2):
        waits = 0
        for instruction in path:
            if instruction.leaves is not None:
                is_early = len(under_way) > instruction.leaves
            else:
                is_early = any(not fills.isdisjoint(instruction.uses) for fills in under_way)
            if is_early:
                waits += 1
                under_way.clear()
            if instruction.access is not None and instruction.access[0] == "load":
                under_way.append(instruction.fills)
    return waits


def _accesses(instructions: Sequence[Instruction]) -> Counter[tuple[str, int]]:
    return Counter(instruction.access for instruction in instructions if instruction.access)


def _is_wide(accesses: Counter[tuple[str, int]], least: int = WIDE) -> bool:
    return any(bits >= least for _, bits in accesses)


def _ratio(many: Counter[tuple[str, int]], few: Counter[tuple[str, int]]) -> int:
    """Count how many times the one contains the other; 0: it does not, or not everything as often."""
    ratios = {many[key] / count for key, count in few.items()}
    ratio = min(ratios)
    return int(ratio) if len(ratios) == 1 and many.keys() == few.keys() and ratio == int(ratio) else 0
