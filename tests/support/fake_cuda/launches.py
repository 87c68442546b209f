"""Triton kernels on a stream: the interpreter runs them when the stream gets there, on memory as it is then."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from tests.support.fake_cuda.memory import Block, Memory
from tests.support.fake_cuda.streams import GpuError, Stream
from tests.support.fake_cuda.tensors import CudaTensor


class Launches:
    """Launches on the stand-in's GPUs, which are queued.

    Args:
        memory: of the GPUs.
        stream: gives the current stream of the current device, where Triton launches.
    """

    def __init__(self, memory: Memory, stream: Callable[[], Stream]) -> None:
        self._memory = memory
        self._stream = stream

    def wrap(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """The interpreter's own way to run a kernel, but later, if one of the arguments is on a GPU."""

        def launch(executor: Any, *args: Any, **constants: Any) -> None:
            tensors = [arg for arg in args if isinstance(arg, CudaTensor)]
            if not tensors:
                run(executor, *args, **constants)
                return
            stream, name = self._stream(), _name(executor, constants)
            for arg in args:
                if isinstance(arg, torch.Tensor) and arg.device != torch.device("cuda", stream.device):
                    raise GpuError(f"{name} on cuda:{stream.device} gets a tensor on {arg.device}")
            inputs = [arg.here if isinstance(arg, CudaTensor) else arg for arg in args]
            blocks = [tensor.owner.block for tensor in tensors]

            @np.errstate(all="ignore")
            def work() -> None:
                for block in blocks:
                    block.check(name)
                self._check_table(name, dict(zip(executor.arg_names, inputs, strict=False)), constants, stream.device)
                run(executor, *inputs, **constants)

            stream.queue(name, work)

        return launch

    def _check_table(self, name: str, args: dict[str, Any], constants: dict[str, Any], device: int) -> None:
        """GpuError unless the addresses in a table are those of memory in use."""
        if not {"table_ptr", "n_tensors"} <= args.keys() or "DTYPES" not in constants:
            return
        n_columns = len(constants["DTYPES"])
        words = args["table_ptr"][: args["n_tensors"] * (n_columns + 1)].view(-1, n_columns + 1)
        # An empty tensor has no address.
        for address in filter(None, words[:, :n_columns].flatten().tolist()):
            block: Block | None = self._memory.at(address, device)
            if block is None:
                raise GpuError(f"{name} reads a table with address {address}, where no memory of cuda:{device} is")
            block.check(name)


def _name(executor: Any, constants: dict[str, Any]) -> str:
    update = constants.get("UPDATE_FN")
    return str(getattr(update, "__name__", executor.fn.__name__))
