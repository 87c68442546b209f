"""Keyword arguments of every optimizer, beside torch's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

from tritopt.engine.validate import did_you_mean
from tritopt.optim.defaults import MEANT, arguments_of


class Options(TypedDict, total=False):
    """Keyword arguments of every optimizer, beside torch's.

    Attributes:
        multi_precision: keep a master and fp32 states for fp16 and bf16 parameters; default True.
        master: format of the master. "auto", the default: "split16" for bf16 parameters, "fp32" for fp16 ones and under
            differentiable=True. "fp32": a copy, 4 bytes. "split16": 16 bits that complete a bf16 parameter to exactly
            the fp32 master; 2 bytes less to keep and 4 to move, and the same master from the same gradients. Such a
            parameter is the master rounded to nearest, away from zero at a tie. "split8": 8 bits in their place, 24 in
            all, rounded stochastically. "kahan": what the parameter lacks, in its own dtype; updates below 2^-17 of a
            bf16 weight can be lost. "stochastic": nothing beside a bf16 parameter, which is rounded stochastically.
            None is multi_precision=False.
        state_dtype: format of states: "fp32", "bf16", "fp16", "int8" or "fp8" (torch's dtypes do as well), or a dict of
            these by name of the state, such as {"exp_avg": "int8", "exp_avg_sq": "bf16"}, the others fp32. All but fp32
            round stochastically. "fp16", "int8" and "fp8" share a scale among 64 neighbours in memory; `state` then
            holds, in place of "exp_avg", "exp_avg_int8" and "exp_avg_int8_scale", or likewise. A state that would not
            bear it stays fp32: a largest value so far, factors, what weights are computed from. A tensor gets scales if
            its row length (numel / shape[0]) is divisible by 64, or if it is not split and has at least 32,768
            elements; states of smaller ones (biases, norms) stay fp32. None, the default: fp32 where there is a master,
            otherwise the parameter's dtype.
        rounding_seed: seed of the random bits of stochastic rounding, >= 0; default 0. They are a function of the seed,
            the parameter (its name where parameters are named, else its position), the step and the element.
        max_grad_norm: clip the gradients' global norm to this in the step, on the device; `opt.grad_norm` holds the
            norm. Gradients are not rewritten. A norm that is not finite skips the update; the step counts all the same
            unless counts are on the device (GradScaler, `capturable`). None: off. The norm is that of this optimizer's
            parameters, over all processes that share one of them. ZeRO's ZeroRedundancyOptimizer gives each process
            parameters of its own, and cannot be told from a caller that wants this: there call
            `tritopt.clip_grad_norm_` before the step instead.
        clip_value: bound on each element of the gradient, after the norm is clipped. None: off.
        track: sum up in each step, from registers, what `telemetry` shows; default False.
    """

    multi_precision: bool
    master: str | None
    state_dtype: Any
    rounding_seed: int
    max_grad_norm: float | None
    clip_value: float | None
    track: bool


def check_known(cls: type[Any], options: Mapping[str, Any]) -> None:
    """TypeError for a keyword argument that this class of optimizers does not take, with the one that may be meant."""
    unknown = sorted(set(options) - set(Options.__annotations__))
    if unknown:
        known = [*Options.__annotations__, *arguments_of(cls)]
        meant = MEANT.get(unknown[0].lower())
        hint = f"; did you mean {meant!r}?" if meant in known else did_you_mean(unknown[0], known)
        raise TypeError(
            f"{cls.__name__}() got an unexpected keyword argument {unknown[0]!r}{hint} beside torch's there are "
            + ", ".join(Options.__annotations__)
        )
