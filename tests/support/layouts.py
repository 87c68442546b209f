"""Tensors spread over a world in every manner, and what one process makes of the same ones."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tritopt.optim import Optimizer
from tritopt.optim.distributed import whole

Layout: TypeAlias = tuple[DeviceMesh, list[Placement]]
SHAPES = ((5, 3), (2, 7), (3,), (1, 3), (4, 5), (6, 4), (1,), (), (0, 3))
"""Uneven over 2 and 4 ranks, with empty shards."""

# Norms are added up in another order than in one process. They are fp64, so a factor formed from them may round to
# the neighbouring fp32, and with it whatever it is multiplied with; a few steps later a few units. Of the largest
# element: moments are sums of terms that may cancel.
CLOSE = 2.0**-21
EXACT = 0.0


@functools.cache
def mesh_of(*sizes: int) -> DeviceMesh:
    """Made once: each makes process groups of its own."""
    return init_device_mesh("cpu", sizes, mesh_dim_names=tuple("xyz"[: len(sizes)]))


def layouts() -> dict[str, Layout]:
    """Every manner for matrices, by name."""
    size = dist.get_world_size()
    flat = mesh_of(size)
    by_name: dict[str, Layout] = {
        "rows": (flat, [Shard(0)]),
        "columns": (flat, [Shard(1)]),
        "replicated": (flat, [Replicate()]),
    }
    if size == 4:
        square = mesh_of(2, 2)
        by_name |= {
            "hybrid": (square, [Replicate(), Shard(0)]),
            "blocks": (square, [Shard(0), Shard(1)]),
            "rows twice": (square, [Shard(0), Shard(0)]),
        }
    return by_name


def fitting(layout: Layout, shape: Sequence[int]) -> Layout:
    """The layout, split along dimensions that the shape has."""
    mesh, placements = layout
    fitted = [Replicate() if isinstance(p, Shard) and p.dim >= len(shape) else p for p in placements]
    return mesh, fitted


def spread(value: torch.Tensor, layout: Layout) -> DTensor:
    """The same value in every process becomes one that is shared."""
    mesh, placements = fitting(layout, value.shape)
    return distribute_tensor(value.clone(), mesh, placements)


def pending(value: torch.Tensor, layout: Layout) -> DTensor:
    """Lay out a gradient whose sum over the processes has yet to be carried out."""
    mesh, _ = layout
    return DTensor.from_local(value / mesh.size(), mesh, [Partial()] * mesh.ndim, run_check=False)


class Pair:
    """An optimizer of DTensors, and the same one of plain tensors in each process, on the same values.

    Args:
        optimizer: class.
        where: a layout for each parameter; `cycle` makes some.
        shapes: of the parameters.
        dtype: of the parameters.
        options: of the optimizer.
    """

    def __init__(
        self,
        optimizer: Any,
        where: Sequence[Layout],
        shapes: Sequence[tuple[int, ...]] = SHAPES,
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.where = where
        values = [torch.randn(shape, generator=self.generator).to(dtype) for shape in shapes]
        self.plain = [torch.nn.Parameter(value) for value in values]
        self.shared = [torch.nn.Parameter(spread(value, layout)) for value, layout in zip(values, where, strict=True)]
        self.one: Optimizer = optimizer(self.plain, **options)
        self.many: Optimizer = optimizer(self.shared, **options)

    def set_grads(self, is_pending: bool = False) -> None:
        """New ones, the same for both."""
        for plain, shared, layout in zip(self.plain, self.shared, self.where, strict=True):
            plain.grad = torch.randn(plain.shape, generator=self.generator).to(plain.dtype)
            shared.grad = (pending if is_pending else spread)(plain.grad, layout)

    def step(self, is_pending: bool = False) -> None:
        """Step with both optimizers."""
        self.set_grads(is_pending)
        if dist.get_rank() == 0:
            self.one.step()
        self.many.step()

    def assert_same(self, tolerance: float) -> None:
        """Weights, states and their dtypes, and the norm; shared ones are compared in rank 0, where plain ones are."""
        is_first = dist.get_rank() == 0
        for i, (plain, shared) in enumerate(zip(self.plain, self.shared, strict=True)):
            theirs, ours = {"weight": plain, **self.one.state[plain]}, {"weight": shared, **self.many.state[shared]}
            values = {name: whole(value) if isinstance(value, DTensor) else value for name, value in ours.items()}
            if is_first:
                assert set(values) == set(theirs), (i, set(values), set(theirs))
                for name, value in theirs.items():
                    assert_same(values[name], value, tolerance, f"{name} of parameter {i}")
        norm = self.many.grad_norm
        if norm is not None:
            assert type(norm) is torch.Tensor
            everywhere = [torch.empty_like(norm) for _ in range(dist.get_world_size())]
            dist.all_gather(everywhere, norm)
            assert all(torch.equal(norm, other) for other in everywhere), everywhere
        if is_first and norm is not None:
            assert self.one.grad_norm is not None
            assert_same(norm, self.one.grad_norm, CLOSE, "grad_norm")


def assert_same(actual: torch.Tensor, expected: torch.Tensor, tolerance: float, name: str) -> None:
    """Two tensors agree to this share of the largest element, and in dtype."""
    largest = float(expected.detach().abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(
        actual.detach(), expected.detach(), rtol=0, atol=tolerance * largest, msg=lambda text: f"{name}: {text}"
    )


def cycle(shapes: Sequence[Any] = SHAPES, offset: int = 0) -> list[Layout]:
    """Every layout in turn."""
    all_of_them = list(layouts().values())
    return [all_of_them[(i + offset) % len(all_of_them)] for i in range(len(shapes))]


class Communication(TorchDispatchMode):
    """Lists the collectives that are called under it, by name."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional") and "wait" not in func.__name__:
            self.calls.append(func.__name__.partition(".")[0])
        return func(*args, **(kwargs or {}))
