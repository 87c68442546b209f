"""The matrices that a tensor is made of, and what makes each of them orthogonal.

All of the tensor is a matrix, each of a stack, or the parts of a fused projection.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple, TypeAlias

import torch

from tritopt.engine import validate
from tritopt.engine.newton_schulz import Iteration, normalize_rows, orthogonalize, ratio_of

Values: TypeAlias = tuple[torch.Tensor, ...]


class Cut(NamedTuple):
    """The matrices that a tensor is made of."""

    flatten: bool | None
    """True: all dimensions but the first are a matrix's columns, as of a convolution. False: the last two are a matrix,
    and those before them number it. None: the tensor must be a matrix."""
    split: int | tuple[int, ...] | None
    """Number of equal parts, or sizes of parts, each of which is a matrix by itself; None: one part."""
    split_dim: int
    """Dimension of the matrix that is split: -2, rows, or -1, columns."""

    def shape_of(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """Matrices, rows and columns of a tensor, before it is split. ValueError if it has none."""
        if len(shape) < 2 or (len(shape) > 2 and self.flatten is None):
            raise ValueError(
                f"Muon only supports 2D parameters whereas we found a parameter with size: {tuple(shape)}; "
                + (
                    "give it to another optimizer such as AdamW, or all parameters to tritopt.optim.Mixed, which has "
                    "both"
                    if len(shape) < 2
                    else "pass flatten=False for a stack of matrices, such as experts, or flatten=True for a "
                    "convolution, whose dimensions after the first become one"
                )
            )
        if self.flatten:
            n_matrices, rows, columns = 1, shape[0], math.prod(shape[1:])
        else:
            n_matrices, rows, columns = math.prod(shape[:-2]), shape[-2], shape[-1]
        return n_matrices, rows, columns

    def check(self, shape: Sequence[int]) -> None:
        """ValueError if a tensor has no matrices, or not such parts."""
        _, rows, columns = self.shape_of(shape)
        self.sizes(rows if self.split_dim == -2 else columns)

    def sizes(self, length: int) -> tuple[int, ...]:
        """Sizes of the parts of a dimension. ValueError if they do not add up."""
        if self.split is None:
            return (length,)
        if isinstance(self.split, int):
            if length % self.split:
                raise ValueError(f"split={self.split}: {length} does not divide into so many equal parts")
            return (length // self.split,) * self.split
        if sum(self.split) != length:
            raise ValueError(
                f"split={self.split} adds up to {sum(self.split)}, and the dimension has {length}: give the sizes of "
                "all parts"
            )
        return self.split

    def shape_of_moments(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of a tensor of one number for each row of every matrix, of as many dimensions as the tensor.

        ValueError if there are no matrices in it.
        """
        self.shape_of(shape)
        n_parts = 1
        if self.split is not None and self.split_dim == -1:
            n_parts = self.split if isinstance(self.split, int) else len(self.split)
        return (shape[0], *(1,) * (len(shape) - 2), n_parts) if self.flatten else (*shape[:-1], n_parts)

    def stacks(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Views of a list of tensors, [tensors, matrices, rows, columns]: one for each run of parts of equal size.

        [tensors, matrices, parts, rows, columns].
        """
        if self.split is None:
            return [x[:, :, None]]
        views, at = [], 0
        for size, equal in groupby(self.sizes(x.shape[self.split_dim])):
            n = len(list(equal))
            part = x.narrow(self.split_dim, at, n * size).unflatten(self.split_dim, (n, size))
            views.append(part if self.split_dim == -2 else part.movedim(-2, 2))
            at += n * size
        return views

    def stacks_of_moments(self, moments: torch.Tensor, shape: Sequence[int]) -> list[torch.Tensor]:
        """Views of the moments of a list of tensors, each beside its stack: [tensors, matrices, parts, rows, 1].

        moments: [tensors, *shape_of_moments(shape)]. shape: of one tensor.
        """
        n_matrices, n_rows, n_columns = self.shape_of(shape)
        moments = moments.view(len(moments), n_matrices, n_rows, moments.shape[-1])
        if self.split is None or self.split_dim == -2:
            return self.stacks(moments)
        runs = [len(list(equal)) for _, equal in groupby(self.sizes(n_columns))]
        return [run.movedim(-1, 2)[..., None] for run in moments.split(runs, -1)]


def cut_of(flatten: bool | None, split: int | Sequence[int] | None, split_dim: int) -> Cut:
    """The matrices of tensors by the words of users. ValueError for what cannot be."""
    if split_dim not in (-2, -1):
        raise ValueError(f"split_dim={split_dim!r} must be -2, a matrix's rows, or -1, its columns")
    if flatten is not None:
        validate.boolean("flatten", flatten)
    if split is None:
        return Cut(flatten, None, split_dim)
    sizes = tuple(split) if isinstance(split, Sequence) else (split,)
    if not sizes or any(isinstance(size, bool) or not isinstance(size, int) or size < 1 for size in sizes):
        raise ValueError(f"split={split!r} must be a number of equal parts, or the sizes of all parts, each at least 1")
    return Cut(flatten, split if isinstance(split, int) else sizes, split_dim)


def orthogonalize_all(x: torch.Tensor, cut: Cut, iteration: Iteration, moments: torch.Tensor | None = None) -> None:
    """Orthogonalise every matrix of tensors of one shape, [tensors, *shape], in place.

    moments: second moments of rows [tensors, *cut.shape_of_moments(shape)], where the iteration normalises them: it
    leaves there the means of squares that they are to be updated with.
    """
    shape = x.shape[1:]
    matrices = x.reshape(len(x), *cut.shape_of(shape))  # a copy where dimensions that become one lie apart
    stacks = cut.stacks(matrices)
    of_rows = [None] * len(stacks) if moments is None else cut.stacks_of_moments(moments, shape)
    for stack, rows in zip(stacks, of_rows, strict=True):
        ratio = ratio_of(iteration.ratio, *stack.shape[-2:])
        orthogonalize(stack, iteration, ratio if rows is None else 1.0)
        if rows is not None:
            normalize_rows(stack, rows, iteration, ratio)
    if matrices.data_ptr() != x.data_ptr():
        x.copy_(matrices.view(x.shape))


def orthogonalize_each(values: Sequence[Values], cut: Cut, iteration: Iteration) -> list[Values]:
    """Orthogonalise tensors by torch's products, those of one shape as a batch; returns new ones of the same dtypes.

    values: a direction each, and where the iteration normalises rows their second moments. See `orthogonalize_all`.
    """
    alike: dict[tuple[Any, ...], list[int]] = {}
    for i, (direction, *_) in enumerate(values):
        alike.setdefault((direction.shape, direction.dtype, direction.device), []).append(i)
    results, iteration = list(values), iteration._replace(symmetric=False)
    for places in alike.values():
        first, *moments = values[places[0]]
        batch = torch.stack([values[i][0] for i in places]).to(iteration.dtype or first.dtype)
        of_rows = [torch.stack([values[i][1] for i in places])] if moments else []
        orthogonalize_all(batch, cut, iteration, *of_rows)
        for i, *result in zip(places, batch.to(first.dtype), *of_rows, strict=True):
            results[i] = tuple(result)
    return results
