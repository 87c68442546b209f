"""Parser of PTX text into blocks: runs of instructions between labels, branches and barriers."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_INSTRUCTION = re.compile(r"^(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)\s*(.*)$", re.DOTALL)
# Commas inside of {a, b} and [a, b] separate nothing.
_COMMA = re.compile(r",(?![^{\[]*[}\]])")
_RANGE = re.compile(r"^(%\w+)<(\d+)>$")
_SHARED = re.compile(r"\.shared\s+\.align\s+\d+\s+\.b8\s+(\w+)\[")
_LOCAL = re.compile(r"\.local\s+\.align\s+\d+\s+\.b8\s+(\w+)\[")
_ENDS_BLOCK = ("bra", "ret", "exit", "bar", "barrier")


@dataclass(frozen=True)
class Instruction:
    """One instruction: `@!%p1 ld.global.b32 %r1, [%rd1+4];` has a negated guard, an opcode and two operands."""

    opcode: str
    operands: tuple[str, ...]
    guard: str | None = None
    """Register of the predicate under which it runs; None: always."""
    is_negated: bool = False
    """Whether it runs where the guard is false."""

    @property
    def name(self) -> str:
        """First part of the opcode."""
        return self.opcode.split(".")[0]

    @property
    def parts(self) -> list[str]:
        """The opcode's name, modifiers and types, in order."""
        return self.opcode.replace("::", ".").split(".")

    @property
    def is_approximate(self) -> bool:
        """Whether hardware may give another result than the exact one, rounded."""
        return not {"approx", "full"}.isdisjoint(self.parts)

    def __str__(self) -> str:
        guard = f"@{'!' * self.is_negated}{self.guard} " if self.guard else ""
        return f"{guard}{self.opcode} {', '.join(self.operands)}".strip()


@dataclass
class Program:
    """A kernel, parsed into blocks."""

    name: str
    parameters: list[tuple[str, str]]
    """Name and type (u64, f32 ...) of each parameter."""
    n_threads: int
    """Number of threads of one program (CTA)."""
    shared_symbol: str | None
    """Name of the shared memory, which begins at address 0; None: there is none."""
    registers: dict[str, str] = field(default_factory=dict)
    """Type of each register, by name."""
    blocks: list[list[Instruction]] = field(default_factory=lambda: [[]])
    labels: dict[str, int] = field(default_factory=dict)
    """Index of the block that follows each label."""


def parse(text: str) -> Program:
    """Parse a module that has one kernel. ValueError if it is not understood."""
    text = re.sub(r"//.*", "", text)
    entry = re.search(r"\.entry\s+(\w+)\s*\((.*?)\)\s*(.*?)\{", text, re.DOTALL)
    if entry is None:
        raise ValueError("PTX without an .entry")
    name, parameters, directives = entry.groups()
    n_threads = re.search(r"\.(?:req|max)ntid\s+(\d+)", directives)
    if n_threads is None:
        raise ValueError(f"kernel {name} does not say its number of threads (.reqntid)")
    symbols = set(_SHARED.findall(text))
    if len(symbols) > 1:
        raise ValueError(f"kernel {name} has several arrays of shared memory: {', '.join(sorted(symbols))}")
    words = [parameter.split() for parameter in parameters.split(",") if parameter.strip()]
    typed = [(word[-1], word[1].removeprefix(".")) for word in words]
    program = Program(name, typed, int(n_threads[1]), next(iter(symbols), None))
    body = text[entry.end() : _closing_brace(text, entry.end())]
    for array in _LOCAL.findall(body):
        # LLVM declares one that it has no use for; one that is used holds what registers could not.
        if len(re.findall(rf"{array}\b", body)) > 1:
            raise NotImplementedError(f"kernel {name} uses local memory, {array}, which the PTX machine does not have")
    for statement in _statements(body):
        _add(program, statement)
    return program


def _closing_brace(text: str, start: int) -> int:
    depth = 1
    for brace in re.finditer(r"[{}]", text[start:]):
        depth += 1 if brace[0] == "{" else -1
        if not depth:
            return start + brace.start()
    raise ValueError("PTX with a brace that is not closed")


def _statements(body: str) -> list[str]:
    lines = [line for line in body.splitlines() if not re.match(r"\s*\.(loc|file|pragma)\b", line)]
    # A label ends with a colon, all else with a semicolon.
    marked = re.sub(r"([\w$]+):(?=\s)", r"\1:;", "\n".join(lines))
    # Braces at the start of a statement are scopes of inline assembly, those at its end are of operands.
    parts = [part.lstrip("{} \t\n").rstrip() for part in marked.split(";")]
    return [part for part in parts if part]


def _add(program: Program, statement: str) -> None:
    if statement.endswith(":"):
        if program.blocks[-1]:
            program.blocks.append([])
        program.labels[statement[:-1]] = len(program.blocks) - 1
    elif statement.startswith(".reg"):
        _, kind, names = statement.split(None, 2)
        for name in names.split(","):
            span = _RANGE.match(name.strip())
            declared = [f"{span[1]}{i}" for i in range(int(span[2]))] if span else [name.strip()]
            program.registers.update(dict.fromkeys(declared, kind.removeprefix(".")))
    elif not statement.startswith(".local"):
        match = _INSTRUCTION.match(statement)
        if match is None:
            raise ValueError(f"kernel {program.name}: {statement!r} is no instruction that is known")
        negated, guard, opcode, operands = match.groups()
        split = tuple(part.strip() for part in _COMMA.split(operands) if part.strip())
        program.blocks[-1].append(Instruction(opcode, split, guard, bool(negated)))
        if opcode.split(".")[0] in _ENDS_BLOCK:
            program.blocks.append([])
