"""Arguments of a Trainer: the optimizer and the loss scaler, and what stands for MXNet's kvstore."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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


def optimizer_of(params: Parameters, optimizer: Any, optimizer_params: Any, max_grad_norm: Any) -> Optimizer:
    """The optimizer of a Trainer, which knows its parameters and their names."""
    if not (optimizer_params is None or isinstance(optimizer_params, Mapping)):
        raise TypeError(f"optimizer_params={optimizer_params!r:.60} must be a dict of the optimizer's arguments")
    arguments: dict[str, Any] = dict(optimizer_params or {})
    param_dict = dict(enumerate(params.tensors))
    names = {} if params.names is None else dict(enumerate(params.names))
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
            except Exception:
                optimizer.max_grad_norm = before
                raise
        optimizer.param_dict = param_dict
        optimizer.idx2name = optimizer.idx2name or names
        return optimizer
    if not isinstance(optimizer, str):
        raise TypeError(
            f"optimizer={optimizer!r:.80} must be a name such as 'sgd', or an instance of tritopt.Optimizer"
        )
    if max_grad_norm is not None:
        if "max_grad_norm" in arguments:
            raise ValueError("max_grad_norm is given twice, in optimizer_params too: give it once")
        arguments["max_grad_norm"] = max_grad_norm
    return create(optimizer, **{"param_idx2name": names, **arguments, "param_dict": param_dict})


def checked_scaler(scaler: Any, optimizer: Optimizer) -> LossScaler | None:
    """The loss scaler of a Trainer, if the optimizer goes with one."""
    if scaler is None:
        return None
    if not isinstance(scaler, LossScaler):
        raise TypeError(f"loss_scaler={scaler!r:.60} must be a tritopt.LossScaler")
    check_norm(optimizer, "loss_scaler")
    return scaler
