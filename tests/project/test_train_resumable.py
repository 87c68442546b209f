"""The resumable example is killed (SIGKILL) again and again, between and in the middle of writing checkpoints."""

from __future__ import annotations

import contextlib
import io
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from examples import train_resumable
from tests.support.world import forks

pytestmark = [
    pytest.mark.xdist_group("distributed"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked and killed, as POSIX systems can"),
]

N_KILLS = int(os.environ.get("TRITOPT_KILLS", "10"))
"""All 50 are run by TRITOPT_KILLS=50."""
SAVE_EVERY = 3
STEPS = 10 * N_KILLS + 20
PLACES = ("training", "in torch.save", "before the new name", "after the new name", "at some moment")
CPU = torch.device("cpu")


class Kill(NamedTuple):
    """Moment at which a process ends."""

    place: str
    after: int
    """Steps, or checkpoints, that it gets through before."""
    share: float
    """Share of a checkpoint's bytes that reach the file, or of a second."""


def run(path: Path, log: Path, kill: Kill | None) -> None:
    """The example, ended as `kill` says; each line of the log is a digest at a step."""
    torch.set_num_threads(1)
    torch.set_deterministic_debug_mode("error")
    with contextlib.redirect_stdout(io.StringIO()), pytest.MonkeyPatch.context() as patch:
        note = Log(log)
        patch.setattr(train_resumable.Training, "load_state_dict", note.of_load())
        patch.setattr(os, "replace", note.of_replace(path, kill))
        if kill is not None and kill.place == "training":
            patch.setattr(torch.optim.lr_scheduler.CosineAnnealingLR, "step", dying_at_call(kill.after))
        if kill is not None and kill.place == "in torch.save":
            patch.setattr(torch, "save", dying_save(kill))
        training = train_resumable.train(path, STEPS, SAVE_EVERY, CPU, fused=False)
    note("done", training)


class Log:
    """Lines that a killed process leaves behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, word: str, training: train_resumable.Training) -> None:
        with open(self.path, "a") as file:
            file.write(f"{word} {training.step} {training.digest()}\n")

    def of_load(self) -> Callable[..., None]:
        load = train_resumable.Training.load_state_dict

        def logged(training: train_resumable.Training, state: Any) -> None:
            load(training, state)
            self("resumed", training)

        return logged

    def of_replace(self, path: Path, kill: Kill | None) -> Callable[..., None]:
        replace, calls = os.replace, 0

        def logged(source: Path, target: Path) -> None:
            nonlocal calls
            is_last = kill is not None and kill.place.endswith("the new name") and calls == kill.after
            calls += 1
            if is_last and kill is not None and kill.place.startswith("before"):
                die()
            replace(source, target)
            if is_last:
                die()

        return logged


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def dying_at_call(n: int) -> Callable[..., None]:
    step, calls = torch.optim.lr_scheduler.CosineAnnealingLR.step, 0

    def dying(scheduler: Any, *arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > n + 1:  # the constructor makes the first call
            die()
        step(scheduler, *arguments)

    return dying


def dying_save(kill: Kill) -> Callable[..., None]:
    save, calls = torch.save, 0

    def dying(value: Any, file: Any) -> None:
        nonlocal calls
        calls += 1
        if calls <= kill.after:
            save(value, file)
            return
        complete = io.BytesIO()
        save(value, complete)
        torn: Any = DyingFile(file, int(kill.share * complete.tell()))
        save(value, torn)

    return dying


class DyingFile(io.RawIOBase):
    """Takes so many bytes, brings them to the disk, and ends the process."""

    def __init__(self, file: Any, n_bytes: int) -> None:
        self.file, self.left = file, n_bytes

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.file.write(bytes(data)[: self.left])
        if len(data) > self.left:
            self.file.flush()
            os.fsync(self.file.fileno())
            die()
        self.left -= len(data)
        return len(data)


@pytest.fixture(scope="module")
def uninterrupted() -> tuple[dict[int, str], list[bytes]]:
    """Digests after each step."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng(), torch.device("cpu"):
        training = train_resumable.Training(STEPS, CPU, fused=False)
        digests = {}
        while training.step < STEPS:
            training.advance()
            digests[training.step] = training.digest()
    torch.set_num_threads(n_threads)
    return digests, [param.detach().view(torch.uint8).numpy().tobytes() for param in training.model.parameters()]


def test_a_run_that_is_killed_ends_like_one_that_is_not(
    uninterrupted: tuple[dict[int, str], list[bytes]], tmp_path: Path
) -> None:
    digests, weights = uninterrupted
    path, log = tmp_path / "checkpoint.pt", tmp_path / "log"
    log.touch()
    chance = random.Random(0)
    context = forks()
    n_kills = n_torn = 0
    while True:
        kill = None
        if n_kills < N_KILLS:
            kill = Kill(PLACES[n_kills % len(PLACES)], chance.randint(0, 7) if n_kills % 5 == 0 else 1, chance.random())
        before = torch.load(path, weights_only=True)["step"] if path.exists() else 0
        n_lines = len(log.read_text().splitlines())
        process = context.Process(target=run, args=(path, log, kill))
        process.start()
        if kill is not None and kill.place == "at some moment":
            while len(log.read_text().splitlines()) == n_lines and before:
                time.sleep(0.001)  # until it has resumed
            time.sleep(0.01 * kill.share)
            process.kill()
        process.join(60)
        lines = [line.split() for line in log.read_text().splitlines()[n_lines:]]
        if before:
            assert lines[0][:2] == ["resumed", str(before)]
        for word, step, digest in lines:
            assert digests[int(step)] == digest, (word, step, kill)
        if kill is None:
            assert process.exitcode == 0
            assert lines[-1][:2] == ["done", str(STEPS)]
            break
        assert process.exitcode == -signal.SIGKILL, (process.exitcode, kill)
        n_kills += 1
        part = tmp_path / "checkpoint.pt.part"
        if kill.place == "in torch.save":
            assert part.exists()
            with pytest.raises((RuntimeError, OSError)):
                torch.load(part, weights_only=True)
            n_torn += 1
        after = torch.load(path, weights_only=True)["step"]
        assert before <= after
        assert after % SAVE_EVERY == 0
        if kill.place in ("in torch.save", "before the new name"):
            assert after == before + SAVE_EVERY  # of two checkpoints the first is there
        if kill.place == "after the new name":
            assert after == before + 2 * SAVE_EVERY
    assert n_kills == N_KILLS
    assert n_torn >= N_KILLS // len(PLACES)
    saved = torch.load(path, weights_only=True)
    assert saved["step"] == STEPS
    assert [value.view(torch.uint8).numpy().tobytes() for value in saved["model"].values()] == weights


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.pt"
    arguments = ["--checkpoint", str(path), "--save-every", "2", "--device", "cpu"]
    with torch.device("cpu"):
        train_resumable.main([*arguments, "--steps", "2"])
        resumed = train_resumable.main([*arguments, "--steps", "2"])
    assert f"resumed at step 2, digest {resumed}" in capsys.readouterr().out
    for wrong in (["--steps", "0"], ["--checkpoint", str(tmp_path / "no" / "folder.pt")]):
        with pytest.raises(SystemExit):
            train_resumable.main(wrong)
