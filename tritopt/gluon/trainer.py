"""Trainer: Gluon's loop around an optimizer of MXNet's API, for torch parameters."""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from tritopt.engine import private, validate
from tritopt.engine.names import Selector
from tritopt.engine.warning import warn
from tritopt.gluon import states_file
from tritopt.gluon.arguments import check_kvstore, checked_scaler, optimizer_of, take
from tritopt.gluon.gradients import Gradients, StepGradients, n_processes
from tritopt.gluon.loss_scaler import Loss, LossScaler
from tritopt.gluon.parameters import ATTRIBUTES, ParameterDict, Params, collect, parameters_of, refuse_ddp
from tritopt.mxnet.optimizer import Optimizer
from tritopt.mxnet.updater import Updater

_trainers = private.weak_keys()
"""The trainer of each parameter that has one, by a weak reference."""


class Trainer:
    """Applies an optimizer to the parameters of a model, as `mxnet.gluon.Trainer` does.

    >>> import torch, tritopt
    >>> model = torch.nn.Linear(3, 1)
    >>> trainer = tritopt.Trainer(model, "sgd", {"learning_rate": 0.1, "momentum": 0.9})
    >>> for x in torch.ones(2, 4, 3):
    ...     model(x).square().sum().backward()
    ...     trainer.step(batch_size=4)

    A loss is a sum over samples, and `step` divides by their number. It also drops the gradients, so that the next
    backward writes and does not add, as Gluon's default does: `zero_grad` is not needed. Parameters whose `grad_req` is
    "add" keep theirs until `zero_grad`: `trainer.collect().setattr("grad_req", "add")`. Several backward passes before
    one step add up either way.

    Where a process group of torch.distributed is there, `step` sums gradients up over its processes, so `batch_size`
    counts the samples of all. DistributedDataParallel, passed as the module it is, forms means by itself: then
    `batch_size` counts the samples of one process.

    Args:
        params: a module; its (name, parameter) pairs, parameters, or a dict of them by name. Tied ones count once.
        optimizer: a name that `tritopt.create` knows, or an Optimizer, which is given these parameters.
        optimizer_params: arguments of the optimizer that is named.
        kvstore: "device" or None; gradients are summed up by torch.distributed.
        compression_params: None.
        update_on_kvstore: None or False.
        max_grad_norm: bound on the norm of all gradients together, after the division; the optimizer's.
        loss_scaler: scales the loss of fp16 training, see `scale_loss`.

    Raises:
        ValueError, TypeError: what cannot be trained, an unknown optimizer, or other values.
    """

    def __init__(
        self,
        params: Params,
        optimizer: str | Optimizer,
        optimizer_params: Mapping[str, Any] | None = None,
        kvstore: str | None = "device",
        compression_params: Mapping[str, Any] | None = None,
        update_on_kvstore: bool | None = None,
        max_grad_norm: float | None = None,
        loss_scaler: LossScaler | None = None,
    ) -> None:
        check_kvstore(kvstore, compression_params, update_on_kvstore)
        self._params = parameters_of(params)
        made = optimizer_of(self._params, optimizer, optimizer_params, max_grad_norm)
        self._loss_scaler = checked_scaler(loss_scaler, made)
        scale = made.rescale_grad
        if isinstance(scale, torch.Tensor) or not math.isfinite(scale):
            raise ValueError(f"the optimizer's rescale_grad={scale!r} must be a finite number, which step() divides")
        self._ownership = take(made, self._params, max_grad_norm, self)
        self._updater = Updater(made)
        self._gradients = Gradients(self._params)
        self._depth = 0
        """Number of `scale_loss` blocks that the program is in."""
        self._is_scaled = False
        """Whether a loss was scaled since the last step."""
        self._knows_ddp = False
        if loss_scaler is not None:
            loss_scaler.bind(self)
        self._own()

    def __getstate__(self) -> dict[str, Any]:
        attributes = [{name: value for name, value in vars(param).items() if name in ATTRIBUTES}
                      for param in self._params.tensors]  # fmt: skip
        return {**vars(self), "_ownership": (self._ownership.scale, attributes)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Be the Trainer of a copy: of its parameters, and of its optimizer, which does not know them."""
        scale, attributes = state["_ownership"]
        vars(self).update(state)
        self._ownership = take(self.optimizer, self._params, None, self)
        self._ownership.scale = scale
        for param, own in zip(self._params.tensors, attributes, strict=True):
            vars(param).update(own)  # which deepcopy of a parameter leaves out
        if self._loss_scaler is not None:
            self._loss_scaler.bind(self)
        self._own()

    def _own(self) -> None:
        """Warn where another trainer has one of the parameters."""
        taken = []
        for i, param in enumerate(self._params.tensors):
            other = _trainers.get(param)
            if other is not None and other() is not None:
                taken.append(self._params.label(i))
            _trainers[param] = weakref.ref(self)
        if taken:
            more = f" and {len(taken) - 1} more" if len(taken) > 1 else ""
            warn(
                f"parameter {taken[0]}{more} has another Trainer already, and the first step of either drops its "
                "gradient: give a parameter to one Trainer, or let go of the other"
            )

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer; another object after `load_states`."""
        return self._updater.optimizer

    @property
    def loss_scaler(self) -> LossScaler | None:
        """The loss scaler, None if there is none."""
        return self._loss_scaler

    @property
    def learning_rate(self) -> float:
        """The optimizer's learning rate, per update, before multipliers; asks its scheduler if it has one."""
        return self.optimizer.learning_rate

    def set_learning_rate(self, lr: float) -> None:
        """Set the optimizer's learning rate. Raises UserWarning, as MXNet does, if a scheduler decides it."""
        self.optimizer.set_learning_rate(lr)

    def step(self, batch_size: float, ignore_stale_grad: bool = False) -> None:
        """Sum gradients up over processes, divide them by the batch size, and update the parameters.

        Args:
            batch_size: number of samples that the loss is a sum over, > 0; 1 if it is a mean.
            ignore_stale_grad: leave parameters alone whose gradient backward has not written since the last step. Over
                several processes, those for which no process has one; this waits for the device.

        Raises:
            UserWarning: stale gradients, as in Gluon. ValueError, TypeError: another batch size, or what the optimizer
            refuses. RuntimeError: inside `scale_loss`, or without it where there is a loss scaler. Weights, states and
            counts are then as they were.
        """
        rescale = self._checked_rescale("step", batch_size)
        current = self._gradients.find()
        if not ignore_stale_grad:
            self._gradients.refuse_stale(current)
        if n_processes() > 1 and not self._params.reduced_by:
            current = self._sum_up(current, agree=ignore_stale_grad)
        self._update(current, rescale)

    def allreduce_grads(self) -> None:
        """Sum gradients up over processes, before `update`; `step` does both.

        One all-reduce for each dtype. Waits until the processes know which gradients are fresh in any of them.

        Raises:
            RuntimeError: DistributedDataParallel has done it; or it is done already.
        """
        if self._params.reduced_by:
            raise RuntimeError(
                f"{self._params.reduced_by} forms the mean of gradients over processes in backward: call step(), or "
                "update(), without allreduce_grads()"
            )
        if n_processes() > 1:
            self._sum_up(self._gradients.find(), agree=True)

    def update(self, batch_size: float, ignore_stale_grad: bool = False) -> None:
        """`step` without its sum over processes, after `allreduce_grads`."""
        rescale = self._checked_rescale("update", batch_size)
        current = self._gradients.find()
        if not ignore_stale_grad:
            self._gradients.refuse_stale(current)
        self._update(current, rescale)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Let go of all gradients, or with set_to_none=False write zeros, which do not count as written by backward."""
        self._is_scaled = False
        self._gradients.zero(set_to_none)

    @contextmanager
    def scale_loss(self, loss: Loss) -> Iterator[Loss]:
        """Scale a loss, or each of several, for the backward pass inside; `step` comes after it and undoes the scale.

        >>> import torch, tritopt
        >>> model = torch.nn.Linear(3, 1)
        >>> trainer = tritopt.Trainer(model, "sgd", loss_scaler=tritopt.LossScaler())
        >>> with trainer.scale_loss(model(torch.ones(4, 3)).square().sum()) as scaled:
        ...     scaled.backward()
        >>> trainer.step(4)

        Raises:
            ValueError: this Trainer has no loss scaler.
        """
        if self._loss_scaler is None:
            raise ValueError("this Trainer has no loss scaler: construct it with loss_scaler=tritopt.LossScaler()")
        self._loss_scaler.move_to(self._params.tensors[0].device)
        self._depth += 1
        try:
            yield self._loss_scaler.scale(loss)
        finally:
            self._depth -= 1
        self._is_scaled = True

    def collect(self, *selectors: Selector, strict: bool = False) -> ParameterDict:
        """The parameters that any of some names or patterns select, all without one, by name.

        `trainer.collect("*.bias").setattr("wd_mult", 0)` is for what Gluon does with `collect_params`. A pattern is a
        str with `*`, `?` or `[...]`, of the whole name, or a compiled regular expression that is searched in it.

        Raises:
            ValueError: parameters without names; with `strict` one that selects nothing, which otherwise is a warning.
        """
        return collect(self._params, selectors, strict)

    def save_states(self, fname: str | os.PathLike[str]) -> None:
        """Save the optimizer with its states and counts, and the loss scale, to a file.

        The file is whole at every moment, the earlier one or this, even if the process is killed; what a killed one
        leaves beside it ends in ".part". `lr_mult`, `wd_mult` and `grad_req` of parameters are not saved.

        Raises:
            TypeError: an attribute of the optimizer that is no plain data. OSError: the file cannot be written. The
            earlier file is then as it was.
        """
        content = {
            "format": states_file.FORMAT,
            "names": self._params.names,
            "shapes": states_file.shapes_of(self._params),
            "loss_scaler": None if self._loss_scaler is None else self._loss_scaler.state_dict(),
            **self._updater.content(dump_optimizer=True),
        }
        states_file.write(content, fname)

    def load_states(self, fname: str | os.PathLike[str]) -> None:
        """Go on from a file of `save_states`: as in Gluon, its optimizer takes the place of this Trainer's.

        `use_fused_step` stays as it is here. The file is read with `weights_only`, so it cannot run code.

        Raises:
            ValueError: a file that is not whole or of something else, of another optimizer, of parameters of other
            names or shapes, or with a loss scale where this Trainer has none, or the other way round. Nothing is loaded
            then. OSError: it cannot be read.
        """
        content = states_file.read(fname)
        try:
            updater = self._loaded(content)
        except Exception as error:
            raise ValueError(f"{os.fspath(fname)}: {error}") from error
        if self._loss_scaler is not None:
            self._loss_scaler.load_state_dict(content["loss_scaler"])
        self._updater = updater
        self._ownership.pass_on(updater.optimizer)
        self._is_scaled = False

    def _loaded(self, content: dict[str, Any]) -> Updater:
        """An Updater with the optimizer and the states of a file, checked."""
        saved, own = content["optimizer"]["name"], type(self.optimizer).__name__
        if saved != own.lower():
            raise ValueError(f"it was saved by {saved!r}, and this Trainer's optimizer is {own}")
        if (content["loss_scaler"] is None) != (self._loss_scaler is None):
            here, there = ("no loss scaler", "one") if self._loss_scaler is None else ("a loss scaler", "none")
            raise ValueError(f"this Trainer has {here}, and the one that saved it had {there}: construct it alike")
        if self._loss_scaler is not None:
            self._loss_scaler.checked_state(content["loss_scaler"])
        states_file.check_parameters(content, self._params)
        updater = Updater(self.optimizer)
        updater.take(content)
        updater.optimizer.use_fused_step = self.optimizer.use_fused_step
        updater.optimizer.param_dict = dict(enumerate(self._params.tensors))
        states_file.check_states(updater, self._params.tensors)
        return updater

    def _checked_rescale(self, name: str, batch_size: Any) -> float:
        """Factor of gradients without the loss scale. Errors as `step` has them."""
        if self._depth:
            raise RuntimeError(f"{name}() inside scale_loss(): leave the block after backward, and call it then")
        if not validate.finite("batch_size", batch_size) > 0:
            raise ValueError(f"batch_size={batch_size!r} must be > 0: pass the number of samples, or 1 for a mean")
        if self._loss_scaler is not None and not self._is_scaled:
            raise RuntimeError(
                f"{name}() divides by the loss scale, and no loss was scaled since the last: "
                "with trainer.scale_loss(loss) as scaled: scaled.backward()"
            )
        rescale = float(self._ownership.scale / batch_size)
        if rescale == 0 != self._ownership.scale or not math.isfinite(rescale):
            raise ValueError(f"batch_size={batch_size!r} makes {rescale!r} of the factor of gradients")
        return rescale

    def _sum_up(self, current: StepGradients, agree: bool) -> StepGradients:
        if not self._knows_ddp:
            refuse_ddp(self._params)
            self._knows_ddp = True
        return self._gradients.add_up(current, agree)

    def _update(self, current: StepGradients, rescale: float) -> None:
        """Update the parameters whose gradient is fresh, and use the gradients up."""
        indices, grads, params = current.places, current.grads, self._params.tensors
        if current.stale:
            fresh = [(i, grad) for i, grad in zip(indices, grads, strict=True) if i not in current.stale]
            indices, grads = [i for i, _ in fresh], [grad for _, grad in fresh]
        if len(indices) < len(params):
            params = [params[i] for i in indices]
        if indices:
            self._apply(indices, grads, params, rescale)
            self._ownership.left = rescale
        self._gradients.used(current, indices)
        self._is_scaled = False

    def _apply(self, indices: list[int], grads: list[Any], params: list[torch.Tensor], rescale: float) -> None:
        opt, scaler = self.optimizer, self._loss_scaler
        before = opt.rescale_grad
        opt.rescale_grad = rescale
        if scaler is None:
            try:
                self._updater(indices, grads, params)
            except BaseException:
                opt.rescale_grad = before
                raise
            return
        max_grad_norm = opt.max_grad_norm
        scaler.move_to(params[0].device)
        try:
            opt.rescale_grad = scaler.inverse(rescale)
            if max_grad_norm is None:
                opt.max_grad_norm = math.inf  # the norm is measured, and skips the update if it is not finite
            self._updater(indices, grads, params)
            before = rescale
            scaler.update(opt.grad_factor)
        finally:
            opt.rescale_grad, opt.max_grad_norm = before, max_grad_norm
