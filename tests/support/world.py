"""Processes that form a torch.distributed world on the CPU, and run functions of the tests in it."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import connection, forkserver
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tritopt.tools.interpreter import speed_up

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = timedelta(seconds=30)
REASON = None if dist.is_available() and dist.is_gloo_available() else "this torch has no torch.distributed with gloo"
_PRELOADED = (
    "torch._dynamo",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "tritopt.optim",
    "pytest",
)
"""Modules that the tests' functions need, imported once for all ranks."""


def forks() -> Any:
    """A multiprocessing context whose processes are forked, in milliseconds, from one that has imported tritopt.

    Not from this process, whose threads a fork would not survive. Kernels run in the interpreter there, or, where this
    process has them in the PTX machine, in that.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*_PRELOADED, "tests.support.world"])
    kept = {name: os.environ.get(name) for name in ("PYTHONPATH", "TRITON_INTERPRET")}
    os.environ.update(PYTHONPATH=str(ROOT), TRITON_INTERPRET="0" if os.environ.get("TRITOPT_PTX") else "1")
    try:
        forkserver.ensure_running()
    finally:
        for name, value in kept.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    return context


class World:
    """Ranks of one process group; they start when they are first needed, and again after a failure."""

    def __init__(self, size: int, folder: Path) -> None:
        self.size, self.folder = size, folder
        self._starts = 0
        self._pipes: list[Any] = []
        self._processes: list[Any] = []

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Return what `function(*arguments)`, of an importable module, returns in each rank.

        Raises:
            AssertionError: it failed in a rank, with that rank's traceback.
        """
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((function, arguments))
        results: dict[int, Any] = {}
        while len(results) < self.size:
            waiting = [pipe for rank, pipe in enumerate(self._pipes) if rank not in results]
            ready = connection.wait(waiting, timeout=4 * TIMEOUT.total_seconds())
            if not ready:
                self.close()
                raise AssertionError(f"ranks {sorted(set(range(self.size)) - set(results))} do not answer")
            for pipe in ready:
                rank = self._pipes.index(pipe)
                failure, results[rank] = _received(pipe)
                if failure is not None:
                    self.close()  # the others wait for this one in a collective
                    raise AssertionError(f"rank {rank} of {self.size}: {failure}")
        return [results[rank] for rank in range(self.size)]

    def _start(self) -> None:
        context = forks()
        self._starts += 1
        meeting = self.folder / f"meeting_{self.size}_{self._starts}"
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.size, str(meeting), theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def close(self) -> None:
        """End the processes of all ranks."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.kill()
            process.join()
        self._pipes, self._processes = [], []


def _received(pipe: Any) -> tuple[str | None, Any]:
    try:
        return pipe.recv()  # type: ignore[no-any-return]
    except EOFError:
        return "it died", None


def _serve(rank: int, size: int, meeting: str, pipe: Any) -> None:
    faulthandler.enable()
    torch.set_num_threads(1)
    torch.set_deterministic_debug_mode("error")
    if target := os.environ.get("TRITOPT_PTX"):
        from tritopt.tools.ptx.driver import switch_on

        switch_on(int(target))
    else:
        speed_up()
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size, timeout=TIMEOUT)
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        answer: tuple[str | None, Any]
        try:
            answer = None, function(*arguments)
        except BaseException:
            answer = traceback.format_exc(), None
        pipe.send(answer)
