"""Disassembly of kernels for NVIDIA's GPUs, of many at a time: nvdisasm takes a quarter of a second to start."""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from tritopt.engine import private

_SECTIONS = struct.Struct("<QIHHHHHH")
"""Fields of an ELF file from byte 40 on: where the table of sections is; last, its entry size, length, and names."""
_SECTION = struct.Struct("<IIQQQQ")
"""Entry of that table: offset of the name, type, flags, address; where the section is, and its size in bytes."""
_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/")
_TARGET = re.compile(r"\b(BRA(?:\.U)?|BSSY)\b(.*?)\b0x([0-9a-f]+) *;")
_ALIGNMENT = 128
"""Bytes that a kernel's code is a multiple of."""


def disassemble(cubins: Sequence[bytes], arch: int) -> list[str]:
    """Return the SASS of each binary, which has one kernel, with a label where a branch goes.

    arch: compute capability that all are compiled for (90: sm_90).
    """
    if not cubins:
        return []
    codes = [_code_of(cubin) for cubin in cubins]
    lines = run_tool("nvdisasm", "--binary", f"SM{arch}", binary=b"".join(codes)).splitlines()
    placed = [(int(match[1], 16), line) for line in lines if (match := _LINE.match(line))]
    texts, end_address, at = [], 0, 0
    for code in codes:
        end_address += len(code)
        end = next((i for i in range(at, len(placed)) if placed[i][0] >= end_address), len(placed))
        texts.append("\n".join(_labelled(placed[at:end])))
        at = end
    return texts


def run_tool(name: str, *options: str, binary: bytes) -> str:
    """Return what one of the tools that Triton ships prints of a binary."""
    tool = private.nvidia_tool(name)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(binary)
        return subprocess.run([tool, *options, file], capture_output=True, text=True, check=True).stdout


def _code_of(cubin: bytes) -> bytes:
    """Take the kernel's instructions out of the ELF file."""
    table, _, _, _, _, size, number, names = _SECTIONS.unpack_from(cubin, 40)
    sections = [_SECTION.unpack_from(cubin, table + size * i) for i in range(number)]
    texts = [
        cubin[offset : offset + length]
        for name, _, _, _, offset, length in sections
        if cubin.startswith(b".text.", sections[names][4] + name)
    ]
    if len(texts) != 1:
        raise ValueError(f"a binary with {len(texts)} kernels; it must have one")
    if len(texts[0]) % _ALIGNMENT:
        raise ValueError(f"a kernel of {len(texts[0])} bytes; it must be a multiple of {_ALIGNMENT}")
    return texts[0]


def _labelled(lines: Sequence[tuple[int, str]]) -> Iterator[str]:
    """Name the targets of branches as nvdisasm does where it reads the whole file."""
    targets = {int(match[3], 16) for _, line in lines if (match := _TARGET.search(line))}
    for address, line in lines:
        if address in targets:
            yield f".L_x_{address}:"
        yield _TARGET.sub(lambda match: f"{match[1]}{match[2]}`(.L_x_{int(match[3], 16)}) ;", line)
