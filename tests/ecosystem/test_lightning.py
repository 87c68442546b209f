"""A run of Lightning's Trainer on a tiny model in bf16, with a scheduler, checkpoints and a bit-exact resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tritopt.optim import AdamW

pytestmark = [
    # Lightning's own: its pytree helper, and advice about data loaders.
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the logging interval"),
]
STEPS = 8


@pytest.fixture(scope="module")
def lightning() -> Any:
    return pytest.importorskip("lightning", reason="pip install tritopt[ecosystem]")


def make_module(lightning: Any, **options: Any) -> Any:
    class Regression(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layers = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
            self.losses: list[float] = []

        def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
            (x,) = batch
            loss: torch.Tensor = (self.layers(x) - x.sum(dim=1, keepdim=True)).square().mean()
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self) -> dict[str, Any]:
            opt = AdamW(self.parameters(), lr=0.05, weight_decay=0.1, **options)
            schedule = torch.optim.lr_scheduler.OneCycleLR(opt, 0.05, total_steps=STEPS)
            return {"optimizer": opt, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    return Regression()


def batches(n: int) -> Any:
    x = torch.randn(4 * n, 4, generator=torch.Generator("cpu").manual_seed(0), device="cpu").bfloat16()
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=4)


def fit(lightning: Any, module: Any, folder: Path, steps: int, resume: Path | None = None, **options: Any) -> Any:
    trainer = lightning.Trainer(
        accelerator="auto" if torch.cuda.is_available() else "cpu",
        devices=1,
        precision="bf16-true",
        max_steps=steps,
        default_root_dir=str(folder),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    # One batch an epoch where nothing is accumulated: Lightning resumes epochs exactly, but not batches within them.
    trainer.fit(
        module, batches(options.get("accumulate_grad_batches", 1)), ckpt_path=None if resume is None else str(resume)
    )
    return trainer


def test_trains_saves_and_resumes_bit_exactly(lightning: Any, tmp_path: Path) -> None:
    whole = make_module(lightning)
    trainer = fit(lightning, whole, tmp_path, STEPS)
    (opt,) = trainer.optimizers
    assert isinstance(opt, AdamW)
    assert all(p.dtype == torch.bfloat16 for p in whole.parameters())
    assert whole.losses[-1] < 0.9 * whole.losses[0]
    assert [float(state["step"]) for state in opt.state.values()] == [float(STEPS)] * 4

    checkpoint = tmp_path / "half.ckpt"
    half = fit(lightning, make_module(lightning), tmp_path, STEPS // 2)
    half.save_checkpoint(checkpoint)
    saved = torch.load(checkpoint, weights_only=True)["optimizer_states"][0]
    assert all(state["master_remainder"].dtype == torch.float16 for state in saved["state"].values())

    resumed = make_module(lightning)
    with torch.no_grad():
        for p in resumed.parameters():
            p.zero_()  # what the checkpoint does not bring would show
    (opt_resumed,) = fit(lightning, resumed, tmp_path, STEPS, checkpoint).optimizers
    for a, b in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(opt_resumed.master_weights(), opt.master_weights(), strict=True):
        assert torch.equal(a, b)
    assert any(not torch.equal(m, m.bfloat16().float()) for m in opt.master_weights())


def test_accumulation_and_clipping(lightning: Any, tmp_path: Path) -> None:
    """Lightning's own clip, by torch's function, and ours in the step lead to the same weights."""
    by_lightning, ours = make_module(lightning), make_module(lightning, max_grad_norm=0.1)
    fit(lightning, by_lightning, tmp_path, 2, accumulate_grad_batches=2, gradient_clip_val=0.1)
    (opt,) = fit(lightning, ours, tmp_path, 2, accumulate_grad_batches=2).optimizers
    assert opt.grad_norm > 0.1
    start = make_module(lightning)
    for a, b, first in zip(ours.parameters(), by_lightning.parameters(), start.parameters(), strict=True):
        moved = (b.float() - first.bfloat16().float()).abs().max()
        assert moved > 0
        # torch rounds clipped gradients to bf16, 2^-9 off; Adam's step, which divides by their size, sees little of it.
        assert (a.float() - b.float()).abs().max() <= 0.05 * moved + torch.finfo(torch.bfloat16).eps * b.abs().max()
