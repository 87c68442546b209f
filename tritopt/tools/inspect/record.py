"""A step that is compiled for a target, its launches as records, and their files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from tritopt.tools.gpus import find_gpu


class Case(NamedTuple):
    """A step that is compiled for a target."""

    optimizer: str
    """Key of `known_optimizers`, "module:Class", or NORM."""
    arguments: dict[str, Any]
    """Arguments of the optimizer."""
    storage: str
    """Storage format, a key of tritopt.tools.storage.FORMATS."""
    grad_dtype: str | None
    """Key of GRAD_DTYPES; None: the gradients have the weights' dtype."""
    gpu: str
    """GPU, a key of tritopt.tools.gpus.GPUS."""
    views: bool = False
    """Whether weights and gradients are views into a flat buffer, at odd places."""

    @property
    def compiled_as(self) -> str:
        """Key of what is compiled, whatever the GPU that times are told for."""
        return repr(self._replace(gpu=find_gpu(self.gpu).target))

    @property
    def label(self) -> str:
        """Text that stands for the case in messages."""
        arguments = ", ".join(f"{key}={value!r}" for key, value in self.arguments.items())
        grad = f", {self.grad_dtype} gradients" if self.grad_dtype else ""
        views = " views" if self.views else ""
        return f"{self.optimizer}{f'({arguments})' if arguments else ''} {self.storage}{views}{grad}"


@dataclass(frozen=True)
class LaunchRecord:
    """One launch of a step. Where it works on what is small beside the tensors, what follows `programs` is None."""

    optimizer: str
    arguments: dict[str, Any]
    storage: str
    grad_dtype: str | None
    target: str
    gpu: str
    """Key of tritopt.tools.gpus.GPUS that the times are for."""
    triton: str
    step_read: float
    """Bytes per parameter that the whole step must read."""
    step_written: float
    """Bytes per parameter that the whole step must write."""
    launch: int
    """Position in the step."""
    kernel: str
    registers: int
    """Number of registers of a thread."""
    spilled_bytes: int
    """Bytes of registers that a thread spills to memory."""
    shared_bytes: int
    """Bytes of shared memory of a program."""
    num_warps: int
    programs: int
    """Number of programs that a multiprocessor holds at once."""
    elements: int | None
    """Number of elements that a thread has in an iteration of the hot loop."""
    loads: dict[str, int] | None
    """Number of loads from global memory that it makes for these, by their width in bits."""
    stores: dict[str, int] | None
    """Number of stores to global memory that it makes for these, by their width in bits."""
    bytes_loaded: float | None
    """Bytes per parameter that are loaded, read off the code; of views those that must be."""
    bytes_stored: float | None
    """Bytes per parameter that are stored, read off the code; of views those that must be."""
    must_load: float | None
    """Bytes per parameter that the launch must load; None also where a phase of the step has several launches."""
    must_store: float | None
    """Bytes per parameter that the launch must store; None where `must_load` is."""
    instructions: float | None
    """Number of instructions per parameter that are issued on the hot path."""
    arithmetic: float | None
    """Number of those that neither access memory nor branch."""
    waits: float | None
    """Number of times that a thread waits for memory in one iteration of the hot loop; 1 if all loads come first."""
    alu: float | None
    """Number of instructions per parameter for the pipe of integers, comparisons and choices."""
    xu: float | None
    """Number of instructions per parameter for the pipe of roots, inverses and conversions."""
    in_flight: float | None
    """Bytes of loads that a multiprocessor has under way when all its programs wait."""
    milliseconds: float | None
    """Milliseconds that N_PARAMETERS take on the GPU by the model of tools/inspect/model.py; not a measurement."""
    bound: str | None
    """Limit that takes so long: "memory", "issue", "ALU", "XU" or "latency"."""
    views: bool
    """Whether weights and gradients are views, as `Case` has it."""

    @property
    def case(self) -> Case:
        """Case whose step the launch is part of."""
        return Case(self.optimizer, self.arguments, self.storage, self.grad_dtype, self.gpu, self.views)


class Step(NamedTuple):
    """Launches of a case, all of them."""

    rows: list[LaunchRecord]

    @property
    def hot(self) -> list[LaunchRecord]:
        """Launches that work on whole tensors."""
        return [row for row in self.rows if row.elements]

    def total(self, name: str) -> float:
        """Sum a column over the launches."""
        return float(sum(getattr(row, name) or 0 for row in self.rows))

    @property
    def moves_what_it_must(self) -> bool:
        """Whether the code moves the bytes that the step must move."""
        first = self.rows[0]
        return (self.total("bytes_loaded"), self.total("bytes_stored")) == (first.step_read, first.step_written)


def steps_of(rows: Sequence[LaunchRecord]) -> list[Step]:
    """Group the rows by case."""
    return [Step(list(launches)) for _, launches in groupby(rows, key=lambda row: row.case)]


def dump(rows: Sequence[LaunchRecord]) -> str:
    """Write JSON: a list with a row on each line."""
    return "[\n" + ",\n".join(json.dumps(asdict(row)) for row in rows) + "\n]\n"


def load(path: Path) -> list[LaunchRecord]:
    """Read the rows of a file that `dump` has written; ValueError that says what is wrong with it."""
    hint = "; `tritopt inspect --save` writes such files"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}{hint}") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}{hint}") from error
    names = {field.name for field in fields(LaunchRecord)}
    if not isinstance(document, list) or not document or not all(isinstance(row, dict) for row in document):
        raise ValueError(f"{path} holds no list of rows{hint}")
    for row in document:
        if row.keys() != names:
            differing = ", ".join(sorted(row.keys() ^ names))
            raise ValueError(f"{path} was made by another version of tritopt, whose rows differ in {differing}{hint}")
    return [LaunchRecord(**row) for row in document]


def by_width(accesses: Mapping[int, int]) -> dict[str, int]:
    """Sort accesses by their width in bits, the widest first; a record has these as text."""
    return {str(bits): accesses[bits] for bits in sorted(accesses, reverse=True)}


def widths(accesses: Mapping[str, int] | None) -> str:
    """Write a row's accesses as the table has them.

    >>> widths({"128": 2, "64": 3})
    '2x128 3x64'
    """
    return " ".join(f"{count}x{bits}" for bits, count in (accesses or {}).items())
