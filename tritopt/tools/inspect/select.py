"""Choose the cases that are compiled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from tritopt.mxnet import registry
from tritopt.mxnet.optimizer import Optimizer
from tritopt.tools.gpus import DEFAULTS, Gpu, find_gpu, find_target
from tritopt.tools.inspect.cases import GRAD_DTYPES, NORM, class_of, find_key, known_optimizers, stored_as
from tritopt.tools.inspect.record import Case, LaunchRecord
from tritopt.tools.storage import find_formats

MAIN_FORMATS = ("fp32", "master", "split16", "split16+bf16", "split8+fp8", "split8+int8")


class Selection(NamedTuple):
    """Cases that were asked for."""

    cases: list[Case]
    refused: dict[str, str]
    """Reason why the optimizer does not take the format, by label of a case."""


def select_cases(
    optimizers: Sequence[str] | None = None,
    formats: Sequence[str] | None = None,
    targets: Sequence[str] | None = None,
    gpu: str | None = None,
    grad_dtype: str | None = None,
    everything: bool = False,
    views: bool = False,
) -> Selection:
    """List the cases that are chosen so, each optimizer with those of its variants that have other kernels or states.

    Args:
        optimizers: names: the registered one, "optim.AdamW" for a class of tritopt.optim, "module:Class" for one of the
            user's, or NORM. None: all registered ones, and NORM.
        formats: names, such as "split8+int8". None: MAIN_FORMATS of optimizers that were named, and of AdamW; of
            others, bf16 with an fp32 master.
        targets: names of targets. None: the GPU's, or else sm_90.
        gpu: name of the GPU whose bandwidth and clock count; None: DEFAULTS.
        grad_dtype: dtype of the gradients, by name; None: the weights'.
        views: whether each case comes with one like it whose weights and gradients are views into a flat buffer, as
            AdamW's main formats do by default.
        everything: all optimizers, also the rules of tritopt.optim, in all formats that `tritopt numerics` shows.

    Raises ValueError for an unknown name, for a GPU that does not run a target, and if nothing remains.
    """
    gpus = _gpus(targets, gpu)
    if grad_dtype is not None and grad_dtype not in GRAD_DTYPES:
        raise ValueError(f"unknown dtype of gradients {grad_dtype!r}; known: {', '.join(GRAD_DTYPES)}")
    known = known_optimizers()
    chosen = [find_key(name, known) for name in optimizers or ()]
    asked = find_formats(formats) if formats else None
    names = chosen or [*(known if everything else registry.names())]
    selection = Selection([], {})
    for machine in gpus:
        for name in dict.fromkeys(names):
            if name == NORM:
                continue
            cls = class_of(name, known)
            for arguments in _variants(cls):
                is_main = bool(optimizers) or (name == "adamw" and not arguments)
                by_default = None if everything else MAIN_FORMATS if is_main else ["master"]
                seen = set()
                for storage in asked or find_formats(by_default):
                    case = Case(name, arguments, storage.name, grad_dtype, machine.name)
                    try:
                        stored = stored_as(cls, case)
                    except ValueError as error:
                        selection.refused[case.label] = str(error)
                        continue
                    # Without states, those who differ in them do not differ.
                    if asked or stored not in seen:
                        seen.add(stored)
                        selection.cases.append(case)
                        if views or (optimizers is None and is_main and not asked):
                            selection.cases.append(case._replace(views=True))
        if not optimizers or NORM in names:
            dtypes = {storage.dtype: storage.name for storage in reversed(asked or find_formats(["master"]))}
            selection.cases.extend(
                Case(NORM, {}, storage, grad_dtype, machine.name) for storage in reversed(dtypes.values())
            )
    if not selection.cases:
        label, reason = next(iter(selection.refused.items()))
        raise ValueError(f"nothing to compile: {label}: {reason}")
    return selection


def in_both(selection: Selection, saved: Sequence[LaunchRecord]) -> Selection:
    """Keep the cases that a saved run has as well; ValueError if it has none of them."""
    known = {row.case.compiled_as for row in saved}
    cases = [case for case in selection.cases if case.compiled_as in known]
    if not cases:
        raise ValueError("the saved run has none of these steps: leave out the options that choose others")
    return selection._replace(cases=cases)


def _gpus(targets: Sequence[str] | None, gpu: str | None) -> list[Gpu]:
    wanted = None if gpu is None else find_gpu(gpu)
    names = [find_target(target) for target in targets or ()] or [wanted.target if wanted else "sm_90"]
    for target in names:
        if wanted is not None and wanted.target != target:
            raise ValueError(f"{wanted.name} runs {wanted.target}, not {target}: leave out the target or the GPU")
    return [wanted or find_gpu(DEFAULTS[target]) for target in dict.fromkeys(names)]


def _variants(cls: type[Optimizer]) -> Iterator[dict[str, Any]]:
    seen = set()
    for arguments in cls.variants:
        opt = cls(**arguments)
        key = (tuple(name for phase in opt.phases for name in phase.kernels), tuple(opt.state_names))
        if opt.phases and key not in seen:
            seen.add(key)
            yield arguments
