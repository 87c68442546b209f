"""Tensors that say they are on a GPU: each operation on them is queued on the current stream, and runs on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from tests.support.fake_cuda.memory import Block, Memory, Owner
from tests.support.fake_cuda.streams import GpuError, Stream

aten = torch.ops.aten
_MADE_HERE = {
    torch.Tensor.__getitem__: "get_item",
    torch.Tensor.__setitem__: "set_item",
    torch.Tensor.copy_: "copy_into",
    torch.Tensor.__invert__: "invert",
    torch.Tensor.tolist: "to_list",
}
CPU, META = torch.device("cpu"), torch.device("meta")
_WAITING = (aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default)


class CudaTensor(torch.Tensor):
    """A tensor of a GPU, whose memory is that of `here`, a tensor of the CPU."""

    here: torch.Tensor
    owner: Owner
    operations: Operations

    @staticmethod
    def __new__(cls, here: torch.Tensor, owner: Owner, operations: Operations) -> CudaTensor:
        made: CudaTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            here.size(),
            strides=here.stride(),
            storage_offset=here.storage_offset(),
            dtype=here.dtype,
            device=torch.device(f"cuda:{owner.block.device}"),
        )
        made.here, made.owner, made.operations = here, owner, operations
        return made

    def data_ptr(self) -> int:
        """Address in the memory of this process."""
        return self.here.data_ptr()

    def record_stream(self, stream: Any) -> None:
        """Let freed memory wait for what this stream has queued by then, as torch's does."""
        self.owner.block.users.append(stream)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Name the kind of tensor; its numbers would have to be waited for."""
        return f"CudaTensor({tuple(self.shape)}, {self.dtype}, {self.device})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Make here what needs a torch with CUDA, or knows no subclasses."""
        instead = _MADE_HERE.get(func)
        if instead is not None:
            operations = next(x for x in args if isinstance(x, CudaTensor)).operations
            return getattr(operations, instead)(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Queue an operation."""
        flat, _ = tree_flatten((args, kwargs))
        return next(x for x in flat if isinstance(x, CudaTensor)).operations.run(func, args, kwargs or {})


class Operations(TorchDispatchMode):
    """torch's operations on the stand-in's GPUs, those that make tensors included.

    Args:
        memory: of the GPUs.
        stream_of: the current stream of a device, by its index; None: of the current device.
    """

    def __init__(self, memory: Memory, stream_of: Callable[[int | None], Stream]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._memory = memory
        self._stream_of = stream_of

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run it, here unless a GPU has to do with it."""
        flat, _ = tree_flatten((args, kwargs))
        if any(isinstance(x, CudaTensor) or _is_gpu(x) for x in flat):
            return self.run(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run one operation."""
        flat, spec = tree_flatten((args, kwargs))
        tensors = [x for x in flat if isinstance(x, CudaTensor)]
        if func is aten.copy_.default:
            return self.copy_into(*args)
        if func is aten._to_copy.default:
            source, device = args[0], _resolved(kwargs.get("device") or args[0].device, self._stream_of)
            if device != source.device:
                wanted = kwargs.get("dtype") or source.dtype
                # Not `source.to`, which is no operation of its own below the dispatcher.
                same = source if wanted == source.dtype else aten._to_copy.default(source, dtype=wanted)
                return self._moved(same, device, bool(kwargs.get("non_blocking")))
        if not tensors:
            return self._made(func, flat, spec)
        if func in _WAITING:
            for tensor in tensors:
                self._stream_of(tensor.device.index).synchronize()
            return _call(func, [_here(x) for x in flat], spec)
        if func.is_view:
            result = _call(func, [_here(x) for x in flat], spec)
            return tree_map(lambda x: CudaTensor(x, tensors[0].owner, self), result)
        _check_devices(func, flat)
        return self._queued(str(func), func, flat, spec, tensors)

    def new(self, like: torch.Tensor, stream: Stream) -> CudaTensor:
        """Memory for a tensor of this shape, strides and dtype."""
        span = sum((n - 1) * stride for n, stride in zip(like.shape, like.stride(), strict=True)) + 1
        owner = self._memory.allocate(span * like.itemsize if like.numel() else 0, stream)
        return CudaTensor(owner.block.tensor(like.shape, like.stride(), like.dtype), owner, self)

    def get_item(self, tensor: CudaTensor, index: Any) -> Any:
        """Stand in for `tensor[index]`."""
        if not any(isinstance(x, torch.Tensor) for x in _parts(index)):
            return CudaTensor(tensor.here[index], tensor.owner, self)
        return aten.index.Tensor(tensor, _parts(index))

    def set_item(self, tensor: torch.Tensor, index: Any, value: Any) -> None:
        """Stand in for `tensor[index] = value`."""
        if any(isinstance(x, torch.Tensor) for x in _parts(index)):
            values = value if isinstance(value, torch.Tensor) else torch.tensor(value, dtype=tensor.dtype, device=CPU)
            aten.index_put_.default(tensor, _parts(index), values)
        elif isinstance(value, torch.Tensor):
            tensor[index].copy_(value)
        else:
            tensor[index].fill_(value)

    def to_list(self, tensor: CudaTensor) -> Any:
        """Stand in for `tensor.tolist()`."""
        return tensor.cpu().tolist()

    def invert(self, tensor: CudaTensor) -> Any:
        """Stand in for `~tensor`."""
        return aten.bitwise_not.default(tensor)

    def copy_into(self, target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        """`target.copy_(source)`; what goes to the host has been waited for."""
        if not isinstance(target, CudaTensor):
            assert isinstance(source, CudaTensor)
            self._stream_of(source.device.index).synchronize()
            return target.copy_(source.here)
        stream = self._stream_of(target.device.index)
        if not isinstance(source, CudaTensor):
            self._upload(source, target, stream, non_blocking)
            return target
        # Between devices it is the source's stream that copies.
        here = self._stream_of(source.device.index)
        from_, to = source.here, target.here
        if here is not stream:
            here.wait_stream(stream)
        self._queue("copy", here, [source, target], lambda: to.copy_(from_))
        if here is not stream:
            stream.wait_stream(here)
        return target

    def _made(self, func: Any, flat: list[Any], spec: Any) -> CudaTensor:
        """Return what a factory makes."""
        device = next(x for x in flat if _is_gpu(x))
        value = _call(func, [CPU if x is device else x for x in flat], spec)
        stream = self._stream_of(device.index)
        made = self.new(value, stream)
        if "empty" not in func.name():
            self._queue(str(func), stream, [made], lambda: made_here.copy_(value))
            made_here = made.here
        return made

    def _moved(self, source: torch.Tensor, device: torch.device, non_blocking: bool) -> torch.Tensor:
        """The same on another device."""
        if device.type == "cpu":
            return self.copy_into(torch.empty(source.shape, dtype=source.dtype, device=CPU), source)
        return self.copy_into(self.new(source, self._stream_of(device.index)), source, non_blocking)

    def _upload(self, host: torch.Tensor, target: CudaTensor, stream: Stream, non_blocking: bool) -> None:
        """Copy from pinned memory when the stream gets there; from other memory as it is now, since torch waits for
        that."""
        pinned = self._memory.at(host.data_ptr(), None) if non_blocking else None
        if pinned is None:
            if stream.graph is not None and host.dim():
                raise GpuError("a copy from memory that is not pinned, or one that waits, while a stream is captured")
            source = host.clone()
        else:
            # torch keeps pinned memory until copies out of it are done; a graph does not.
            source = host if stream.graph is None else host.detach()
        to = target.here
        self._queue("upload", stream, [target], lambda: to.copy_(source), [] if pinned is None else [pinned])

    def _queued(self, name: str, func: Any, flat: list[Any], spec: Any, tensors: Sequence[CudaTensor]) -> Any:
        """An operation that makes or changes tensors."""
        stream = self._stream_of(tensors[0].device.index)
        inputs = [_here(x).clone() if _is_host(x) else _here(x) for x in flat]
        if func._schema.is_mutable:
            self._queue(name, stream, tensors, lambda: _call(func, inputs, spec))
            return flat[0]
        try:
            shapes = _call(func, [_meta(x) for x in inputs], spec)
        except (RuntimeError, NotImplementedError):  # a shape that depends on values
            stream.synchronize()
            shapes = _call(func, inputs, spec)
        outputs = tree_map(lambda x: self.new(x, stream), shapes)
        targets, _ = tree_flatten(tree_map(lambda x: x.here, outputs))
        made, _ = tree_flatten(outputs)

        def run() -> None:
            values, _ = tree_flatten(_call(func, inputs, spec))
            for target, value in zip(targets, values, strict=True):
                target.copy_(value)

        self._queue(name, stream, [*tensors, *made], run)
        return outputs

    def _queue(
        self,
        name: str,
        stream: Stream,
        tensors: Sequence[CudaTensor],
        run: Callable[[], Any],
        more: Sequence[Block] = (),
    ) -> None:
        blocks = [*(tensor.owner.block for tensor in tensors), *more]

        def checked() -> None:
            for block in blocks:
                block.check(name)
            run()

        stream.queue(name, checked)


class Factories(TorchFunctionMode):
    """Functions of torch that do not pass through its dispatcher.

    Args:
        memory: of the GPUs.
    """

    def __init__(self, memory: Memory) -> None:
        super().__init__()
        self._memory = memory

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Make here what makes tensors out of numbers, or in pinned memory."""
        kwargs = kwargs or {}
        if func is torch.tensor and _is_gpu(device := torch.device(kwargs.get("device") or CPU)):
            return torch.tensor(*args, **{**kwargs, "device": CPU}).to(device)
        if func is torch.Tensor.pin_memory:
            return self._memory.pin(args[0])
        return func(*args, **kwargs)


def _resolved(device: torch.device, stream_of: Callable[[int | None], Stream]) -> torch.device:
    """Device with an index, if it is a GPU."""
    return torch.device("cuda", stream_of(device.index).device) if device.type == "cuda" else device


def _is_gpu(x: Any) -> bool:
    return isinstance(x, torch.device) and x.type == "cuda"


def _is_host(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and not isinstance(x, CudaTensor)


def _here(x: Any) -> Any:
    return x.here if isinstance(x, CudaTensor) else CPU if _is_gpu(x) else x


def _meta(x: Any) -> Any:
    if isinstance(x, torch.Tensor):
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=META)
    return META if x == CPU else x


def _call(func: Any, flat: Sequence[Any], spec: Any) -> Any:
    args, kwargs = tree_unflatten(list(flat), spec)
    return func(*args, **(kwargs or {}))


def _parts(index: Any) -> list[Any]:
    return list(index) if isinstance(index, tuple) else [index]


def _check_devices(func: Any, flat: Sequence[Any]) -> None:
    """GpuError for tensors of several devices, but for numbers on the host and indices."""
    devices = {x.device for x in flat if isinstance(x, torch.Tensor) and (isinstance(x, CudaTensor) or x.dim())}
    if len(devices) > 1 and "index" not in func.name():
        raise GpuError(f"{func}: all tensors must be on one device, not {', '.join(map(str, devices))}")
