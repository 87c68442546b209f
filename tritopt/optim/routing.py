"""Routing of a module's parameters to param_groups (`Mixed.from_module`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

import torch

from tritopt.engine.names import uncompiled

Settings: TypeAlias = Mapping[str, Any]
"""A param_group without parameters."""
Named: TypeAlias = "list[tuple[str, torch.nn.Parameter]]"
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
    matrix_params: Named = []
    rest_params: Named = []
    embedding_params: Named = []
    by_pattern: dict[str, Named] = {pattern: [] for pattern in patterns}
    for names, module, param in _owned(model):
        name, matching = names[0], [p for p in patterns if any(fnmatchcase(one, p) for one in names)]
        if len(matching) > 1:
            raise ValueError(f"parameter {name!r}: patterns {', '.join(map(repr, matching))} name it; keep one of them")
        if matching:
            by_pattern[matching[0]].append((name, param))
        elif id(param) in embedded or any(_is_head(one, module) for one in names):
            embedding_params.append((name, param))
        elif param.dim() < 2 or isinstance(module, _CONVOLUTIONS):
            rest_params.append((name, param))
        elif param.dim() == 2 or matrices.get("flatten") is not None:
            matrix_params.append((name, param))
        else:
            raise ValueError(
                f"parameter {name!r}: no rule takes one of shape {tuple(param.shape)}: give matrices 'flatten', False "
                "for a stack of matrices, such as experts, or name it in patterns"
            )
    unused = [pattern for pattern, params in by_pattern.items() if not params]
    if unused:
        raise ValueError(f"pattern {unused[0]!r} names no parameter of the model that needs a gradient")
    routes = [(matrices, matrix_params), (rest, rest_params)]
    routes += [(rest if embeddings is None else embeddings, embedding_params)]
    routes += [(patterns[pattern], params) for pattern, params in by_pattern.items()]
    return [{**settings, "params": params} for settings, params in routes if params]


def _owned(model: torch.nn.Module) -> Iterable[tuple[list[str], torch.nn.Module, torch.nn.Parameter]]:
    """Each parameter that needs a gradient once, with all the names that it has and the first module that has it."""
    owned: dict[int, tuple[list[str], torch.nn.Module, torch.nn.Parameter]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, param in module.named_parameters(recurse=False, remove_duplicate=False):
            if param.requires_grad:
                full = uncompiled(f"{prefix}.{name}" if prefix else name)
                owned.setdefault(id(param), ([], module, param))[0].append(full)
    return owned.values()


def _is_head(name: str, module: torch.nn.Module) -> bool:
    """Whether the parameter is of a linear layer that is called as heads are."""
    *_, layer, _ = ("", *name.split("."))
    return isinstance(module, torch.nn.Linear) and layer in HEADS
