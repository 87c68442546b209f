"""Driver for Triton whose GPU is the machine: `kernel[grid](...)` is specialised, compiled and bound as for a GPU."""

from __future__ import annotations

import atexit
import gc
import time
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from tritopt.engine import plan
from tritopt.kernels.language import HAS_TRITON, INTERPRETED, triton
from tritopt.tools.ptx.machine import Machine
from tritopt.tools.ptx.memory import Fault, Memory
from tritopt.tools.ptx.program import parse
from tritopt.tools.ptx.threads import Options


@dataclass
class Record(Options):
    """Launches that ran in the machine, and how they run; a context manager that switches it off in the end."""

    launches: Counter[str] = field(default_factory=Counter)
    """Number of launches, by the kernel's name."""
    faults: list[str] = field(default_factory=list)
    seconds: float = 0.0
    """Time of all launches."""
    n_binaries: int = 0
    """Kernels that were loaded, each specialisation for itself."""
    _undo: list[Callable[[], Any]] = field(default_factory=list)

    def __enter__(self) -> Record:
        return self

    def __exit__(self, *error: object) -> None:
        self.switch_off()

    def switch_off(self) -> None:
        """Give Triton and tritopt their own driver back. What was launched from this thread is done."""
        while self._undo:
            self._undo.pop()()


_record: Record | None = None
"""The record that is switched on; None while none is."""


def switch_on(capability: int = 90) -> Record:
    """Run kernels in the machine from now on, and let tritopt take tensors of the CPU.

    Kernels become Python for good if TRITON_INTERPRET=1 is set while they are imported, so a process either interprets
    kernels or runs them here. Within another `switch_on`, this one counts until it is switched off.

    Args:
        capability: the GPU's compute capability, which kernels are compiled for: 80, 90 or 100.
    """
    global _record
    if not HAS_TRITON:
        raise ImportError("the PTX machine needs Triton's compiler: `pip install 'triton>=3.6'`")
    if INTERPRETED:
        raise RuntimeError("kernels are interpreted: unset TRITON_INTERPRET before tritopt is imported")
    from triton.backends import Backend, backends
    from triton.runtime import driver

    record, before, active, backend, device = Record(), _record, driver._active, backends["nvidia"], plan.kernel_device

    def undo() -> None:
        global _record
        _record, driver._active, backends["nvidia"], plan.kernel_device = before, active, backend, device
        if before is None:
            gc.unfreeze()
            _known.clear()

    record._undo = [undo]
    _record, plan.kernel_device = record, "cpu"
    driver.set_active(_Driver(capability))
    if before is None:
        backends["nvidia"] = Backend(_backend(backend.compiler), backend.driver)
        _pass_over_what_is_there()
    # Or objects of Triton's would outlive the interpreter, which complains.
    atexit.register(record.switch_off)
    return record


def _backend(base: Any) -> Any:
    """Compiler that ends with PTX, so that Triton hands that to the driver; its files in Triton's cache are its own."""

    class ToPtx(base):  # type: ignore[misc]
        def __init__(self, target: Any) -> None:
            super().__init__(target)
            self.binary_ext = "ptx"

        def add_stages(self, stages: dict[str, Any], *args: Any) -> None:
            super().add_stages(stages, *args)
            del stages["cubin"]

        def hash(self) -> str:
            return f"{super().hash()}-ptx"

    return ToPtx


class _Driver:
    """Triton's interface of a driver, and of its one device."""

    def __init__(self, capability: int) -> None:
        self.utils, self.launcher_cls, self._capability = self, _Launcher, capability

    def get_current_device(self) -> int:
        # Triton keeps binaries by device, so each target has its own.
        return self._capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return triton.backends.compiler.GPUTarget("cuda", self._capability, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32}

    def load_binary(self, name: str, ptx: bytes, shared: int, device: int) -> tuple[Any, ...]:
        # Module, function, registers and spilled bytes (which ptxas would know), threads at most.
        machine = Machine(parse(ptx.decode()), shared)
        _switched_on().n_binaries += 1
        return machine, machine, 0, 0, 1024

    def unload_module(self, module: Machine) -> None:
        pass


def _switched_on() -> Record:
    if _record is None:
        raise RuntimeError("this kernel was compiled for the PTX machine, which is switched off")
    return _record


class _Launcher:
    """Launches as Triton calls for them, where its own launcher calls the CUDA driver."""

    def __init__(self, src: Any, metadata: Any) -> None:
        self._is_passed = [src.signature[name] != "constexpr" for name in src.fn.arg_names]

    def __call__(
        self, x: int, y: int, z: int, stream: int, machine: Machine, packed: Any, metadata: Any, enter: Any, leave: Any,
        *arguments: Any,
    ) -> None:  # fmt: skip
        record, program, began = _switched_on(), machine.program, time.perf_counter()
        passed = [_value(a) for a, is_passed in zip(arguments, self._is_passed, strict=True) if is_passed]
        # Triton's scratch memory, which no kernel of ours asks for.
        passed += [0] * (len(program.parameters) - len(passed))
        given = [argument for argument in arguments if isinstance(argument, torch.Tensor)]
        memory = Memory(_spans([*_alive(), *given]), record.watches, allocations)
        try:
            machine.launch(passed, (x, y, z), memory, record)
        except Fault as fault:
            record.faults.append(str(fault))
            raise
        finally:
            record.launches[program.name] += 1
            record.seconds += time.perf_counter() - began


def _value(argument: Any) -> Any:
    return argument.data_ptr() if hasattr(argument, "data_ptr") else 0 if argument is None else argument


_TENSORS = {torch.Tensor, torch.nn.Parameter}
_known: dict[int, weakref.ref[torch.Tensor]] = {}
"""Tensors that were seen, by `id`, among them all that the garbage collector passes over."""
_MANY = 100_000
"""Objects of the garbage collector, to look through which takes about five milliseconds."""
_n_passed_over, _n_kept = 0, 0
"""Objects that it passes over, those that are gone by now included; and when it had last looked at all of them."""


def _pass_over_what_is_there() -> None:
    """Let `gc.get_objects`, and so `allocations`, look at what is made from now on: Triton leaves much behind."""
    global _n_passed_over, _n_kept
    # Passed over, a cycle is never freed, and its tensors would stay. To look at everything each time takes seconds in
    # the end, where programs are a million objects, and to count them nearly as long.
    looks_at_all = _n_passed_over >= 2 * _n_kept
    if looks_at_all:
        gc.unfreeze()
        _known.clear()
    gc.collect()
    for identity in [identity for identity, reference in _known.items() if reference() is None]:
        del _known[identity]
    objects = gc.get_objects()
    _note(objects)
    _n_passed_over = len(objects) + (0 if looks_at_all else _n_passed_over)
    gc.freeze()
    if looks_at_all:
        _n_kept = _n_passed_over


def _note(objects: list[Any]) -> None:
    """Remember the tensors among some objects."""
    _known.update({id(thing): weakref.ref(thing) for thing in objects if type(thing) in _TENSORS})


def _alive() -> list[torch.Tensor]:
    """Tensors that were seen before and are alive."""
    return [tensor for tensor in (reference() for reference in _known.values()) if tensor is not None]


def allocations() -> list[tuple[int, int]]:
    """First address and end of what each live tensor of the CPU spans, found among all of Python's objects."""
    objects = gc.get_objects()
    if len(objects) > _MANY:
        objects.clear()
        _pass_over_what_is_there()
    else:
        _note(objects)
    return _spans(_alive())


def _spans(tensors: list[torch.Tensor]) -> list[tuple[int, int]]:
    """First address and end of what tensors of the CPU and their gradients span: their extent, not their storage's."""
    spans = set()
    for candidate in tensors:
        for tensor in (candidate, candidate.grad if candidate.is_leaf else None):
            if tensor is not None and tensor.layout is torch.strided and tensor.device.type == "cpu" and tensor.numel():
                first = tensor.data_ptr()
                span = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
                spans.add((first, first + span * tensor.element_size()))
    return list(spans)
