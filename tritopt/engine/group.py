"""Groups of tensors that share a launch, and the tables on the device that their kernels read."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias, TypeVar

import numpy as np
import torch

from tritopt.engine.device import (
    current_stream,
    from_pinned,
    is_capturing,
    on_device,
    pinned,
    share_with_streams,
    upload,
)
from tritopt.kernels.formats.format import Format

Array: TypeAlias = np.ndarray[Any, Any]
Prepared = TypeVar("Prepared")
MAX_READY = 16
MAX_CAPTURED = 4
"""Different uploads that CUDA graphs may capture between two steps that are not captured."""
FIRST_STEP = (
    "a CUDA graph captured an optimizer's first step: run a few steps before the capture, and do not change which "
    "parameters have gradients in it"
)


class ScalarTable(NamedTuple):
    """The scalars of a launch: rescale, clip bound, wd, then the optimizer's; kept once where tasks share them."""

    values: np.ndarray[Any, np.dtype[np.float64]] | torch.Tensor
    """The different sets of scalars, fp64 [sets, 3 + scalars]; a tensor where they are formed on the device."""
    place_of: np.ndarray[Any, np.dtype[np.int64]]
    """Place in `values` of each task's set, int64 [tasks]."""

    @classmethod
    def of(cls, scalars: Sequence[tuple[float, ...]]) -> ScalarTable:
        """Table of one set of scalars per task; equal sets are kept once."""
        index: dict[tuple[float, ...], int] = {}
        place_of = np.array([index.setdefault(one, len(index)) for one in scalars], dtype=np.int64)
        return cls(np.array(list(index), dtype=np.float64), place_of)


@dataclass
class LaunchGroup:
    """Tasks of one device, list of formats and of dtypes: they share a launch."""

    members: list[int]
    """Places of the tasks among those of the launch."""
    device: torch.device
    formats: tuple[Format, ...]
    """Formats of the weight and of each state."""
    dtypes: tuple[torch.dtype, ...]
    """Dtypes of the pointer table's columns: the weight's planes, gradient, states, and int64 if `has_rows`."""
    shapes: list[torch.Size]
    """Shapes of the members' gradients."""
    noise: list[tuple[int, int, int, int]] = field(default_factory=list)
    """`Task.noise` of each member."""
    strides: Sequence[tuple[int, ...]] = ()
    """Strides of the members' weights, in whose order all their tensors lie."""
    aligned: tuple[bool, ...] = ()
    """Whether the pointers of each column were multiples of 16 bytes when the group was made; empty: all were."""
    has_rows: bool = False
    """Whether gradients are of some rows of the weights, whose numbers the table's last column points to."""
    host_table: np.ndarray[Any, np.dtype[np.int64]] = field(default_factory=lambda: np.empty(0, np.int64))
    """The driver's table on the host: addresses and places of scalars, behind them the scalars' fp64 as int64."""
    device_table: torch.Tensor | None = None
    """The driver's table on the device, int64; None: it must be made anew."""
    stream: int = 0
    """Handle of the stream that `device_table` was made on."""
    staging: list[torch.Tensor] = field(default_factory=list)
    """Pinned memory for tables that are uploaded while CUDA graphs are captured: each replay reads its own again."""
    captured: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    """Tables that replays of CUDA graphs read: the pinned one and its copy on the device, a pair for each upload."""
    is_captured: bool = False
    """Whether `device_table` is a CUDA graph's, which each replay writes and nobody before the first."""
    writer: object = None
    """Token of the replay that wrote `host_table` last and may trust it; None: a built step wrote it."""
    configs: dict[Hashable, Any] = field(default_factory=dict)
    """Launch configurations that phases have chosen, by what they depend on beside the group."""
    _ready: list[tuple[Any, Any]] = field(default_factory=list)
    _tables: dict[Hashable, tuple[Any, ...]] = field(default_factory=dict)

    @property
    def format(self) -> Format:
        """Format of the weight."""
        return self.formats[0]

    def tables(self, name: Hashable, build: Callable[[Sequence[torch.Size]], tuple[Any, ...]]) -> tuple[Any, ...]:
        """Tables that `build` makes of the shapes, its arrays on the device; made and uploaded once per name."""
        if name not in self._tables:
            made = build(self.shapes)
            self._tables[name] = tuple(
                upload(torch.from_numpy(x), self.device) if isinstance(x, np.ndarray) else x for x in made
            )
        return self._tables[name]

    def ready(self, key: tuple[Any, ...], make: Callable[[], Prepared]) -> Prepared:
        """Return what was made for an equal key, or make it. Few tuples are compared: hashing kernels takes longer."""
        for known, prepared in self._ready:
            if known == key:
                return prepared  # type: ignore[no-any-return]
        made = make()
        self._ready.append((key, made))
        del self._ready[:-MAX_READY]
        return made

    def held(self) -> tuple[Any, ...]:
        """The device memory of what was prepared, for those who need it for longer than the group does."""
        return self.device_table, list(self._ready), dict(self._tables)

    def uploaded(self) -> list[torch.Tensor]:
        """Return the tensors that `tables` has made, on the device."""
        return [x for made in self._tables.values() for x in made if isinstance(x, torch.Tensor)]

    @property
    def places(self) -> torch.Tensor:
        """Places of the members among the tasks of the launch, int64 on the device."""
        (places,) = self.tables("places", lambda _: (np.array(self.members, dtype=np.int64),))
        return places  # type: ignore[no-any-return]

    def empty(self, *shape: int) -> torch.Tensor:
        """Uninitialised fp64 scratch on the device."""
        return torch.empty(shape, dtype=torch.float64, device=self.device)


def upload_table(group: LaunchGroup, words: Array, scalars: Array | torch.Tensor) -> None:
    """Bring the driver's table to the device if it has changed.

    words: int64 [members, pointers + 1], addresses and the place of its scalars. scalars: `ScalarTable.values`.
    """
    group.writer = None
    tail = np.zeros(scalars.numel()) if isinstance(scalars, torch.Tensor) else scalars.reshape(-1)
    n_words = words.size
    is_new = group.host_table.size != n_words + tail.size
    if is_new or not np.array_equal(group.host_table[:n_words], words.reshape(-1)):
        # Not in place: on the CPU the device's table is this very memory, and may be one that somebody still reads.
        group.host_table = np.concatenate([words.reshape(-1), tail.view(np.int64)])
        group.device_table = None
    refresh_table(group, n_words, scalars)


def refresh_table(group: LaunchGroup, n_words: int, scalars: Array | torch.Tensor, is_dirty: bool = False) -> None:
    """Bring the driver's table to the device where its addresses already stand in `group.host_table`.

    is_dirty: whether these addresses are others than the device has.
    """
    stream = current_stream(group.device)
    is_capture = is_capturing(group.device)
    # A graph's table is for its own replays, and what the host has uploaded before may be another's by then.
    is_dirty = is_dirty or is_capture or group.is_captured or group.device_table is None or group.stream != stream
    if not isinstance(scalars, torch.Tensor):
        tail = group.host_table[n_words:]
        values = scalars.reshape(-1).view(np.int64)
        if tail.tobytes() != values.tobytes():
            tail[:] = values
            is_dirty = True
    if is_dirty:
        if group.stream != stream:
            # A table is freed to the stream it was made on, so another stream gets its own.
            group.device_table = None
            share_with_streams(group.uploaded())
        group.stream = stream
        with on_device_of(group):
            make = _captured_table if is_capture else _uploaded_table
            group.device_table = make(group, torch.from_numpy(group.host_table))
    if isinstance(scalars, torch.Tensor):
        assert group.device_table is not None
        group.device_table[n_words:].view(torch.float64).copy_(scalars.reshape(-1))


def _uploaded_table(group: LaunchGroup, host: torch.Tensor) -> torch.Tensor:
    """The table on the device, and pinned memory for the graphs that may be captured next."""
    known = group.device_table
    if group.device.type != "cuda":
        # What is written to one is written to the other.
        return known if known is not None and known.data_ptr() == host.data_ptr() else host
    group.staging = [staging for staging in group.staging if staging.shape == host.shape]
    group.staging += [pinned(host) for _ in range(MAX_CAPTURED - len(group.staging))]
    if known is None or group.is_captured:
        group.is_captured = False
        return upload(host, group.device)
    # The launches of the step before, which read it, come first on this stream.
    return known.copy_(pinned(host), non_blocking=True)


def _captured_table(group: LaunchGroup, host: torch.Tensor) -> torch.Tensor:
    """A table that each replay uploads again, out of pinned memory that was made before and is the graphs' from now on.

    Graphs, and steps of one graph, that upload the same have it in common.
    """
    staging = next((known for known, _ in group.captured if torch.equal(known, host)), None)
    if staging is None:
        staging = next((unused for unused in group.staging if unused.shape == host.shape), None)
        if staging is None:
            raise RuntimeError(_no_staging(group))
        group.staging = [other for other in group.staging if other is not staging]
        staging.copy_(host)
    made = from_pinned(staging, group.device)
    group.captured.append((staging, made))
    group.is_captured = True
    return made


def _no_staging(group: LaunchGroup) -> str:
    if group.captured and not group.staging:
        return (
            f"CUDA graphs captured {MAX_CAPTURED} steps with other gradients since the last step outside of a capture: "
            "run a step between captures"
        )
    return FIRST_STEP


def on_device_of(group: LaunchGroup) -> AbstractContextManager[Any]:
    """Make a group's device the current one, which launches go to."""
    return on_device(group.device)
