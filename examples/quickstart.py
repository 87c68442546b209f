"""Trains a small network on scikit-learn's handwritten digits in bf16, saves it half-way, and resumes from there.

    pip install scikit-learn && python examples/quickstart.py
    PYTHONPATH=. python examples/quickstart.py                   # from a checkout that is not installed

Takes seconds on a CPU, where the reference step runs; on a GPU each step is one fused launch.
"""

import tempfile

import torch
from sklearn.datasets import load_digits
from torch import nn

from tritopt.optim import AdamW  # in place of `from torch.optim import AdamW`

torch.manual_seed(0)
torch.set_default_device("cuda" if torch.cuda.is_available() else "cpu")
images, labels = (torch.tensor(array) for array in load_digits(return_X_y=True))
images = (images / 16).bfloat16()


def start() -> tuple[nn.Module, AdamW]:
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10)).bfloat16()
    return model, AdamW(model.parameters(), lr=1e-3)


def loss_of(model: nn.Module, batch: slice = slice(None)) -> torch.Tensor:
    return nn.functional.cross_entropy(model(images[batch]).float(), labels[batch])


def train(model: nn.Module, opt: AdamW, epochs: int) -> None:
    for first in [*range(0, len(images), 64)] * epochs:
        loss_of(model, slice(first, first + 64)).backward()
        opt.step()
        opt.zero_grad()


model, opt = start()
print(f"loss before:  {loss_of(model):.4f}")
train(model, opt, epochs=4)
checkpoint = f"{tempfile.gettempdir()}/digits.pt"
torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, checkpoint)
train(model, opt, epochs=4)
print(f"loss after:   {loss_of(model):.4f}")

model, opt = start()
saved = torch.load(checkpoint)
model.load_state_dict(saved["model"])
opt.load_state_dict(saved["opt"])
train(model, opt, epochs=4)
print(f"loss resumed: {loss_of(model):.4f}, from {checkpoint}")
