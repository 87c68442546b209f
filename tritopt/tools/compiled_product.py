"""Compilation of Muon's products of one triangle, for any GPU and without one."""

from __future__ import annotations

from typing import NamedTuple

import torch

from tritopt.engine import private
from tritopt.engine.gram import symmetric_product
from tritopt.engine.tuning.config import tiles_of
from tritopt.tools.compiled import Recording, compile_launch, resources_of


class CompiledProduct(NamedTuple):
    """A launch of the kernel of products of a matrix with its transpose, compiled."""

    registers: int
    """Number of registers of a thread."""
    spilled_bytes: int
    """Bytes of registers that a thread spills to memory."""
    shared_bytes: int
    """Bytes of shared memory of a program."""
    code: str
    """The PTX, or the assembly of an AMD GPU."""


def compile_product(x: torch.Tensor, arch: int | str = 90) -> CompiledProduct:
    """Compile alpha X X^T + beta Y (Muon's `ns_symmetric`) with the architecture's default tiles.

    x: X, [matrices, M, K], perhaps on the meta device. Whether it is transposed, and what divides its sizes, decide
    the code.
    """
    recording, is_nvidia = Recording(), isinstance(arch, int)
    added = torch.empty(len(x), x.shape[1], x.shape[1], dtype=x.dtype, device=x.device)
    symmetric_product(x, added, tiles=tiles_of(x.dtype, is_amd=not is_nvidia), record=recording)
    binary = compile_launch(recording.launches[0], arch)
    code = private.assembly(binary)
    registers, spilled = resources_of(code)
    return CompiledProduct(registers, spilled, private.metadata(binary).shared, code["ptx" if is_nvidia else "amdgcn"])
