"""Row-sparse gradients (`torch.sparse_coo`, as `nn.Embedding(sparse=True)` gives them)."""

from __future__ import annotations

import torch

from tritopt.fused import Task


class Rows:
    """A task that stands in for one with a sparse gradient.

    Lazy: the rows present in the gradient, duplicates added up, gathered into tensors of their own; only they are
    updated, at a cost proportional to them. Otherwise the dense gradient, whose absent rows are zero.

    Args:
        task: the parameter's tensors, the gradient in any sparse layout.
        lazy: whether to touch only the rows present, which needs a gradient that is sparse in dimension 0 alone.
    """

    def __init__(self, task: Task, lazy: bool) -> None:
        grad = task.grad
        self._written = task.written()
        if not lazy or grad.layout != torch.sparse_coo or grad.sparse_dim() != 1:
            self._rows: torch.Tensor | None = None
            self.task = task._replace(grad=grad.to_dense())
            return
        grad = grad.coalesce()
        self._rows = grad.indices()[0]
        weight, state = ([tensor[self._rows] for tensor in tensors] for tensors in (task.weight, task.state))
        self.task = Task(tuple(weight), task.format, grad.values(), tuple(state))

    def write_back(self) -> None:
        """Scatter the updated rows into the parameter's tensors."""
        if self._rows is not None:
            for tensor, rows in zip(self._written, self.task.written(), strict=True):
                tensor[self._rows] = rows
