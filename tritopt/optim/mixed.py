"""Several optimizers' rules in one optimizer."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, TypeAlias

import torch
from typing_extensions import Unpack

from tritopt.engine import validate
from tritopt.engine.validate import did_you_mean
from tritopt.optim.optimizer import Optimizer, Options
from tritopt.optim.origin import CLASSES
from tritopt.optim.routing import Settings, routed

Group: TypeAlias = dict[str, Any] | tuple[Any, Mapping[str, Any]]
_OWN = ("params", "param_names", "algorithm", "in_norm")
_OF_OTHERS = ("name", "initial_lr")
"""Keys of what `param_groups` makes, and of what a scheduler of torch needs to go on."""


class Route(NamedTuple):
    """Destination of a parameter."""

    name: Any
    """Name, where parameters are named; otherwise the position."""
    shape: tuple[int, ...]
    algorithm: str
    group: int
    """Number of its param_group."""
    lr: float
    in_norm: bool


class Routing(list[Route]):
    """A row for each parameter; printed as a table."""

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        table = Table("name", "shape", "algorithm", "group", "lr", "in norm")
        for route in self:
            shape = " x ".join(map(str, route.shape)) or "()"
            in_norm = "yes" if route.in_norm else "no"
            table.add_row(str(route.name), shape, route.algorithm, str(route.group), f"{route.lr:g}", in_norm)
        text = io.StringIO()
        width = max(100, 60 + max((len(str(route.name)) for route in self), default=0))
        Console(file=text, width=width).print(table)
        return text.getvalue().rstrip()


class Mixed(Optimizer):
    """Several classes of tritopt.optim in one optimizer, such as Muon for matrices and AdamW for the rest.

    One step, one state_dict, one schedule, one global norm and one telemetry. A param_group says which class its
    parameters follow, `algorithm`, and has that class's arguments and defaults; a step is the launches of each class
    for all of its groups together. States are as the class keeps them.

        opt = Mixed([
            {"params": matrices, "algorithm": "Muon", "lr": 0.02, "in_norm": False},
            {"params": others, "algorithm": "AdamW", "lr": 3e-4},
        ], max_grad_norm=1.0)

    Not for NAdam, which keeps a number beside the step.

    Args:
        params: param_groups; or pairs of parameters and the rest of a group. Keys beside those of torch:
            algorithm: name of a class of tritopt.optim.
            in_norm: whether the gradients count in the global norm and are clipped by it; default True. Muon's step
                does not depend on their size, and they can drown the others.
        capturable, fused: of all groups that do not say more.
        options: see `Options`; likewise, but for max_grad_norm, rounding_seed and track, which are the optimizer's.

    Raises:
        ValueError: an unknown algorithm, a key that its class does not have, a parameter in two groups, or what the
            class refuses.
    """

    def __init__(
        self,
        params: Iterable[Group],
        *,
        capturable: bool = False,
        fused: bool | None = None,
        **options: Unpack[Options],
    ) -> None:
        groups = [_as_dict(group) for group in params]
        super().__init__(groups, {"capturable": capturable, "fused": fused}, options)

    @classmethod
    def from_module(
        cls,
        model: torch.nn.Module,
        matrices: Settings,
        rest: Settings,
        embeddings: Settings | None = None,
        patterns: Mapping[str, Settings] | None = None,
        **options: Any,
    ) -> Mixed:
        """Route a model's parameters by what they are; `routing` shows where they went.

        A parameter that a pattern names goes there. Of the others, embeddings (nn.Embedding, nn.EmbeddingBag) and
        heads (a layer that shares an embedding's weight, or an nn.Linear called lm_head, head, output, classifier,
        score or embed_out) go to `embeddings`; weights of two dimensions to `matrices`, as do those of more, unless
        they are of a convolution, where `matrices` says what they are (Muon's `flatten`); what has fewer to `rest`,
        convolutions too.

        Args:
            model: the module. Parameters that need no gradient are left out.
            matrices, rest: param_groups without parameters, such as {"algorithm": "Muon", "lr": 0.02}.
            embeddings: a param_group like these; None: `rest`.
            patterns: param_groups like these, by shell pattern of the parameters' names, such as "*.router.weight".
            options: see the class.

        Raises:
            ValueError: a parameter that two patterns name, or that no rule takes; a pattern that names none.
        """
        return cls(routed(model, matrices, rest, embeddings, patterns or {}), **options)

    def routing(self) -> Routing:
        """Table of where each parameter goes, in the order of the groups."""
        routing = Routing()
        for i, group in enumerate(self.param_groups):
            names = group.get("param_names") or range(len(routing), len(routing) + len(group["params"]))
            routing.extend(
                Route(name, tuple(param.shape), group["algorithm"], i, float(group["lr"]), group["in_norm"])
                for name, param in zip(names, group["params"], strict=True)
            )
        return routing

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param_group as torch does, with `algorithm`. Nothing is added if its class refuses it."""
        group = dict(_as_dict(param_group))
        group["algorithm"] = name = _known(group.get("algorithm"))
        group["in_norm"] = validate.boolean("in_norm", group.get("in_norm", True))
        defaults = self.of_class(group).defaults
        unknown = [key for key in group if key not in (*defaults, *_OWN, *_OF_OTHERS)]
        if unknown:
            known = [*(key for key in _OWN if key != "param_names"), *defaults]
            raise ValueError(
                f"a param_group of {name} has no {unknown[0]!r}{did_you_mean(unknown[0], known)} "
                f"known: {', '.join(known)}"
            )
        super().add_param_group({**defaults, **self.defaults, **group})

    def of_class(self, group: Mapping[str, Any]) -> Optimizer:
        """An optimizer of a group's class, without parameters of ours."""
        name = _known(group.get("algorithm"))
        if name not in self._of_classes:
            self._of_classes[name] = CLASSES[name]([torch.zeros(1, 1, dtype=torch.float32, device="cpu")])
        return self._of_classes[name]

    def first_count(self, state: dict[str, Any]) -> float:
        """Steps that a state stands for which does not show them, as the class has it: SGD's, and Muon's, which needs
        none."""
        return max((one.first_count(state) for one in self._of_classes.values()), default=0.0)

    def sparse_error_of(self, group: dict[str, Any]) -> str | None:
        """torch's message where the group's class takes no sparse gradients; None: it takes them."""
        return self.of_class(group).sparse_error_of(group)

    def check_group(self, group: dict[str, Any]) -> None:
        """ValueError unless a group's values are such as its class takes."""
        validate.boolean("in_norm", group.get("in_norm", True))
        self.of_class(group).check_group(group)

    def rule_of(self, group: dict[str, Any]) -> Any:
        """The rule of a group's class, with its hyperparameters."""
        return self.of_class(group).rule_of(group)

    def _forget(self) -> None:
        self._of_classes: dict[str, Optimizer] = {}
        """An optimizer of each class, asked what its parameters' groups and states are."""
        super()._forget()


def _as_dict(group: Any) -> dict[str, Any]:
    if isinstance(group, dict):
        return group
    if isinstance(group, tuple | list) and len(group) == 2 and isinstance(group[1], Mapping):
        return {**group[1], "params": group[0]}
    raise TypeError(
        f"Mixed takes param_groups, such as {{'params': ..., 'algorithm': 'AdamW'}}, or pairs of parameters and such a "
        f"dict, and not {type(group).__name__}"
    )


def _known(name: Any) -> str:
    """Name of a class; ValueError for another."""
    names = [known for known, cls in CLASSES.items() if not cls.rule.scalar_states]
    if not isinstance(name, str) or name not in names:
        said = "a param_group has no 'algorithm'" if name is None else f"algorithm={name!r} is none"
        raise ValueError(f"{said}{did_you_mean(str(name), names)} known: {', '.join(sorted(names))}")
    return name
