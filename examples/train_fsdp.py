"""Trains a small transformer whose parameters, gradients and optimizer states are spread over processes by FSDP2.

    torchrun --nproc-per-node 2 examples/train_fsdp.py --steps 20
    torchrun --nproc-per-node 2 examples/train_fsdp.py --steps 20 --optimizer mixed

Runs on GPUs with NCCL, and without them on the CPU with gloo. Weights are bf16; the optimizer keeps fp32 masters of
them and clips by the norm of the whole gradient. Of tritopt there is one line, the import: an optimizer that is made
after `fully_shard` works on each process's own shards. "mixed" is Muon for the matrices of hidden layers, each of
which one process orthogonalises whole, and AdamW for the rest.

A run that was killed goes on from its last checkpoint, also on another number of processes. Each process writes its
part of one into a folder (torch.distributed.checkpoint), which gets its final name when it is complete, and only then
is the one before removed. Processes on several machines need a folder that all of them see.

The task: sequences in which each token follows from the last.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from tritopt.optim import AdamW, Mixed

SEED = 0


@dataclass(frozen=True)
class Config:
    """Sizes of the model and of the data."""

    vocabulary: int = 31
    context: int = 16
    width: int = 32
    heads: int = 4
    depth: int = 2
    batch: int = 8
    """Number of sequences per process and step."""


class Block(nn.Module):
    """Causal attention, then two layers, each added to its input."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads = config.heads
        self.norms = nn.ModuleList(nn.LayerNorm(config.width) for _ in range(2))
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)
        self.mlp = nn.Sequential(
            nn.Linear(config.width, 4 * config.width), nn.GELU(), nn.Linear(4 * config.width, config.width)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, context, width] to the same."""
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[1](x))  # type: ignore[no-any-return]


class Transformer(nn.Module):
    """Predicts each next token."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocabulary, config.width)
        self.places = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocabulary)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """The loss on sequences [batch, context + 1], fp32 []."""
        known, wanted = tokens[:, :-1], tokens[:, 1:]
        x = self.tokens(known) + self.places(torch.arange(known.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x)).float()
        return nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten())


def batch_of(config: Config, step: int, rank: int) -> torch.Tensor:
    """A step's sequences [batch, context + 1], which follow from its number and the process's: nothing to save."""
    generator = torch.Generator().manual_seed((SEED + step) * 65536 + rank)
    tokens = [torch.randint(config.vocabulary, (config.batch,), generator=generator)]
    for _ in range(config.context):
        tokens.append((3 * tokens[-1] + 7) % config.vocabulary)
    return torch.stack(tokens, dim=1)


class Training:
    """Model in training, its optimizer, and how far it has come."""

    def __init__(
        self, config: Config, steps: int, learning_rate: float, device: torch.device, optimizer: str = "adamw"
    ) -> None:
        torch.manual_seed(SEED)  # the same weights in every process
        self.config, self.device = config, device
        self.step, self.loss = 0, float("nan")
        model = Transformer(config).to(device, torch.bfloat16)
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
        for block in model.blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        self.model = model
        self.optimizer: AdamW | Mixed
        if optimizer == "mixed":
            muon = {"algorithm": "Muon", "lr": 2 * learning_rate, "in_norm": False}
            adamw = {"algorithm": "AdamW", "lr": learning_rate, "weight_decay": 0.1}
            # Query, key and value are three matrices.
            patterns = {"*.qkv.weight": {**muon, "split": 3}}
            self.optimizer = Mixed.from_module(model, muon, adamw, patterns=patterns, max_grad_norm=1.0)
        else:
            self.optimizer = AdamW(model.parameters(), lr=learning_rate, weight_decay=0.1, max_grad_norm=1.0)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps)

    def advance(self) -> torch.Tensor:
        """One step; returns this process's loss before it."""
        loss: torch.Tensor = self.model(batch_of(self.config, self.step, dist.get_rank()).to(self.device))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        self.step += 1
        return loss.detach()

    def state(self) -> dict[str, Any]:
        """Content of a checkpoint. Its tensors are those of the run, spread over the processes."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer, "scheduler": self.scheduler.state_dict(), "step": self.step}

    def save(self, folder: Path, keep: int = 1) -> None:
        """Write a checkpoint; it gets its name when all processes are done, and then older ones than `keep` go."""
        path = folder / f"step_{self.step}"
        part = path.with_suffix(".part")
        if dist.get_rank() == 0:
            shutil.rmtree(part, ignore_errors=True)
        dist.barrier()
        save(self.state(), checkpoint_id=part)
        dist.barrier()
        if dist.get_rank() == 0:
            bring_to_disk(part)
            os.replace(part, path)
            bring_to_disk(folder)
            for _, old in checkpoints(folder)[:-keep]:
                shutil.rmtree(old)
        dist.barrier()

    def load(self, path: Path) -> None:
        """Go on from a checkpoint, whatever number of processes wrote it."""
        state = self.state()
        load(state, checkpoint_id=path)
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.step = state["step"]


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """The complete ones by step."""
    named = [(re.fullmatch(r"step_(\d+)", path.name), path) for path in folder.iterdir()]
    return sorted((int(match[1]), path) for match, path in named if match)


def bring_to_disk(folder: Path) -> None:
    """Flush a file or folder to disk, so that a power failure cannot leave a name without its content."""
    if os.name != "posix":
        return
    for path in (*(path for path in folder.iterdir() if path.is_file()), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def average(value: torch.Tensor) -> float:
    """Average a number over the processes."""
    value = value.clone()
    dist.all_reduce(value)
    return value.item() / dist.get_world_size()


def train(arguments: argparse.Namespace, device: torch.device) -> Training:
    """Train up to that many steps in all, from the last checkpoint if there is one."""
    is_first = dist.get_rank() == 0
    arguments.folder.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    training = Training(Config(), arguments.steps, arguments.learning_rate, device, arguments.optimizer)
    saved = checkpoints(arguments.folder)
    if saved:
        training.load(saved[-1][1])
        if is_first:
            print(f"resumed at step {training.step}", flush=True)
    while training.step < arguments.steps:
        mine = training.advance()
        is_last = training.step == arguments.steps
        if is_last or training.step % 10 == 0:
            training.loss = average(mine)
            norm = training.optimizer.grad_norm
            if is_first and norm is not None:
                print(f"step {training.step}: loss {training.loss:.4f}, gradient norm {norm.item():.3f}", flush=True)
        if is_last or training.step % arguments.save_every == 0:
            training.save(arguments.folder)
    return training


def main(argv: Sequence[str] | None = None) -> Training:
    """Join the other processes that torchrun has started, and train."""
    parser = argparse.ArgumentParser(
        description="A small transformer under FSDP2.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--steps", type=positive_int, default=200, help="in all, earlier runs included")
    parser.add_argument("--learning-rate", type=float, default=1e-2, help="the highest of the schedule")
    parser.add_argument("--optimizer", choices=("adamw", "mixed"), default="adamw", help="mixed: Muon and AdamW")
    parser.add_argument("--save-every", type=positive_int, default=50, help="steps between checkpoints")
    parser.add_argument("--folder", type=Path, default=Path("fsdp_checkpoints"), help="of the checkpoints")
    arguments = parser.parse_args(argv)
    if "RANK" not in os.environ and not dist.is_initialized():
        parser.error("start it by torchrun: torchrun --nproc-per-node 2 examples/train_fsdp.py")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    joins = not dist.is_initialized()
    if joins:
        dist.init_process_group("cuda:nccl,cpu:gloo" if device.type == "cuda" else "gloo")
    try:
        return train(arguments, device)
    finally:
        if joins:
            dist.destroy_process_group()


def positive_int(text: str) -> int:
    """An argument that is at least 1."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return int(text)


if __name__ == "__main__":
    main()
