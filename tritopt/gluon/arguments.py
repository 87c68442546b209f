"""Arguments of a Trainer: the optimizer and the loss scaler, and what stands for MXNet's kvstore."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

from tritopt.engine.warning import warn
from tritopt.gluon.loss_scaler import LossScaler
from tritopt.gluon.parameters import Parameters
from tritopt.mxnet.optimizer import Optimizer
from tritopt.mxnet.registry import create
from tritopt.mxnet.settings import check_norm, check_settings


def check_kvstore(kvstore: Any, compression_params: Any, update_on_kvstore: Any) -> None:
    """Raise for what a kvstore would do, with torch's way of doing it."""
    if kvstore not in (None, "device"):
        raise ValueError(
            f"kvstore={kvstore!r} must be 'device' or None: start one process per device with torchrun, call "
            "torch.distributed.init_process_group, and step() sums gradients up over the processes"
        )
    if update_on_kvstore not in (None, False):
        raise ValueError(
            f"update_on_kvstore={update_on_kvstore!r} must be None or False: there is no kvstore, each process updates "
            "its own parameters"
        )
    if compression_params is not None:
        raise ValueError(
            f"compression_params={compression_params!r} must be None: wrap the module in DistributedDataParallel and "
            "register a communication hook of torch.distributed.algorithms.ddp_comm_hooks"
        )


class Ownership:
    """A Trainer's hold on its optimizer: what it gave to it, and what the next Trainer of it takes back."""

    def __init__(self, trainer: object, optimizer: Optimizer, names: dict[int, str]) -> None:
        self.trainer = weakref.ref(trainer)
        self.scale: Any = optimizer.rescale_grad
        """rescale_grad as the user has set it."""
        self.left: Any = optimizer.rescale_grad
        """rescale_grad as the last step has left it."""
        self.names = names
        """Names of parameters that the Trainer gave to it."""

    def pass_on(self, optimizer: Optimizer) -> None:
        """Note them for an optimizer that takes the place of the Trainer's."""
        self.left = optimizer.rescale_grad
        _ownerships[optimizer] = self


_ownerships: weakref.WeakKeyDictionary[Optimizer, Ownership] = weakref.WeakKeyDictionary()


def optimizer_of(params: Parameters, optimizer: Any, optimizer_params: Any, max_grad_norm: Any) -> Optimizer:
    """The optimizer of a Trainer, checked; `take` gives it the parameters."""
    if not (optimizer_params is None or isinstance(optimizer_params, Mapping)):
        raise TypeError(f"optimizer_params={optimizer_params!r:.60} must be a dict of the optimizer's arguments")
    arguments: dict[str, Any] = dict(optimizer_params or {})
    if isinstance(optimizer, Optimizer):
        if arguments:
            raise ValueError(
                "optimizer_params must be None if optimizer is an instance of Optimizer instead of str, got "
                f"{arguments!r}: pass them to its constructor"
            )
        if max_grad_norm is not None:
            before, optimizer.max_grad_norm = optimizer.max_grad_norm, max_grad_norm
            try:
                check_settings(optimizer)
            finally:
                optimizer.max_grad_norm = before
        return optimizer
    if not isinstance(optimizer, str):
        raise TypeError(
            f"optimizer={optimizer!r:.80} must be a name such as 'sgd', or an instance of tritopt.Optimizer"
        )
    if max_grad_norm is not None:
        if "max_grad_norm" in arguments:
            raise ValueError("max_grad_norm is given twice, in optimizer_params too: give it once")
        arguments["max_grad_norm"] = max_grad_norm
    names = _names_of(params)
    return create(optimizer, **{"param_idx2name": names, **arguments, "param_dict": dict(enumerate(params.tensors))})


def _names_of(params: Parameters) -> dict[int, str]:
    return {} if params.names is None else dict(enumerate(params.names))


def take(optimizer: Optimizer, params: Parameters, max_grad_norm: Any, trainer: object) -> Ownership:
    """Give an optimizer a Trainer's parameters; what an earlier Trainer gave it, and left of it, is gone.

    Warns if that one is still there: the optimizer's counts and settings are one for both.
    """
    earlier, names = _ownerships.get(optimizer), _names_of(params)
    if earlier is not None:
        if earlier.trainer() is not None:
            warn(
                "this optimizer has another Trainer already: its counts, learning rate and multipliers would be those "
                "of both, and parameters are told apart by their index alone; make an optimizer for each Trainer"
            )
        if optimizer.rescale_grad == earlier.left:
            optimizer.rescale_grad = earlier.scale
        if optimizer.idx2name == earlier.names:
            optimizer.idx2name = {}
    if max_grad_norm is not None:
        optimizer.max_grad_norm = max_grad_norm
    optimizer.param_dict = dict(enumerate(params.tensors))
    optimizer.idx2name = optimizer.idx2name or names
    _ownerships[optimizer] = made = Ownership(trainer, optimizer, names)
    return made


def checked_scaler(scaler: Any, optimizer: Optimizer) -> LossScaler | None:
    """The loss scaler of a Trainer, if the optimizer goes with one and no other Trainer has it."""
    if scaler is None:
        return None
    if not isinstance(scaler, LossScaler):
        raise TypeError(f"loss_scaler={scaler!r:.60} must be a tritopt.LossScaler")
    check_norm(optimizer, "loss_scaler")
    scaler.check_free()
    return scaler
