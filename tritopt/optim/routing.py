"""Routing of a module's parameters to param_groups (`Mixed.from_module`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

import torch

Settings: TypeAlias = Mapping[str, Any]
"""A param_group without parameters."""
HEADS = ("lm_head", "head", "output", "classifier", "score", "embed_out")
"""Names of the layer that makes logits."""
_EMBEDDINGS = (torch.nn.Embedding, torch.nn.EmbeddingBag)
_CONVOLUTIONS = (
    *(torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d),
    *(torch.nn.ConvTranspose1d, torch.nn.ConvTranspose2d, torch.nn.ConvTranspose3d),
)


def routed(
    model: torch.nn.Module,
    matrices: Settings,
    rest: Settings,
    embeddings: Settings | None,
    patterns: Mapping[str, Settings],
) -> list[dict[str, Any]]:
    """Param_groups of a model, with names; empty ones are left out. See `Mixed.from_module`."""
    embedded = {
        id(p) for module in model.modules() if isinstance(module, _EMBEDDINGS) for p in module.parameters(recurse=False)
    }
    settings = {"matrices": matrices, "rest": rest, "embeddings": rest if embeddings is None else embeddings}
    by_destination: dict[str, list[tuple[str, torch.nn.Parameter]]] = {name: [] for name in (*settings, *patterns)}
    named = []
    for name, module, param in _owned(model):
        matching = [pattern for pattern in patterns if fnmatchcase(name, pattern)]
        if len(matching) > 1:
            raise ValueError(f"parameter {name!r}: patterns {', '.join(map(repr, matching))} name it; keep one of them")
        named += matching
        if matching:
            by_destination[matching[0]].append((name, param))
        elif id(param) in embedded or _is_head(name, module):
            by_destination["embeddings"].append((name, param))
        elif param.dim() < 2 or isinstance(module, _CONVOLUTIONS):
            by_destination["rest"].append((name, param))
        elif param.dim() == 2 or matrices.get("flatten") is not None:
            by_destination["matrices"].append((name, param))
        else:
            raise ValueError(
                f"parameter {name!r}: no rule takes one of shape {tuple(param.shape)}: give matrices 'flatten', False "
                "for a stack of matrices, such as experts, or name it in patterns"
            )
    unused = [pattern for pattern in patterns if pattern not in named]
    if unused:
        raise ValueError(f"pattern {unused[0]!r} names no parameter of the model that needs a gradient")
    by_name = {**settings, **patterns}
    return [{**by_name[name], "params": params} for name, params in by_destination.items() if params]


def _owned(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module, torch.nn.Parameter]]:
    """Each parameter that needs a gradient once, under its first name, with the module that has it."""
    seen = set()
    for prefix, module in model.named_modules():
        for name, param in module.named_parameters(recurse=False):
            if param.requires_grad and id(param) not in seen:
                seen.add(id(param))
                yield (f"{prefix}.{name}" if prefix else name), module, param


def _is_head(name: str, module: torch.nn.Module) -> bool:
    """Whether the parameter is of a linear layer that is called as heads are."""
    *_, layer, _ = ("", *name.split("."))
    return isinstance(module, torch.nn.Linear) and layer in HEADS
