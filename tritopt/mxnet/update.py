"""An update: from lists of parameters to launches, or to the reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
import torch

from tritopt.engine import validate
from tritopt.engine.clip import Clip, squares
from tritopt.engine.launcher import Updates
from tritopt.engine.phase import LaunchSpec
from tritopt.engine.plan import Planner, Task, unavailable
from tritopt.engine.random_keys import noise_key
from tritopt.engine.replay import NormTables
from tritopt.engine.telemetry import Tracked, Tracker, refuse, whole
from tritopt.engine.walk import walk, warn_if_slow
from tritopt.kernels.formats.format import PLAIN, Format
from tritopt.kernels.preambles import without_clip
from tritopt.kernels.telemetry import measure
from tritopt.kernels.twins.random import Noise
from tritopt.mxnet.replay import Launched, Repeated, Replay, can_be_replayed
from tritopt.mxnet.scalars import ParameterScalars, Partition, scalars_at
from tritopt.mxnet.sparse import StandIn
from tritopt.mxnet.states import States, is_planes, structure
from tritopt.rule import State, Values


class Update(States):
    """The update of lists of parameters, built once and replayed while it holds."""

    rescale_grad: float | torch.Tensor
    max_grad_norm: float | None
    lazy_update: bool
    aggregate_num: float
    _checked: tuple[Any, ...]
    _tracker: Tracker
    _sizes: dict[Hashable, int]
    _known_scalars: dict[tuple[float, float, int], tuple[float, ...]]
    _planner: Planner
    _clip: Clip
    _partition: Partition

    @property
    def grad_norm(self) -> torch.Tensor | None:
        """Norm of the last update's gradients, rescaled and before the clip, fp32 [] on the device.

        None without max_grad_norm, and before the first update.
        """
        norm = self._clip.norm
        return None if norm is None or self.max_grad_norm is None else norm.clone()

    @property
    def grad_factor(self) -> torch.Tensor:
        """Size of the factor of gradients in the last update with max_grad_norm, fp64 []; NaN if that was skipped."""
        return self._clip.factor

    def scalars_of(self, index: Hashable, lr: float, wd: float, count: int) -> tuple[float, ...]:
        """`scalars`, for an optimizer whose parameters differ in more than these; computed once for equal arguments."""
        if self.is_per_parameter:
            return self.scalars_at(index, lr, wd, count)
        key = (lr, wd, count)
        if key not in self._known_scalars:
            self._known_scalars[key] = self.scalars(*key)
        return self._known_scalars[key]

    def _forget_plans(self) -> None:
        self._planner.forget()

    @torch.no_grad()
    def _run(
        self,
        indices: Sequence[Hashable],
        weights: Sequence[torch.Tensor],
        grads: Sequence[torch.Tensor],
        states: Sequence[State],
        fused: bool | None,
        key: str | None = None,
    ) -> None:
        """Build the update and make it; under a key it is kept, to be replayed."""
        tasks, on_kernel = self._tasks(indices, weights, grads, states, fused)
        if not any(map(validate.is_allocated, weights)):
            self._update_count(list(indices))
            return
        sparse = {
            i: StandIn(indices[i], task, self.lazy_update, on_kernel[i])
            for i, task in enumerate(tasks)
            if task.grad.layout != torch.strided
        }
        tasks = [sparse[i].task if i in sparse else task for i, task in enumerate(tasks)]
        if key is not None and any(on_kernel):  # the reference takes longer than any walk
            warn_if_slow()
        with self._counts_restored_on_error() as updates:
            grads_of = [task.grad for task in tasks]
            scale = self._gradient_scale(
                lambda: squares(self._planner, tuple(indices), grads_of),
                on_host=not any(on_kernel) and all(grad.device.type == "cpu" for grad in grads_of),
            )
            self._update_count(list(indices))
            launched = self._apply(indices, tasks, on_kernel, updates, scale)
        for stand_in in sparse.values():
            stand_in.write_back()
        is_whole = not sparse and sum(len(one.places) for one in launched) == len(tasks)
        norm_groups = [] if self.max_grad_norm is None else self._planner.groups_of_squares(tuple(indices))
        if key is not None and is_whole and norm_groups is not None and can_be_replayed(weights, grads, states):
            norm = NormTables(self._planner, norm_groups, np.arange(len(tasks)))
            replay = Replay(self, indices, weights, grads, states, launched, norm)
            self._planner.replays.put(_key(key, indices, weights), replay, len(tasks))

    def _replay_of(
        self, key: str, indices: list[Any], weights: list[Any], grads: list[Any], states: list[Any]
    ) -> Repeated | None:
        """An earlier update of these parameters that this one repeats."""
        try:
            replay: Replay | None = self._planner.replays.get(_key(key, indices, weights))
        except TypeError:  # an index that cannot be hashed, which the checks refuse
            return None
        validate.rescale(self.rescale_grad)
        if replay is None or self._skips(self._rescale()[0]):
            return None
        return replay.repeated(self, weights, grads, states)

    @torch.no_grad()
    def _run_again(self, repeated: Repeated) -> None:
        replay = repeated.replay
        with self._counts_restored_on_error() as updates:
            rescale, device_rescale = scale = self._gradient_scale(replay.squares)
            self._update_count(replay.indices)
            lrs = self._get_lrs(replay.indices)
            if self.skips_zero_lr and 0 in lrs:
                tasks, on_kernel = self._tasks(replay.indices, *repeated[1:4], self.use_fused_step)
                self._apply(replay.indices, tasks, on_kernel, updates, scale)
                return
            scalars = self._parameter_scalars(replay.indices, lrs, rescale)
            for launched in replay.launched:
                launch = self._launch(type(scalars.scalars[0]), launched.draws, launched.device, device_rescale)
                updates.begin(launched.indices)
                replay.launch(launched, scalars.of_launch(launched), self._planner.configured(launch))
                if launch.tracked is not None:
                    self._tracker.add(launched.indices, launch.tracked)
        walk().mark_written(repeated.weights)

    def _tasks(
        self,
        indices: Sequence[Hashable],
        weights: Sequence[torch.Tensor],
        grads: Sequence[torch.Tensor],
        states: Sequence[State],
        fused: bool | None,
    ) -> tuple[list[Task], list[bool]]:
        """The parameters' tensors, checked, and for each whether it runs on the kernel."""
        validate.rescale(self.rescale_grad)
        tasks = [self._task(*item) for item in zip(indices, weights, grads, states, strict=True)]
        on_kernel = [self._runs_fused(index, weight, fused) for index, weight in zip(indices, weights, strict=True)]
        if self.track and any(on_kernel) and not all(phase.is_driver for phase in self.phases):
            refuse(type(self).__name__, "use_fused_step=False")
        self._planner.check_aliases(tuple(indices), indices, tasks)
        return tasks, on_kernel

    def _runs_fused(self, index: Hashable, weight: torch.Tensor, wanted: bool | None) -> bool:
        if wanted is False:
            return False
        reason = (
            unavailable(weight, "pass use_fused_step=False to run the reference step")
            if self.phases
            else f"{type(self).__name__} has no kernel; pass use_fused_step=False"
        )
        if reason and wanted:
            raise ValueError(f"parameter {index!r}, use_fused_step=True: {reason}")
        return reason is None

    def _task(self, index: Hashable, weight: torch.Tensor, grad: torch.Tensor, state: State) -> Task:
        """The parameter's tensors, checked."""
        n_states = len(self.state_names)
        planes: Values = (weight.detach(),)
        fmt, inner = self._format_of(index, weight), state
        if self._has_companion(fmt, weight, state):
            planes, inner = (*planes, state[0].detach()), state[1]
        elif fmt.companion:
            fmt = PLAIN  # a state of `create_state`, which `update` takes
        values, wanted = self._values(inner), self.state_formats()
        is_right = len(values) == n_states and all(map(is_planes, values))
        if not is_right or any(isinstance(v, tuple) and not f.block for v, f in zip(values, wanted, strict=True)):
            raise ValueError(
                f"parameter {index!r}: {type(self).__name__} keeps states ({', '.join(self.state_names)}) per weight, "
                f"got {structure(state)}; create them with create_state_multi_precision(index, weight), or bring "
                "those of another state_dtype with convert_state(index, weight, state)"
            )
        for plane in planes[1:]:
            validate.state_tensor(index, plane, weight, weight.shape, fmt.dtype_of_companion(weight.dtype))
        formats: list[Format] = []
        flat: list[torch.Tensor] = []
        for value, stored_as, shape in zip(values, wanted, self.state_shapes(weight.shape), strict=True):
            of_state = value if isinstance(value, tuple) else (value,)
            is_plain = stored_as is PLAIN or (len(of_state) == 1 and value.dtype == torch.float32)
            formats.append(PLAIN if is_plain else stored_as)
            validate.state_planes(index, of_state, weight, shape, formats[-1])
            flat.extend(of_state)
        task = Task(planes, fmt, grad.detach(), tuple(flat), state_formats=tuple(formats))
        return task._replace(noise=(noise_key(self.rounding_seed, index), 0, 0, 0)) if task.draws else task

    def _apply(
        self,
        indices: Sequence[Hashable],
        tasks: Sequence[Task],
        on_kernel: Sequence[bool],
        updates: Updates[Hashable],
        scale: tuple[float, torch.Tensor | None],
    ) -> list[Launched]:
        """One update of each task, whose counts have been advanced, all of them first. `updates` is told of each.

        scale: `_gradient_scale`. Returns the launches whose groups took the tensors as they are.
        """
        lrs = self._get_lrs(indices)
        rescale, device_rescale = scale
        scalars = self._parameter_scalars(indices, lrs, rescale)
        if self.track:
            self._sizes.update((index, task.grad.numel()) for index, task in zip(indices, tasks, strict=True))
        if self._skips(rescale):
            if self.track:
                self._tracker.add(indices, [whole(i, measure(task.grad)) for i, task in enumerate(tasks)])
            return []
        live = [i for i, lr in enumerate(lrs) if not (lr == 0 and self.skips_zero_lr)]
        by_launch: dict[tuple[bool, torch.device], list[int]] = {}
        for i in live:
            if on_kernel[i]:
                by_launch.setdefault((tasks[i].draws, tasks[i].grad.device), []).append(i)
        replayable = []
        for (draws, device), places in by_launch.items():
            launch = self._launch(type(scalars.scalars[0]), draws, device, device_rescale)
            launched = Launched([indices[i] for i in places], places, draws, device)
            updates.begin(launched.indices)
            groups = self._planner.apply(
                tuple(launched.indices),
                [tasks[i] for i in places],
                scalars.of_launch(launched),
                launch,
            )
            if groups is not None:
                replayable.append(launched._replace(groups=tuple(groups)))
            if launch.tracked is not None:
                self._tracker.add(launched.indices, launch.tracked)
        for i in live:
            if not on_kernel[i]:
                place = scalars.place_of[i]
                values, of_rule = scalars.values[place], scalars.scalars[place]
                self._apply_reference(indices[i], tasks[i], values, of_rule, device_rescale, updates)
        return replayable

    def _apply_reference(
        self,
        index: Hashable,
        task: Task,
        values: tuple[float, ...],
        scalars: Any,
        device_rescale: torch.Tensor | None,
        updates: Updates[Hashable],
    ) -> None:
        noise = Noise(*task.noise, values[-1]) if task.draws else None
        tracked: list[Tracked] | None = [] if self.track else None
        updates.begin([index], task.versions)
        self.apply_reference(task, values[:3], scalars, device_rescale, noise=noise, tracked=tracked)
        if tracked is not None:
            self._tracker.add([index], tracked)

    def _launch(
        self, scalars: type, draws: bool, device: torch.device, device_rescale: torch.Tensor | None
    ) -> LaunchSpec:
        return LaunchSpec(
            self.phases,
            scalars,
            self.preamble if self._clip_bound() < math.inf else without_clip(self.preamble),
            None if device_rescale is None else device_rescale.to(device),
            skip_zero_rescale=self.skips_zero_rescale,
            draws=draws,
            tracked=[] if self.track else None,
        )

    def _parameter_scalars(self, indices: Sequence[Hashable], lrs: list[float], rescale: float) -> ParameterScalars:
        wds = self._get_wds(indices)
        counts = list(map(self._index_update_count.__getitem__, indices))
        bound = self._clip_bound()
        self._known_scalars = {}  # of this step alone: hyperparameters may be assigned between steps
        is_own = type(self).scalars_of is not Update.scalars_of or "scalars_of" in vars(self) or self.is_per_parameter
        firsts, place_of = self._partition.of([lrs, wds], counts, [indices] if is_own else [])

        def scalars_of(place: int, lr: float, wd: float, count: int) -> Any:
            return self.scalars_of(indices[place], lr, wd, count) if is_own else self.scalars(lr, wd, count)

        return scalars_at((rescale, bound), firsts, place_of, lrs, wds, counts, scalars_of)

    def _clip_bound(self) -> float:
        """Bound of the gradients' elements; infinity where there is none."""
        return validate.bound_or(self.clip_gradient, math.inf) if self.clips else math.inf

    def _skips(self, rescale: float) -> bool:
        """Whether this rescale, on the host, leaves weights and states alone."""
        return not math.isfinite(rescale) or (rescale == 0 and self.skips_zero_rescale)

    def _gradient_scale(
        self, measure: Callable[[], torch.Tensor], on_host: bool = False
    ) -> tuple[float, torch.Tensor | None]:
        """Factor of gradients: a number, and a device scalar that multiplies it, None if there is none.

        With max_grad_norm the latter is the clip's factor, NaN where the norm is not finite, which skips the update.

        measure: returns the sum of squares of each gradient, fp64. on_host: the factor is wanted as a number.
        """
        rescale, on_device = self._rescale()
        if self.max_grad_norm is None or self._skips(rescale):
            return rescale, on_device
        sums = measure()
        if on_device is None:
            factor = self._clip(sums, self.max_grad_norm, abs(rescale), self._planner.record)
        else:
            signed = on_device.to(sums.device, torch.float64).reshape(())
            factor = self._clip(sums, self.max_grad_norm, signed.abs(), self._planner.record).copysign(signed)
        sign = 1.0 if on_device is not None else math.copysign(1.0, rescale)
        return (sign * float(factor), None) if on_host else (sign, factor)

    def _rescale(self) -> tuple[float, torch.Tensor | None]:
        """rescale_grad as a number, and as a device scalar if it lives on a GPU (then the number is 1)."""
        value = self.rescale_grad
        on_device = isinstance(value, torch.Tensor) and value.device.type != "cpu"
        return (1.0, value) if on_device else (float(value), None)  # type: ignore[return-value]


def _key(name: str, indices: Sequence[Hashable], weights: Sequence[Any]) -> Hashable:
    """Key that an update is kept under: an optimizer may serve as many devices as it has updaters."""
    return name, getattr(next(iter(weights), None), "device", None), tuple(indices)
