"""Private names of torch and Triton do what is relied on, and stand in two files: the interpreter's, and the rest.

With a new torch or Triton this fails first, and says what is gone; test_private_triton.py tries Triton's.
"""

from __future__ import annotations

import ast
import ctypes
import gc
import inspect
import itertools
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.optim import optimizer as optimizers

from tritopt import optim
from tritopt.engine import private
from tritopt.kernels.language import HAS_TRITON
from tritopt.tools.interpreter.private import is_tried_interpreter

ROOT = Path(__file__).resolve().parents[2]
HERE = ("tritopt/engine/private.py", "tritopt/tools/interpreter/private.py")
FOLDERS_APART = {
    "tritopt/kernels": "it imports nothing of tritopt; language.py says itself what it was tried with",
    "tritopt/tools/ptx": "it stands in for Triton's driver and ptxas, and is tried as a whole by tests/ptx",
}
EXCEPTIONS = {
    (
        "tritopt/tools/bench/without_kernels.py",
        "_foreach_norm",
    ): "peers' kernels are left out by name, and one that is gone is an AttributeError",
    ("tritopt/tools/bench/without_kernels.py", "_foreach_add_"): "as above",
    ("tritopt/tools/bench/without_kernels.py", "_foreach_mul_"): "as above",
    ("tritopt/tools/bench/without_kernels.py", "_fused_adamw_"): "as above",
}
UNDOCUMENTED = {
    "ASTSource", "AsyncCollectiveTensor", "FakeTensor", "GPUTarget", "GridExecutor", "JITFunction",
    "WeakTensorKeyDictionary", "arg_names", "asm", "cache_key", "compile_module_from_src",
    "compute_local_shape_and_global_offset", "hooked", "is_constexpr", "knobs", "launch_enter_hook", "n_regs",
    "n_spills", "profile_hook_step",
}  # fmt: skip
"""Names without an underscore that no documentation has. (`metadata` is so common that it is not looked for.)"""
DOCUMENTED = {"_asdict", "_fields", "_make", "_replace", "_exit", "_getframe"}
"""Names with an underscore that are documented all the same: of named tuples, os and sys."""


# Where they stand.


def sources() -> dict[str, ast.Module]:
    """The package's files, by their path in the project."""
    paths = sorted((ROOT / "tritopt").rglob("*.py"))
    names = {path.relative_to(ROOT).as_posix(): path for path in paths}
    return {
        name: ast.parse(path.read_text())
        for name, path in names.items()
        if not name.startswith(tuple(f"{folder}/" for folder in FOLDERS_APART))
    }


def defined(tree: ast.Module) -> Iterator[str]:
    """Names that a file gives to something of its own."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                yield name
            case ast.Name(id=name, ctx=ast.Store()):
                yield name
            case ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Store()):
                yield name


def used(tree: ast.Module) -> Iterator[tuple[str, int, bool]]:
    """Names that a file takes from something, the line, and whether it is a text, which may mean anything."""
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id="self" | "cls" | "private")):
                pass
            case ast.Attribute(attr=name):
                yield name, node.lineno, False
            case ast.Constant(value=str(name)) if name.isidentifier():
                yield name, node.lineno, True
            case ast.ImportFrom(module=module, names=names):
                yield from ((name, node.lineno, False) for name in (*str(module).split("."), *(n.name for n in names)))
            case ast.Import(names=names):
                yield from ((part, node.lineno, False) for name in names for part in name.name.split("."))


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in DOCUMENTED


def foreign(tree: ast.Module) -> set[str]:
    """Private names in one of these files that are not its own."""
    own = set(defined(tree))
    return {name for name, *_ in used(tree) if is_private(name) and name not in own} | UNDOCUMENTED


def test_private_names_stand_in_two_files() -> None:
    trees = sources()
    forbidden = set[str]().union(*(foreign(trees[path]) for path in HERE))
    assert {"_cdata", "_version", "_patch_lang", "_is_zerotensor", "cache_key"} <= forbidden
    own = set(itertools.chain.from_iterable(map(defined, trees.values())))
    uses, expected = [], set(EXCEPTIONS)
    for path, tree in trees.items():
        for name, line, is_text in used(tree):
            is_foreign = is_private(name) and (hasattr(torch, name) or (name not in own and not is_text))
            if path not in HERE and (name in forbidden or is_foreign):
                uses.append((path, name, line))
    wrong = [f"{path}:{line}: {name}" for path, name, line in uses if (path, name) not in expected]
    assert wrong == [], f"wrap these in {HERE}, with what is relied on, and try them here"
    assert expected <= {(path, name) for path, name, _ in uses}, "exceptions that nothing needs"


def test_triton_is_reached_through_two_files() -> None:
    """All but `triton`, its language and its timer, which are public."""
    wrong = []
    for path, tree in sources().items():
        if path in HERE:
            continue
        for node in ast.walk(tree):
            match node:
                case ast.ImportFrom(module=str(module)) if module.split(".")[0] == "triton":
                    public = module in ("triton", "triton.language")
                    wrong += [] if public else [f"{path}:{node.lineno}: {ast.unparse(node)}"]
                case ast.Attribute(value=ast.Name(id="triton"), attr=name) if name not in ("__version__", "testing"):
                    wrong.append(f"{path}:{node.lineno}: {ast.unparse(node)}")
    assert wrong == []


def test_these_versions_were_tried() -> None:
    """A new one belongs into TRIED_TORCH or TRIED_TRITON once all tests of this file pass with it."""
    assert ".".join(torch.__version__.split(".")[:2]) in private.TRIED_TORCH
    assert not HAS_TRITON or is_tried_interpreter()


def test_what_is_gone_is_said() -> None:
    with pytest.raises(ImportError, match=rf"torch {torch.__version__.split('+')[0]}.* has no Tensor\._nothing.*2\.11"):
        private._take(torch.Tensor, "_nothing")


# Tensors.


def test_zero_tensors_and_negated_ones() -> None:
    zeros, ones = private.zero_tensor(2, 3), torch.ones(2, 3)
    assert zeros.shape == (2, 3)
    assert [private.is_zero_tensor(tensor) for tensor in (zeros, ones, zeros.clone())] == [True, False, False]
    negated = private.negated_view(ones)
    assert negated.is_neg()
    assert negated.data_ptr() == ones.data_ptr()
    assert torch.equal(negated, -ones)


def test_versions_count_writes() -> None:
    tensor = torch.zeros(2)
    before = private.version_of(tensor)
    tensor.view(-1).add_(1)
    assert private.version_of(tensor) == before + 1
    torch.autograd.graph.increment_version([tensor])
    assert private.version_of(tensor) == before + 2
    with torch.inference_mode(), pytest.raises(RuntimeError):
        private.version_of(torch.zeros(2))


def test_sparse_tensors_show_what_they_store() -> None:
    sparse = torch.sparse_coo_tensor(torch.tensor([[1, 1, 0]]), torch.tensor([2.0, 3.0, 4.0]), (4,))
    assert not sparse.is_coalesced()
    assert private.n_stored(sparse) == 3
    assert private.stored_indices(sparse).tolist() == [[1, 1, 0]]
    private.stored_values(sparse).mul_(2)
    assert sparse.to_dense().tolist() == [8.0, 10.0, 0.0, 0.0]


def test_fake_tensors() -> None:
    with FakeTensorMode():
        fakes = [torch.zeros(2), torch.nn.Parameter(torch.zeros(2)), torch.zeros(2)[1:]]
    others = [torch.zeros(2), torch.zeros(2, device="meta")]
    assert [private.is_fake(tensor) for tensor in [*fakes, *others]] == [True] * 3 + [False] * 2


def test_weak_keys_let_go() -> None:
    known, tensor = private.weak_keys(), torch.zeros(2)
    known[tensor] = 1
    assert known[tensor] == 1
    assert torch.zeros(2) not in known
    del tensor
    gc.collect()
    assert len(known) == 0


# The place of the C++ tensor is the word behind Python's own, which walk.c reads. What it calls, this calls as it does.


def _can_build() -> bool:
    header = Path(sysconfig.get_path("include")) / "Python.h"
    return sys.platform == "linux" and header.exists() and any(map(shutil.which, ("cc", "gcc", "clang")))


@pytest.mark.skipif(not (HAS_TRITON and _can_build()), reason="nothing here can build walk.c")
def test_a_machine_with_a_compiler_has_the_walk_in_c() -> None:
    """All tests of the walk are skipped where it is missing, and the warning of it is ignored."""
    from tritopt.engine import walk

    assert not walk.chosen().complaint


@pytest.mark.skipif(sys.platform != "linux", reason="walk.c is for Linux")
def test_tensors_are_read_as_in_c() -> None:
    tensor = torch.nn.Parameter(torch.zeros(5, 3, device="cpu").t())
    place = private.implementation_of(tensor)
    assert ctypes.c_void_p.from_address(id(tensor) + object.__basicsize__).value == place
    (dtype, layout, dim, sizes, strides, data_ptr, *of_tensors), strided = private.functions_of_tensors()
    handle = ctypes.byref(ctypes.c_void_p(place))

    def ask(function: int, kind: Any) -> Any:
        out = kind()
        assert (
            ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p)(function)(handle, ctypes.byref(out)) == 0
        )
        return out

    numbers = ctypes.POINTER(ctypes.c_int64)
    assert ask(layout, ctypes.c_int32).value == strided
    assert ask(dim, ctypes.c_int64).value == 2
    assert ask(sizes, numbers)[:2] == [3, 5]
    assert ask(strides, numbers)[:2] == [1, 3]
    assert ask(data_ptr, ctypes.c_void_p).value == tensor.data_ptr()
    assert ask(dtype, ctypes.c_int32).value != -1

    def of(other: torch.Tensor) -> Any:
        return ctypes.byref(ctypes.c_void_p(private.implementation_of(other)))

    negates, is_inference = (ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p)(place) for place in of_tensors[:2])
    negated = private.negated_view(tensor)
    assert (negates(handle), negates(of(negated))) == (False, True)
    with torch.inference_mode():
        without_version = torch.zeros(1)
    assert (is_inference(handle), is_inference(of(without_version))) == (False, True)
    before = private.version_of(tensor)
    ctypes.CFUNCTYPE(None, ctypes.c_void_p)(of_tensors[2])(handle)
    assert private.version_of(tensor) == before + 1
    grad_of = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(of_tensors[3])
    assert grad_of(place)[0] == of_tensors[4]
    tensor.grad = torch.zeros(3, 5, device="cpu")
    assert grad_of(place)[0] == private.implementation_of(tensor.grad)


def test_muon_iterates_by_what_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []

    def iteration(matrix: torch.Tensor, *rest: Any) -> torch.Tensor:
        shapes.append(matrix.shape)
        return torch.zeros_like(matrix)

    monkeypatch.setattr(*private.iteration_of_muon(), iteration)
    param = torch.nn.Parameter(torch.ones(2, 3))
    param.grad = torch.ones_like(param)
    torch.optim.Muon([param], lr=1.0, weight_decay=0.0).step()
    assert shapes == [(2, 3)]
    assert torch.equal(param, torch.ones_like(param))


# What is spread over processes.


@pytest.fixture
def mesh() -> Iterator[Any]:
    if not torch.distributed.is_available() or torch.cuda.is_available():
        pytest.skip("needs torch.distributed, and tensors on the CPU")
    from torch.distributed.device_mesh import init_device_mesh

    store = torch.distributed.HashStore()  # type: ignore[attr-defined]  # documented, but not exported
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_parts_of_dtensors(mesh: Any) -> None:
    from torch.distributed.tensor import DTensor, Shard

    whole = DTensor.from_local(torch.arange(6.0).view(3, 2), mesh, [Shard(0)])
    for part in (private.local_tensor(whole), private.local_part(whole)):
        assert type(part) is torch.Tensor
        assert part.data_ptr() == whole.to_local().data_ptr()
    shape, offset = private.shape_and_offset(whole)
    assert (tuple(shape), tuple(offset)) == ((3, 2), (0, 0))
    plain = torch.zeros(2)
    assert private.local_part(plain) is plain
    assert private.local_part(1.5) == 1.5
    with pytest.raises(ImportError, match="_local_tensor"):
        private.local_part(type("DTensor", (), {})())


def test_pending_collectives_are_awaited(mesh: Any) -> None:
    from torch.distributed import _functional_collectives as collectives

    pending = collectives.all_reduce(torch.ones(3), "sum", mesh)
    assert type(pending) is not torch.Tensor
    assert type(private.awaited(pending)) is torch.Tensor
    assert private.awaited(pending).tolist() == [1.0, 1.0, 1.0]
    plain = torch.zeros(2)
    assert private.awaited(plain) is plain


# Optimizers.


def test_who_looks_on_is_noticed() -> None:
    opt = optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)
    seen: list[str] = []
    assert not private.is_observed(opt)
    for register in (
        opt.register_step_pre_hook,
        opt.register_step_post_hook,
        optimizers.register_optimizer_step_pre_hook,
        optimizers.register_optimizer_step_post_hook,
    ):
        hook = register(lambda *_: seen.append("hook"))
        assert private.is_observed(opt)
        opt.step()
        hook.remove()
        assert not private.is_observed(opt)
    assert seen == ["hook"] * 4
    with torch.profiler.profile(acc_events=True) as profiler:  # as it otherwise warns of in torch 2.11
        assert private.is_observed(opt)
        opt.step()
    assert "Optimizer.step#SGD.step" in [event.name for event in profiler.events() or ()]
    with torch.autograd.profiler.profile():
        assert private.is_observed(opt)
    assert not private.is_observed(opt)


def test_a_step_that_is_marked_is_not_wrapped_again() -> None:
    class Own(torch.optim.Optimizer):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            pass

    private.mark_hooked(Own.step)
    step = Own.step
    Own([torch.zeros(2)], {})
    assert Own.step is step


@pytest.mark.parametrize("name", ["add_param_group", "zero_grad", "state_dict"])
def test_methods_without_dynamo(name: str) -> None:
    function = getattr(torch.optim.Optimizer, name)
    plain = private.without_dynamo(function)
    assert plain is function.__wrapped__
    assert private.without_dynamo(plain) is plain
    opt = torch.optim.SGD([torch.zeros(2)])
    bound = private.without_dynamo(getattr(opt, name))
    assert (bound.__func__, bound.__self__) == (plain, opt)


def test_hooks_of_loading() -> None:
    opt = optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)
    opt.register_load_state_dict_pre_hook(lambda *_: None)
    hook = opt.register_load_state_dict_post_hook(lambda *_: None)
    before, after = private.load_hooks(opt)
    assert (len(list(before)), len(list(after))) == (1, 1)
    hook.remove()
    assert len(list(private.load_hooks(opt)[1])) == 0


def test_a_grad_scaler_asks_who_unscales_by_itself() -> None:
    """`Optimizer._step_supports_amp_scaling` is defined by us and read by torch."""
    assert optim.Optimizer._step_supports_amp_scaling
    assert '"_step_supports_amp_scaling"' in inspect.getsource(torch.amp.GradScaler)


# The bench.


def test_a_stream_is_kept_busy_in_cycles() -> None:
    assert callable(torch.cuda._sleep)
    asked: list[int] = []
    private.keep_busy(type("Cuda", (), {"_sleep": asked.append}), 5)
    assert asked == [5]


def test_peers_operations_have_their_names() -> None:
    from tritopt.tools.bench.without_kernels import FOREACH

    assert {"_foreach_addcdiv_", "_foreach_lerp_", "_foreach_sqrt"} <= set(FOREACH)
