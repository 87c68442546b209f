"""Trains in one process so that it can be killed at any moment and goes on where it was, to the last bit.

    pip install -e . && python examples/train_resumable.py --steps 200
    PYTHONPATH=. python examples/train_resumable.py                         # from a checkout that is not installed

Run it, kill it (`kill -9` if you like), run it again: the digest of all weights and optimizer states that it prints
in the end is that of a run that was never interrupted. Two things make it so:

* A checkpoint is complete or is not there. It is written under another name in the same folder, brought to the disk,
  and only then takes the place of the last one, which the file system does at once or not at all (`save`).
* It holds all that a step depends on: weights, the optimizer's states with the fp32 masters of the bf16 weights, the
  learning rate's schedule, the step, and the state of the random numbers that dropout draws. The data of a step follow
  from its number.
"""

from __future__ import annotations

import argparse
import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tritopt.optim import AdamW

WIDTH, BATCH_SIZE, SEED = 16, 32, 0


class Training:
    """A model, what trains it, and how far it has come."""

    def __init__(self, steps: int, device: torch.device, fused: bool | None = None) -> None:
        torch.manual_seed(SEED)
        self.model = nn.Sequential(nn.Linear(8, WIDTH), nn.Tanh(), nn.Dropout(0.1), nn.Linear(WIDTH, 1))
        self.model.to(device, torch.bfloat16)
        self.optimizer = AdamW(self.model.parameters(), lr=1e-2, max_grad_norm=1.0, fused=fused)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps)
        self.device = device
        self.step = 0

    def advance(self) -> float:
        """One step; returns the loss before it."""
        generator = torch.Generator().manual_seed(SEED + 1 + self.step)
        x = torch.randn(BATCH_SIZE, 8, generator=generator)
        y = (x[:, :1] * x[:, 1:2]).sin()
        loss: torch.Tensor = (self.model(x.to(self.device, torch.bfloat16)).float() - y.to(self.device)).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        self.step += 1
        return float(loss.detach())

    def state_dict(self) -> dict[str, Any]:
        """All that later steps depend on."""
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "cpu_rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        torch.set_rng_state(state["cpu_rng"])
        torch.cuda.set_rng_state_all(state["cuda_rng"])
        self.step = state["step"]

    def digest(self) -> str:
        """Digest of weights, masters and moments: equal only if all bits are."""
        digest = hashlib.sha256(str(self.step).encode())
        for param in self.model.parameters():
            for tensor in (param.detach(), *(value for _, value in sorted(self.optimizer.state[param].items()))):
                digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]


def save(checkpoint: Mapping[str, Any], path: Path) -> None:
    """Write a checkpoint so that `path` is at every moment a complete one: the last, or this."""
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        # Otherwise the new name could reach the disk before the content, and a power failure leave an empty file.
        os.fsync(file.fileno())
    os.replace(part, path)
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the new name too
        finally:
            os.close(folder)


def train(path: Path, steps: int, save_every: int, device: torch.device, fused: bool | None = None) -> Training:
    """Train up to this many steps in all, from the checkpoint if there is one."""
    training = Training(steps, device, fused)
    if path.exists():
        training.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        print(f"resumed at step {training.step}, digest {training.digest()}", flush=True)
    while training.step < steps:
        loss = training.advance()
        if training.step % save_every == 0 or training.step == steps:
            save(training.state_dict(), path)
            print(f"step {training.step}: loss {loss:.4f}, saved", flush=True)
    return training


def main(argv: Sequence[str] | None = None) -> str:
    """Train and print the digest."""
    parser = argparse.ArgumentParser(
        description="Training that survives kill -9.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--steps", type=positive_int, default=200, help="in all, earlier runs included")
    parser.add_argument("--save-every", type=positive_int, default=20, help="steps between checkpoints")
    parser.add_argument("--checkpoint", type=Path, default=Path("resumable.pt"), help="where it is kept")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="to train on")
    arguments = parser.parse_args(argv)
    if not arguments.checkpoint.parent.is_dir():
        parser.error(f"--checkpoint {arguments.checkpoint} must be in a folder that exists")
    training = train(arguments.checkpoint, arguments.steps, arguments.save_every, torch.device(arguments.device))
    print(f"step {training.step}: digest {training.digest()}")
    return training.digest()


def positive_int(text: str) -> int:
    """An argument that is at least 1."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return int(text)


if __name__ == "__main__":
    main()
