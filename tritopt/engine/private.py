"""Names of torch and Triton that are private or undocumented: all that this package relies on.

Tried with torch 2.11 to 2.14 and Triton 3.6 to 3.9. Each fails loudly in a version that has it no longer: what every
step needs when this file is imported, the rest where it is used. Those of Triton's interpreter are in
tritopt/tools/interpreter/private.py, beside the tool that replaces them. tests/engine/test_private.py tries each one,
and refuses such names elsewhere in the package, with few exceptions that it lists.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch.optim import optimizer as optimizers

from tritopt.kernels.language import HAS_TRITON, INTERPRETED, triton

TRIED_TORCH = ("2.11", "2.12", "2.13", "2.14")
TRIED_TRITON = ("3.6", "3.7", "3.8", "3.9")


def gone(name: str, library: Any) -> ImportError:
    """Make the error for a name that a version of torch or Triton has no longer."""
    tried = {"torch": TRIED_TORCH, "triton": TRIED_TRITON}[library.__name__]
    return ImportError(
        f"{library.__name__} {library.__version__} has no {name}, which tritopt needs. It was tried with "
        f"{library.__name__} {tried[0]} to {tried[-1]}: install one of these, or a newer tritopt"
    )


def _take(owner: Any, name: str) -> Any:
    """Take a name of torch that each step needs. ImportError if it is gone."""
    try:
        return getattr(owner, name)
    except AttributeError:
        raise gone(f"{owner.__name__}.{name}", torch) from None


# Tensors. What is bound here is called for each tensor of a step; a function of Python's own would take longer.

is_zero_tensor: Callable[[torch.Tensor], bool] = _take(torch.Tensor, "_is_zerotensor")
"""Says whether a bit says that all elements are 0: such a tensor, which autograd makes, has no memory."""

_take(torch.Tensor, "_version")
version_of: Callable[[torch.Tensor], int] = attrgetter("_version")
"""Returns how often autograd was told of a write to the tensor or to a view of its memory; raises in inference mode."""

local_tensor: Callable[[Any], torch.Tensor] = attrgetter("_local_tensor")
"""Returns what this process holds of a DTensor, as `to_local` does without autograd, in 0.01 us in place of 1.3."""

_PLAIN = (torch.Tensor, torch.nn.Parameter)


def local_part(value: Any) -> Any:
    """Return what this process holds of a DTensor, or of what is built like one; any other value itself."""
    if type(value) in _PLAIN:
        return value
    part = getattr(value, "_local_tensor", None)
    if part is None and type(value).__name__ == "DTensor":
        raise gone("DTensor._local_tensor", torch)
    return value if part is None else part


def awaited(part: torch.Tensor) -> torch.Tensor:
    """Return the tensor itself, where a collective may still be writing it: its stand-in has no address."""
    from torch.distributed._functional_collectives import AsyncCollectiveTensor

    return part.wait() if isinstance(part, AsyncCollectiveTensor) else part


def shape_and_offset(param: Any) -> tuple[Sequence[int], Sequence[int]]:
    """Return the shape of this process's part of a DTensor, and where in the whole its first element lies."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    return compute_local_shape_and_global_offset(param.shape, param.device_mesh, param.placements)


def n_stored(sparse: torch.Tensor) -> int:
    """Return how many entries a sparse tensor has, duplicates included, coalesced or not."""
    return sparse._nnz()


def stored_indices(sparse: torch.Tensor) -> torch.Tensor:
    """Return the indices of these entries, int64 [sparse dimensions, entries], in the tensor's own memory."""
    return sparse._indices()


def stored_values(sparse: torch.Tensor) -> torch.Tensor:
    """Return the values of these entries, in the tensor's own memory."""
    return sparse._values()


def zero_tensor(*shape: int) -> torch.Tensor:
    """Make a tensor of zeros that has no memory, fp32, as autograd makes them."""
    return torch._efficientzerotensor(shape, dtype=torch.float32, device="cpu")


def negated_view(tensor: torch.Tensor) -> torch.Tensor:
    """Make a view whose values are those in memory negated, as the imaginary part of a conjugate is."""
    return torch._neg_view(tensor)


def is_fake(tensor: torch.Tensor) -> bool:
    """Whether a tensor has a shape and a dtype and no memory, as all that is made under FakeTensorMode."""
    from torch._subclasses import FakeTensor

    return isinstance(tensor, FakeTensor)


def weak_keys() -> Any:
    """Make a dict whose keys are tensors, by identity, that it does not keep alive."""
    from torch.utils.weak import WeakTensorKeyDictionary

    return WeakTensorKeyDictionary()


def keep_busy(cuda: Any, cycles: int) -> None:
    """Keep the current stream busy for about so many cycles of the GPU's clock, as torch's own tests do.

    cuda: torch.cuda, or what stands in for it.
    """
    cuda._sleep(cycles)


# torch's interfaces for compiled code, which walk.c calls by address.

_OF_HANDLES = tuple(f"aoti_torch_get_{name}" for name in ("dtype", "layout", "dim", "sizes", "strides", "data_ptr"))
_OF_TENSORS = (
    "_ZN2at6native6is_negERKNS_6TensorE",  # at::native::is_neg(at::Tensor const&)
    "_ZN2at6native12is_inferenceERKNS_6TensorE",  # at::native::is_inference(at::Tensor const&)
    "_ZN5torch8autograd4impl12bump_versionERKN2at6TensorE",  # torch::autograd::impl::bump_version(at::Tensor const&)
)
_OF_IMPLEMENTATIONS = (
    "_ZNK3c1010TensorImpl4gradEv",  # c10::TensorImpl::grad() const
    "_ZN3c1019UndefinedTensorImpl10_singletonE",  # c10::UndefinedTensorImpl::_singleton
)


def functions_of_tensors() -> tuple[list[int], int]:
    """Return addresses of functions that a C program calls with a tensor, and the number that means a strided layout.

    They are dtype, layout, dim, sizes, strides, data_ptr of torch/csrc/inductor/aoti_torch/c/shim.h, then
    at::native::is_neg and is_inference, and torch::autograd::impl::bump_version. A handle points to an at::Tensor,
    which is one pointer. Then c10::TensorImpl::grad, which takes that pointer and returns a handle, and the pointer
    that stands for no tensor. Linux only.
    """
    folder = Path(torch.__file__).parent / "lib"
    library, core = (ctypes.CDLL(str(folder / name)) for name in ("libtorch_cpu.so", "libc10.so"))
    functions = [getattr(library, name) for name in (*_OF_HANDLES, *_OF_TENSORS)]
    functions += [getattr(core, name) for name in _OF_IMPLEMENTATIONS]
    places = [ctypes.cast(function, ctypes.c_void_p).value for function in functions]
    return [place or 0 for place in places], int(library.aoti_torch_layout_strided())


def implementation_of(tensor: torch.Tensor) -> int:
    """Return the address of the C++ tensor, which walk.c reads from the Python tensor's memory."""
    return int(tensor._cdata)


def build(source: str, name: str) -> Any:
    """Compile C into a module and load it; Triton keeps it on disk by its source, as it keeps its own launchers."""
    from triton.runtime.build import compile_module_from_src

    return compile_module_from_src(source, name)


# torch's optimizers.

hooked_step: Callable[[Callable[..., Any]], Callable[..., Any]] = _take(torch.optim.Optimizer, "profile_hook_step")
"""Wraps `step` in the optimizer's hooks and the profiler's range, as torch.optim.Optimizer does with a class's own."""

_PRE_HOOKS = _take(optimizers, "_global_optimizer_pre_hooks")
_POST_HOOKS = _take(optimizers, "_global_optimizer_post_hooks")
_PROFILER = torch.autograd.profiler
_take(_PROFILER, "_is_profiler_enabled")
_profiles: Callable[[], bool] = _take(torch._C._autograd, "_profiler_enabled")


def is_observed(opt: torch.optim.Optimizer) -> bool:
    """Whether a step of it has hooks to run, of its own or of all optimizers, or a profiler to tell."""
    return bool(
        opt._optimizer_step_pre_hooks
        or opt._optimizer_step_post_hooks
        or _PRE_HOOKS
        or _POST_HOOKS
        or _PROFILER._is_profiler_enabled
        or _profiles()
    )


def without_dynamo(method: Any) -> Any:
    """A method of torch's without the wrapper that imports torch._dynamo when first called; any other as it is.

    So where torch wraps otherwise, or somebody has patched the method, that is what is called: right, and slower.
    """
    function = getattr(method, "__func__", method)
    if getattr(function, "__globals__", {}).get("__name__") != "torch._compile":
        return method
    plain = function.__wrapped__
    return plain if function is method else plain.__get__(method.__self__)


def mark_hooked(step: Any) -> None:
    """Keep torch from wrapping `step` once more, in hooks that it runs by itself."""
    step.hooked = True


def load_hooks(opt: Any) -> tuple[Iterable[Callable[..., Any]], Iterable[Callable[..., Any]]]:
    """Return what the user has registered to run before and after `load_state_dict`."""
    before, after = opt._optimizer_load_state_dict_pre_hooks, opt._optimizer_load_state_dict_post_hooks
    return before.values(), after.values()


def iteration_of_muon() -> tuple[Any, str]:
    """Return the module and the name under which torch.optim.Muon finds its iteration, matrix by matrix."""
    from torch.optim import _muon

    name = "_zeropower_via_newtonschulz"
    _take(_muon, name)
    return _muon, name


# Triton's kernels.


def names_of(kernel: Any) -> list[str]:
    """Return the names of a kernel's arguments in order, the compile-time ones too."""
    return kernel.arg_names  # type: ignore[no-any-return]


def bound(compiled: Any, grid: tuple[int, int, int]) -> Callable[..., Any]:
    """Return the launch of a compiled kernel, which takes all arguments by position and does not read constants."""
    return compiled[grid]  # type: ignore[no-any-return]


def source_key(function: Any) -> str:
    """Return a hash of the source of a jit function and of what it calls; "" where kernels are not compiled."""
    if INTERPRETED or not HAS_TRITON:
        return ""
    try:
        return str(function.cache_key)
    except AttributeError:
        # With a guess in its place, an old kernel on disk would pass for a new one.
        raise gone(f"JITFunction.cache_key (of {function!r})", triton) from None


def n_spills(compiled: Any) -> int:
    """Return how many words a thread of a launched kernel spills; 0 for None, which is a launch that was known."""
    return 0 if compiled is None else int(compiled.n_spills)


def n_registers(compiled: Any) -> int:
    """Return how many registers a thread of a launched kernel has."""
    return int(compiled.n_regs)


def launch_hooks() -> Any:
    """Return Triton's set of functions that are called with each launch, with `add` and `remove`."""
    return triton.knobs.runtime.launch_enter_hook


# Triton's compiler, for tools.


def compile_for(
    arch: int | str, kernel: Any, kinds: Mapping[str, str], constants: Mapping[str, Any], options: Mapping[str, Any]
) -> Any:
    """Compile a kernel ahead of time.

    Args:
        arch: compute capability of an NVIDIA GPU, or the name of an AMD one.
        kernel: the jit function.
        kinds: Triton's name of each argument's type. Pointers are taken as 16-byte aligned; behind a number's, ":16"
            says that it is a multiple of 16.
        constants: values of arguments that are compile-time ones, as the kernel says or as they are None.
        options: options of the launch.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    position = {name: i for i, name in enumerate(names_of(kernel))}
    multiples = [name for name, kind in kinds.items() if kind.startswith("*") or kind.endswith(":16")]
    source = ASTSource(
        kernel,
        {name: kinds[name].removesuffix(":16") for name in names_of(kernel)},
        constexprs={(position[name],): value for name, value in constants.items()},
        attrs={(position[name],): [["tt.divisibility", 16]] for name in multiples},
    )
    target = GPUTarget("cuda", arch, 32) if isinstance(arch, int) else GPUTarget("hip", arch, 64)
    return triton.compile(source, target=target, options=options)


def is_constant(kernel: Any, name: str) -> bool:
    """Whether an argument of a kernel is a compile-time one."""
    return bool(kernel.params[names_of(kernel).index(name)].is_constexpr)


def assembly(compiled: Any) -> Mapping[str, Any]:
    """Return what a kernel was compiled into: "ptx", "cubin" or "amdgcn", among others."""
    return compiled.asm  # type: ignore[no-any-return]


def metadata(compiled: Any) -> Any:
    """Return what the compiler says of a kernel: `name`, bytes of `shared` memory, `num_warps`."""
    return compiled.metadata


def nvidia_tool(name: str) -> Path:
    """Return where Triton has one of the programs that it ships: nvdisasm, cuobjdump, ptxas."""
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
