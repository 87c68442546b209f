"""Row-sparse gradients (`torch.sparse_coo`, as `nn.Embedding(sparse=True)` gives them)."""

from __future__ import annotations

from collections.abc import Hashable

import torch

from tritopt.engine import private
from tritopt.engine.plan import Task
from tritopt.engine.walk import holds_values


class StandIn:
    """A task with a strided gradient in place of one with a sparse gradient.

    Lazy: only the rows present in the gradient are updated, duplicates added up, at a cost proportional to them. The
    driver finds them in place; for the reference, and for tensors that are not contiguous, they are gathered and
    scattered. Not lazy: the dense gradient, whose absent rows are zero.

    Args:
        index: the parameter's, for error messages.
        task: its tensors, the gradient in any sparse layout.
        lazy: whether to touch only the rows present, which needs a gradient that is sparse in dimension 0 alone.
        fused: whether the driver runs it.

    Raises:
        ValueError: the gradient has a row that the weight has not.
    """

    def __init__(self, index: Hashable, task: Task, lazy: bool, fused: bool) -> None:
        grad = task.grad
        _check_range(index, grad)
        self._written = task.written()
        self._gathered: torch.Tensor | None = None
        if not lazy or grad.layout != torch.sparse_coo or grad.sparse_dim() != 1:
            self.task = task._replace(grad=grad.to_dense())
            return
        grad = grad.coalesce()
        rows, values = grad.indices()[0], grad.values().resolve_neg()
        if fused and all(tensor.is_contiguous() and holds_values(tensor) for tensor in self._written):
            self.task = task._replace(grad=values.contiguous(), rows=rows)
            return
        self._gathered = rows
        weight, state = (tuple(tensor[rows] for tensor in tensors) for tensors in (task.weight, task.state))
        self.task = Task(weight, task.format, values, state)

    def write_back(self) -> None:
        """Scatter gathered rows into the parameter's tensors."""
        if self._gathered is not None:
            for tensor, rows in zip(self._written, self.task.written(), strict=True):
                tensor[self._gathered] = rows


def _check_range(index: Hashable, grad: torch.Tensor) -> None:
    """torch checks indices of sparse tensors only if told to, and out of range they reach foreign memory."""
    if grad.layout != torch.sparse_coo or (grad.is_coalesced() and private.n_stored(grad) == 0):
        return
    indices = private.stored_indices(grad)
    sizes = torch.tensor(grad.shape[: grad.sparse_dim()], dtype=torch.int64, device=indices.device)[:, None]
    wrong = indices[(indices < 0) | (indices >= sizes)]
    if wrong.numel():
        raise ValueError(
            f"parameter {index!r}: the sparse gradient has index {int(wrong[0])} for a weight of shape "
            f"{tuple(grad.shape)}; build it with check_invariants=True to see where"
        )
