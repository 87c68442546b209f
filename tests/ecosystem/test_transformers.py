"""A run of Hugging Face's Trainer: a tiny model built from a config, checkpoints, and a resume that is bit-exact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tritopt.optim import LAMB, AdamW

transformers = pytest.importorskip("transformers", reason="pip install tritopt[ecosystem]")
pytest.importorskip("accelerate", reason="pip install tritopt[ecosystem]")

STEPS = 4


def make_model() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=16,
    )
    return transformers.LlamaForCausalLM(config).to(torch.bfloat16)


class Tokens(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """The same for the same index."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = torch.randint(0, 32, (8,), generator=torch.Generator("cpu").manual_seed(index), device="cpu")
        return {"input_ids": tokens, "labels": tokens}


def make_trainer(folder: Path, model: Any, **options: Any) -> Any:
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=STEPS,
        save_steps=2,
        logging_steps=1,
        learning_rate=0.05,
        lr_scheduler_type="linear",
        report_to=[],
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
    return transformers.Trainer(model, arguments, train_dataset=Tokens(), **options)


def masters(optimizer: Any) -> list[torch.Tensor]:
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    return [m.detach().clone() for m in inner.master_weights()]


def test_trains_saves_and_resumes_bit_exactly(tmp_path: Path) -> None:
    model = make_model()
    first = [p.detach().clone() for p in model.parameters()]
    opt = AdamW(model.parameters(), lr=0.05, weight_decay=0.1, max_grad_norm=0.5)
    trainer = make_trainer(tmp_path, model, optimizers=(opt, None))
    trainer.train()
    assert all(not torch.equal(p, old) for p, old in zip(model.parameters(), first, strict=True))
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert rates == pytest.approx([0.05, 0.0375, 0.025, 0.0125])
    assert [float(state["step"]) for state in opt.state.values()] == [float(STEPS)] * len(opt.state)
    assert opt.grad_norm is not None
    assert opt.grad_norm > 0

    saved = torch.load(tmp_path / "checkpoint-2" / "optimizer.pt", weights_only=True)
    assert all(state["master_remainder"].dtype == torch.float16 for state in saved["state"].values())

    again = make_model()
    with torch.no_grad():
        for p in again.parameters():
            p.zero_()  # what the checkpoint does not bring would show
    resumed = AdamW(again.parameters(), lr=0.05, weight_decay=0.1, max_grad_norm=0.5)
    trainer = make_trainer(tmp_path / "resumed", again, optimizers=(resumed, None))
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert trainer.state.global_step == STEPS
    for a, b in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(masters(resumed), masters(opt), strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, a.bfloat16().float())  # bits that only a master holds


@pytest.mark.parametrize("cls", [AdamW, LAMB])
def test_the_trainer_makes_the_optimizer(cls: Any, tmp_path: Path) -> None:
    model = make_model()
    trainer = make_trainer(
        tmp_path, model, optimizer_cls_and_kwargs=(cls, {"lr": 0.05, "betas": (0.8, 0.9), "max_grad_norm": 0.5})
    )
    trainer.train()
    inner = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    assert type(inner) is cls
    assert [group["weight_decay"] for group in inner.param_groups] == [0.0, 0.0]  # one with decay, one without
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == STEPS
    assert all(0 < loss < 10 for loss in losses)
    assert inner.grad_norm > 0
