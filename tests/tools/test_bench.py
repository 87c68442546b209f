"""`tritopt bench`: what it says of a step is right, as far as that can be known without a GPU."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import signal
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from tests.support.training import CLASSES
from tritopt import optim
from tritopt.commands.app import app
from tritopt.kernels.formats.weights import SPLIT16
from tritopt.kernels.language import INTERPRETED
from tritopt.optim.adam import TorchAdam
from tritopt.optimizers import AdamW
from tritopt.tools.bench import machine, measure, peers, plot, run, targets
from tritopt.tools.bench.device import Device, Rehearsal
from tritopt.tools.bench.measure import Measurement
from tritopt.tools.bench.peers import PEERS, Peer
from tritopt.tools.bench.plan import ELEMENTWISE, MAIN, MIXED, SUMMING, Item, plan
from tritopt.tools.bench.run import Bench, find_device
from tritopt.tools.bench.shapes import MODELS, Model, miniature, suited
from tritopt.tools.cost import bytes_per_parameter
from tritopt.tools.storage import FORMATS

interpreted = pytest.mark.skipif(not INTERPRETED, reason="a rehearsal runs in Triton's interpreter")
FUSED = next(peer for peer in PEERS if peer.name == "torch fused")
ADAMW = Item("resnet50", "AdamW", MAIN)


def rehearsal(*items: Item, **arguments: Any) -> Bench:
    return Bench(Rehearsal(), items, **arguments)


def command(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["bench", *arguments])


# Shapes.


@pytest.mark.parametrize(
    ("name", "elements", "tensors"),
    [("resnet50", 25_557_032, 161), ("gpt2-xl", 1_557_611_200, 580), ("llama3-8b", 8_030_261_248, 291),
     # bert-large-uncased: the encoder with its pooler; 336,226,108 with the heads of pretraining.
     ("bert-large", 335_141_888, 391), ("tiny", 10_000_000, 10_000), ("huge", 2**31 + 4096, 1)],
)  # fmt: skip
def test_models_have_as_many_parameters_as_published(name: str, elements: int, tensors: int) -> None:
    shapes = MODELS[name].shapes()
    assert (shapes.elements, len(shapes.tensors)) == (elements, tensors)


def test_a_part_of_a_model_says_so() -> None:
    model = MODELS["llama3-8b"]
    part = model.fitting(16 * 3e9, 16)
    assert part is not None
    assert part.name == "Llama-3-8B, 8 of 32 layers"
    assert part.elements <= 3e9 < model.shapes(9).elements
    whole = model.fitting(16 * 9e9, 16)
    assert whole is not None
    assert whole.name == "Llama-3-8B"
    assert model.fitting(16 * 1e9, 16) is None
    with pytest.raises(ValueError, match="has 1 to 32 layers, not 33"):
        model.shapes(33)


@pytest.mark.parametrize("model", MODELS.values(), ids=lambda model: model.name)
def test_a_miniature_is_small_and_says_so(model: Model) -> None:
    shapes = miniature(model)
    assert shapes.elements < 1100
    assert shapes.name == f"miniature of {model.name}"


# The plan.


def test_the_most_important_comes_first() -> None:
    items = plan()
    assert [(item.model, item.contestant) for item in items[:4]] == [
        ("gpt2-xl", "tritopt"), ("gpt2-xl", "torch fused"), ("resnet50", "tritopt"), ("resnet50", "torch fused"),
    ]  # fmt: skip
    ours = [item for item in items if item.peer is None]
    assert len(set(ours)) == len(ours)
    after_ours = max(i for i, item in enumerate(items) if item.peer is None)
    for item in items[:after_ours]:
        peer = item.peer
        assert peer is None or peer.name in ("torch fused", "FlashOptim") or (item.model == "tiny" and peer.per_tensor)
    eight_bits = items.index(Item("gpt2-xl", "AdamW", "split8+int8"))
    assert items[eight_bits + 1].contestant == "FlashOptim"
    assert items[-1].peer is not None
    assert items[-1].peer.slow_start
    assert {name for item in items if item.peer for name in [item.peer.name]} == set(peers.names())
    quick = plan(quick=True)
    assert len(quick) < len(items) / 3
    assert {item.model for item in quick} == {"resnet50", "tiny"}


def test_every_optimizer_is_measured() -> None:
    known = {cls.__name__ for cls in CLASSES}
    assert {"AdamW", *SUMMING, *ELEMENTWISE} == known
    assert {"LAMB", "Adafactor", "GroupAdaGrad"} <= set(SUMMING)
    assert {"SGD", "Adam", "Lion"} <= set(ELEMENTWISE)
    assert {item.optimizer for item in plan()} == known | {MIXED}


@interpreted
def test_muon_and_mixed_stand_beside_torchs() -> None:
    """Muon has a model's matrices, Mixed all of it; where there is no matrix, the rows say so."""
    items = plan(["gpt2-xl", "tiny"], ["muon", "mixed"], ["fp32"], ["torch for-loop"])
    run = rehearsal(*items)
    rows = list(run.rows())
    assert run.passed
    assert {row.optimizer for row in rows} == {"Muon", "Mixed"}
    assert {row.contestant for row in rows} == {"tritopt", "torch for-loop"}
    assert len(rows) == 8
    for row in rows:
        if row.optimizer == "Muon" and "10,000" in row.shapes:
            assert row.refused == "miniature of 10,000 tensors of 1,000 has no matrices between layers"
        else:
            assert row.refused is None
            assert row.ms is not None
    assert {row.shapes for row in rows if row.optimizer == "Muon" and row.ms} == {"miniature of GPT-2 XL, matrices"}
    assert all(row.moved for row in rows if row.contestant == "tritopt" and row.ms)


@interpreted
def test_muons_own_products_stand_beside_torchs() -> None:
    """A run on a GPU says whether they are faster: the same optimizer, bytes and matrices."""
    items = plan(["gpt2-xl"], ["muon"], ["split16"], ["tritopt ns_symmetric"])
    run = rehearsal(*items)
    ours, other = run.rows()
    assert (ours.contestant, other.contestant) == ("tritopt", "tritopt ns_symmetric")
    assert ours.refused is None
    assert other.refused is None
    assert other.moved == pytest.approx(ours.moved, rel=1e-2)
    assert other.ratio is not None
    assert "tritopt ns_symmetric" in [item.contestant for item in plan(optimizers=["muon"])]


def test_matrices_between_layers() -> None:
    matrices = suited("Muon", MODELS["llama3-8b"].shapes())
    assert matrices is not None
    assert len(matrices.tensors) == 224
    assert suited("Muon", MODELS["huge"].shapes()) is None
    assert suited("AdamW", MODELS["huge"].shapes()) == MODELS["huge"].shapes()


def test_what_is_chosen_is_crossed() -> None:
    chosen = plan(["tiny", "resnet50"], ["lion"], ["split8+int8", "fp32"], ["none"])
    assert [item.case for item in chosen] == [
        ("tiny", "Lion", "split8+int8"), ("tiny", "Lion", "fp32"),
        ("resnet50", "Lion", "split8+int8"), ("resnet50", "Lion", "fp32"),
    ]  # fmt: skip
    beside = plan(["resnet50"], chosen_peers=["torch foreach", "torch fused"])
    assert [item.contestant for item in beside] == ["tritopt", "torch fused", "torch foreach"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"models": ["resnet"]}, "did you mean 'resnet50'.* known: resnet50, bert"),
     ({"optimizers": ["adamv"]}, "unknown optimizer 'adamv'"), ({"formats": ["split"]}, "unknown format 'split'"),
     ({"chosen_peers": ["torch fuse"]}, "unknown peer 'torch fuse'.* known: none, torch fused")],
)  # fmt: skip
def test_unknown_names_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(**arguments)


# Peers.


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: f"{peer.name}-{peer.optimizer}-{peer.formats[0]}")
def test_peers_stand_beside_what_there_is(peer: Peer) -> None:
    assert set(peer.formats) <= set(FORMATS)
    assert hasattr(optim, peer.optimizer)
    assert peers.beside(peer.optimizer, peer.formats[0], [peer.name]) == [peer]


@pytest.mark.parametrize(
    "peer",
    [peer for peer in PEERS if peer.package == "torch" and not peer.compiled and peer.moved is not None],
    ids=lambda peer: f"{peer.name}-{peer.optimizer}",
)
def test_bytes_of_torch_are_those_of_its_tensors(peer: Peer) -> None:
    param = torch.nn.Parameter(torch.zeros(64, 64, dtype=peer.dtype))
    param.grad = torch.ones_like(param)
    opt, step = peer.make([param], 1e-3)
    if not opt.state:  # states that are bf16 are there, and no kernel of the CPU takes them
        step()
    states = [value for value in opt.state[param].values() if torch.is_tensor(value) and value.numel() > 1]
    moved = param.grad.nbytes + 2 * sum(tensor.nbytes for tensor in (param, *states))
    assert moved / param.numel() == peer.moved


def test_a_peer_that_is_missing_says_so() -> None:
    peer = replace(FUSED, path="no_such_library.optim:Adam")
    assert peer.missing() == "not installed: no module 'no_such_library'"
    assert FUSED.missing() is None
    installed = peers.versions()
    assert (installed["torch"] or "").partition("+")[0] == torch.__version__.partition("+")[0]
    assert set(installed) == {peer.package for peer in PEERS}


@interpreted
def test_a_peer_that_fails_stops_nobody() -> None:
    absent = replace(FUSED, name="absent", path="no_such_library.optim:Adam")
    broken = replace(FUSED, name="broken", path="torch.optim:Adammm")
    refusing = replace(FUSED, name="refusing", arguments={"fused": True, "betas": (2.0, 0.9)})
    bench = rehearsal(ADAMW, *(ADAMW._replace(peer=peer) for peer in (absent, broken, refusing, FUSED)))
    ours, *others, fused = bench.rows()
    assert [row.refused for row in others] == [
        "not installed: no module 'no_such_library'",
        "failed: AttributeError: module 'torch.optim' has no attribute 'Adammm'",
        "failed: ValueError: Invalid beta parameter at index 0: 2.0",
    ]
    assert all(row.ms is None and row.share is None and row.moved is None for row in others)
    assert ours.ms is not None
    assert fused.ratio == pytest.approx((fused.ms or 0) / ours.ms)
    assert bench.passed


# Times.


class FakeCuda:
    """A GPU on which time is what the test says: `now` of the host, and the end of what is in the queue."""

    def __init__(self) -> None:
        self.now = self.queue = 0.0
        self.modes: list[str] = []
        self.slept: list[float] = []
        self.allocated = self.peak = self.count = 0
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                gpu.queue = self.at = max(gpu.queue, gpu.now)

            def query(self) -> bool:
                return self.at <= gpu.now

            def elapsed_time(self, other: Event) -> float:
                return 1e3 * (other.at - self.at)

        self.Event = Event

    def work(self, host: float, device: float) -> None:
        """A call that takes the host so long, and launches what takes the GPU so long."""
        self.now += host
        self.queue = max(self.queue, self.now) + device

    def synchronize(self) -> None:
        self.now = max(self.now, self.queue)

    def _sleep(self, cycles: int) -> None:
        self.slept.append(cycles / 2e9)
        self.queue = max(self.queue, self.now) + cycles / 2e9

    def set_sync_debug_mode(self, mode: str) -> None:
        self.modes.append(mode)
        if len(self.modes) == 1:  # as torch does
            warnings.warn("Synchronization debug mode is a prototype feature", UserWarning, stacklevel=1)

    def memory_allocated(self) -> int:
        return self.allocated

    def max_memory_allocated(self) -> int:
        return self.peak

    def reset_peak_memory_stats(self) -> None:
        self.peak = self.allocated

    def memory_stats(self) -> dict[str, int]:
        return {"allocation.all.allocated": self.count}


@pytest.fixture
def gpu() -> FakeCuda:
    return FakeCuda()


@pytest.fixture
def device(gpu: FakeCuda) -> Device:
    return Device(gpu, "cpu", lambda: gpu.now)


def test_the_hosts_time_ends_when_the_call_returns(gpu: FakeCuda, device: Device) -> None:
    assert device.host_times([lambda: gpu.work(2.0, 5.0)], 3) == pytest.approx([2.0] * 3)


@pytest.mark.parametrize(("host", "gpus", "each"), [(2.0, 5.0, 5.0), (5.0, 2.0, 5.0)])
def test_steps_on_end_take_as_long_as_the_slower(
    gpu: FakeCuda, device: Device, host: float, gpus: float, each: float
) -> None:
    times = device.step_times([lambda: gpu.work(host, gpus)], 5)
    assert times[1:-1] == pytest.approx([each] * 3)


def test_the_gpus_time_is_taken_from_its_queue(gpu: FakeCuda, device: Device) -> None:
    times = device.device_times([lambda: gpu.work(0.01, 0.02), lambda: gpu.work(0.01, 0.04)], 4, lead=0.01)
    assert times == pytest.approx([0.02, 0.04, 0.02, 0.04])


def test_a_lead_that_is_too_short_grows(gpu: FakeCuda, device: Device) -> None:
    assert device.device_times([lambda: gpu.work(0.05, 0.02)], 2, lead=0.01) == pytest.approx([0.02] * 2)
    assert gpu.slept == pytest.approx([0.02, 0.04, 0.08, 0.08])


def test_a_host_that_is_too_slow_leaves_no_time_of_the_gpu(gpu: FakeCuda, device: Device) -> None:
    assert device.device_times([lambda: gpu.work(1.0, 0.02)], 2, lead=0.01) is None


def test_a_copy_reads_and_writes(gpu: FakeCuda, device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = torch.Tensor.copy_

    def timed(target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        gpu.work(1e-5, 1e-3)
        return copy(target, source)

    monkeypatch.setattr(torch.Tensor, "copy_", timed)
    assert device.copy_bandwidth(1000) == pytest.approx(2 * 1000 / 1e-3)


def test_memory_is_what_one_step_takes(gpu: FakeCuda, device: Device) -> None:
    gpu.allocated, gpu.peak, gpu.count = 100, 900, 7

    def step() -> None:
        gpu.peak, gpu.count = 130, 9

    assert device.memory(step) == (30, 2)


def test_a_step_that_waits_is_noticed(gpu: FakeCuda, device: Device) -> None:
    def waits() -> None:
        if gpu.modes[-1] == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    def fails() -> None:
        raise RuntimeError("out of memory")

    assert device.synchronises(waits) is True
    assert device.synchronises(lambda: None) is False
    with pytest.raises(RuntimeError, match="out of memory"):
        device.synchronises(fails)
    assert gpu.modes == ["error", "default"] * 3


def test_a_number_is_bytes_over_time() -> None:
    row = row_of(device_ms=2.0, ms=3.0, moved=8e9)
    measure._derive(row, copy=5e12)
    assert row.gb_per_s == pytest.approx(4000)
    assert row.share == pytest.approx(0.8)
    row = row_of(ms=4.0, moved=8e9)
    measure._derive(row, copy=5e12)
    assert row.share == pytest.approx(0.4)


def row_of(**numbers: Any) -> Measurement:
    known = {"shapes": "GPT-2 XL", "elements": 1_557_611_200, "tensors": 580, "optimizer": "AdamW", "format": MAIN}
    return Measurement(**{**known, "contestant": "tritopt", "stores": "", **numbers})


# A run.


@interpreted
@pytest.mark.parametrize(("optimizer", "launches", "moved"), [("AdamW", 1, 26), ("SGD", 1, 18), ("LAMB", 3, 38)])
def test_rows_say_what_must_move_and_what_was_launched(optimizer: str, launches: int, moved: int) -> None:
    bench = rehearsal(Item("gpt2-xl", optimizer, MAIN))
    (row,) = bench.rows()
    assert row.refused is None
    assert bench.passed
    assert (row.shapes, row.tensors, row.contestant) == ("miniature of GPT-2 XL", 4, "tritopt")
    assert row.launches == launches
    assert row.moved == moved * row.elements
    assert bench.copy is not None
    assert row.moved is not None
    assert row.share == pytest.approx(row.moved / (row.device_ms or 0) * 1e3 / bench.copy)
    assert row.synchronises is False
    if optimizer == "AdamW":
        counted = bytes_per_parameter(AdamW(), torch.bfloat16, torch.bfloat16, SPLIT16)
        assert row.moved == counted.total * row.elements


def test_memory_is_known_before_it_is_taken() -> None:
    n_bytes = {name: measure.resident("AdamW", FORMATS[name]) for name in ("fp32", MAIN, "split8+int8", "none")}
    assert n_bytes == {"fp32": 16, MAIN: 14, "split8+int8": 7 + 1 / 16, "none": 8}


@interpreted
@pytest.mark.parametrize("n_bytes", [1e3, 1e8, measure.ONE_SET, 1e11])
def test_sets_are_larger_than_the_cache(n_bytes: float) -> None:
    made: list[int] = []
    steps: list[int] = []
    bench = rehearsal(Item("huge", "SGD", "none"))

    def make_set() -> tuple[Callable[[], None], Callable[[], float]]:
        n = len(made)
        made.append(n)
        return lambda: steps.append(n), lambda: 1000.0

    device = bench.device
    measure.measure(device, row_of(contestant="other"), make_set, n_bytes, copy=1e9, seconds=0.0)
    assert set(steps) == set(made)
    if n_bytes <= measure.ONE_SET:
        assert 2 <= len(made) <= measure.MAX_SETS
        assert len(made) * n_bytes >= measure.CACHES * device.l2_bytes
    else:
        assert len(made) == 1


@interpreted
@pytest.mark.parametrize(("model", "is_known"), [("gpt2-xl", True), ("tiny", False)])
def test_bytes_of_what_is_stored_otherwise_are_unknown(model: str, is_known: bool) -> None:
    (peer,) = [p for p in PEERS if p.name == "bitsandbytes" and p.least]
    device = find_device(rehearse=True)
    peer = dataclasses.replace(peer, path="torch.optim:AdamW", least=peer.least if model == "tiny" else 0)
    _, moved = measure.set_of_theirs(device, miniature(MODELS[model]), peer)()
    assert (moved() is not None) == is_known


@interpreted
@pytest.mark.parametrize(
    ("optimizer", "fmt"),
    [("AdamW", "split8+int8"), ("AdamW", "fp32+int8/fp8"), ("AdamW", "none"), ("Adafactor", MAIN), ("SGD", "fp32"),
     ("GroupAdaGrad", MAIN), ("RMSprop", "fp16-kahan")],
)  # fmt: skip
def test_checks_are_green(optimizer: str, fmt: str) -> None:
    assert run.gate(optimizer, FORMATS[fmt]) is None


@interpreted
def test_a_red_check_gets_no_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    reference = TorchAdam.reference
    items = [ADAMW, ADAMW._replace(peer=FUSED), Item("resnet50", "SGD", MAIN)]

    def wrong(self: Any, w: Any, g: Any, state: Any, s: Any) -> Any:
        return reference(self, w, g, state, s._replace(lr=s.lr * 1.01))

    monkeypatch.setattr(TorchAdam, "reference", wrong)
    bench = rehearsal(*items)
    ours, fused, other = bench.rows()
    for row in (ours, fused):
        assert row.refused is not None
        assert "its check is red: step 0, weight" in row.refused
        assert {row.ms, row.device_ms, row.host_ms, row.share, row.ratio, row.moved} == {None}
    assert other.ms is not None
    assert not bench.passed
    assert bench.document()["passed"] is False


@interpreted
def test_a_format_that_is_refused_is_not_a_failure() -> None:
    bench = rehearsal(Item("resnet50", "Adafactor", "split8"))
    (row,) = bench.rows()
    assert "draw no random bits" in (row.refused or "")
    assert bench.passed


@interpreted
def test_what_there_is_no_time_for_says_so() -> None:
    times = iter([0.0, 1.0, 2.0, 11.0])
    bench = rehearsal(ADAMW, Item("tiny", "AdamW", MAIN), seconds=10.0, clock=lambda: next(times, 12.0))
    first, second = bench.rows()
    assert first.ms is not None
    assert second.refused == "not measured: the time given (10 s) was spent"
    with pytest.raises(ValueError, match=r"seconds=0 must be positive"):
        rehearsal(ADAMW, seconds=0)


def test_a_library_that_takes_forever_is_stopped() -> None:
    before = signal.getsignal(signal.SIGALRM)
    start = time.monotonic()

    def compile_forever() -> None:
        while time.monotonic() - start < 20:
            sum(range(100))

    with pytest.raises(TimeoutError, match="time given was spent"), run._at_most(0.05):
        compile_forever()
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
    with run._at_most(None):
        pass


def test_too_little_memory_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Rehearsal, "free_bytes", 2**30)
    monkeypatch.setattr(Rehearsal, "is_rehearsal", False)
    monkeypatch.setattr(run, "gate", lambda *_: "red")
    bench = rehearsal(Item("huge", "AdamW", MAIN), Item("bert-large", "AdamW", MAIN))
    huge, bert = bench.rows()
    assert huge.refused == "needs 32.0 GiB, and 1.0 are free"
    assert bert.shapes == "BERT-large, 2 of 24 layers"


@interpreted
def test_a_run_that_is_killed_leaves_what_it_had(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    bench = rehearsal(ADAMW, Item("tiny", "AdamW", MAIN))
    rows = bench.rows()
    first = next(rows)
    bench.save(path)
    document = json.loads(path.read_text())
    assert document["rows"] == [asdict(first)]
    assert document["complete"] is False
    list(rows)
    bench.save(path)
    document = json.loads(path.read_text())
    assert len(document["rows"]) == 2
    assert document["complete"] is True
    assert [file.name for file in tmp_path.iterdir()] == ["bench.json"]


def test_json_says_what_the_numbers_belong_to(monkeypatch: pytest.MonkeyPatch) -> None:
    document = rehearsal().document()
    assert document["rehearsal"] is True
    assert "times mean nothing" in document["warning"]
    assert {verdict["verdict"] for verdict in document["targets"]} == {"not measured"}
    names = {"gpu", "driver", "cuda", "date", "platform", "python", "torch", "triton", "tritopt", "commit", "peers"}
    assert names <= set(document["machine"])
    json.dumps(document)
    monkeypatch.setenv("PATH", "")
    assert machine.driver() is None
    assert machine.commit() is None


# Targets.


def verdicts(*rows: Measurement) -> dict[str, str]:
    return {judged.target.partition(":")[0]: judged.verdict for judged in targets.judge(rows)}


def test_targets_go_by_the_worst() -> None:
    good = row_of(share=0.93, allocations=0, synchronises=False)
    by_target = verdicts(good)
    assert by_target["AdamW, bf16 + 16 bits, 1B parameters"] == "met"
    assert by_target["allocations of a warm step"] == by_target["synchronisations of a warm step"] == "met"
    others = set(by_target) - {
        "AdamW, bf16 + 16 bits, 1B parameters", "allocations of a warm step", "synchronisations of a warm step",
    }  # fmt: skip
    assert {by_target[name] for name in others} == {"not measured"}
    part = replace(good, shapes="Llama-3-8B, 8 of 32 layers", share=0.9, allocations=1)
    by_target = verdicts(good, part)
    assert by_target["AdamW, bf16 + 16 bits, 1B parameters"] == by_target["allocations of a warm step"] == "missed"
    judged = {v.target: v for v in targets.judge([good, part])}
    assert judged["AdamW, bf16 + 16 bits, 1B parameters: share of a copy"] == targets.Judged(
        "AdamW, bf16 + 16 bits, 1B parameters: share of a copy", ">= 92.0%", "90.0%", "missed", 2
    )


@pytest.mark.parametrize(
    ("row", "target", "verdict"),
    [({"shapes": "ResNet-50", "elements": 25_557_032, "share": 0.86}, "AdamW, bf16 + 16 bits, ResNet-50", "met"),
     ({"optimizer": "Lion", "share": 0.89}, "other elementwise optimizers", "missed"),
     ({"optimizer": "LANS", "share": 0.85}, "LAMB, LANS, LARS", "met"),
     ({"contestant": "torch fused", "device_ratio": 0.99}, "torch fused, fp32", "missed"),
     ({"contestant": "FlashOptim", "format": "split8+int8", "device_ratio": 1.4}, "FlashOptim, 24 + 8 bit", "met"),
     ({"contestant": "FlashOptim", "format": "split16+int8", "device_ratio": 1}, "FlashOptim, 24 + 8 bit",
      "not measured"),
     ({"contestant": "optimi", "shapes": MODELS["tiny"].name, "ratio": 9.0},
      "libraries with a launch per tensor, 10,000 tensors", "missed"),
     ({"synchronises": True}, "synchronisations of a warm step", "missed"),
     ({"format": "master", "share": 0.99}, "AdamW, bf16 + 16 bits, 1B parameters", "not measured")],
)  # fmt: skip
def test_each_target_has_its_rows(row: dict[str, Any], target: str, verdict: str) -> None:
    assert verdicts(row_of(**row))[target] == verdict


def test_a_rehearsal_meets_no_target() -> None:
    assert {judged.verdict for judged in targets.judge([row_of(share=0.99)], is_rehearsal=True)} == {"not measured"}


# The picture.


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_plot(suffix: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [
        row_of(moved=4e10, device_ms=10.0, ms=11.0),
        row_of(moved=4e10, ms=15.0, contestant="torch fused"),
        row_of(refused="no"),
    ]
    path = tmp_path / f"bench{suffix}"
    plot.save_plot(rows, 4.3e12, "a GPU", path)
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG" if suffix == ".png" else b"<?xml")
    if suffix == ".svg":
        text = content.decode()
        assert all(word in text for word in ("tritopt, AdamW, split16", "torch fused, AdamW", "a copy", "a GPU"))
        plot.save_plot(rows, 4.3e12, "a GPU", path)
        assert path.read_bytes() == content


def test_plots_that_cannot_be_drawn_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"bench.pdf must be a .png or .svg file"):
        plot.check_path(tmp_path / "bench.pdf")
    with pytest.raises(ValueError, match="in a folder that exists"):
        plot.check_path(tmp_path / "nowhere" / "bench.png")
    if importlib.util.find_spec("matplotlib"):
        with pytest.raises(ValueError, match="nothing was measured"):
            plot.save_plot([row_of()], 1e12, "", tmp_path / "bench.png")
    monkeypatch.setattr(plot, "find_spec", lambda _: None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        plot.check_path(tmp_path / "bench.png")


# The command.


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_ways_out_are_named() -> None:
    result = command()
    assert result.exit_code == 2
    said = " ".join(result.output.replace("│", " ").split())
    assert "the bench needs a GPU that torch can use, and there is none: --host" in said
    assert "--rehearse" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--rehearse", "--shapes", "vgg"], "unknown shapes 'vgg'"),
     (["--rehearse", "--plot", "x.gif"], "x.gif must be a"),
     (["--rehearse", "--save", "no/where.json"], "no/where.json must be a file"),
     (["--rehearse", "--seconds", "-1"], "seconds=-1.0 must be positive"),
     (["--host", "--quick", "--shapes", "tiny"], "leave out --shapes, --quick"),
     (["--host", "--peer", "nobody"], "unknown peer 'nobody'")],
)  # fmt: skip
@interpreted
def test_bad_arguments_are_refused(arguments: list[str], message: str) -> None:
    result = command(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())


@interpreted
def test_the_command_prints_and_keeps(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path, picture = tmp_path / "bench.json", tmp_path / "bench.svg"
    chosen = ["--rehearse", "--shapes", "tiny", "--peer", "torch fused", "--save", str(path), "--plot", str(picture)]
    result = command(*chosen)
    assert result.exit_code == 0, result.output
    assert "A REHEARSAL" in result.output
    assert "miniature of 10,000 tensors of 1,000" in " ".join(result.output.split())
    assert "torch fused" in result.output
    assert "not measured" in result.output
    assert [row["contestant"] for row in json.loads(path.read_text())["rows"]] == ["tritopt", "torch fused"]
    assert "REHEARSAL" in picture.read_text()


@interpreted
def test_json_and_a_red_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "gate", lambda *_: "its check is red")
    result = command("--rehearse", "--shapes", "tiny", "--peer", "none", "--json")
    assert result.exit_code == 1
    (row,) = json.loads(result.stdout)["rows"]
    assert (row["refused"], row["ms"]) == ("its check is red", None)
    assert "its check is red" in command("--rehearse", "--shapes", "tiny", "--peer", "none").output


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "INTERPRETED", False)
    with pytest.raises(RuntimeError, match="set TRITON_INTERPRET=1"):
        find_device(rehearse=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not find_device(rehearse=False).is_rehearsal
    monkeypatch.setattr(run, "INTERPRETED", True)
    with pytest.raises(RuntimeError, match="keeps kernels off the GPU: unset it"):
        find_device(rehearse=False)
    monkeypatch.setattr(run, "INTERPRETED", False)
    monkeypatch.setattr(run, "HAS_TRITON", False)
    with pytest.raises(RuntimeError, match="needs Triton"):
        find_device(rehearse=False)


@pytest.mark.skipif(not torch.cuda.is_available() or INTERPRETED, reason="needs a GPU")
def test_on_a_gpu() -> None:
    bench = Bench(find_device(rehearse=False), [ADAMW, ADAMW._replace(peer=FUSED)], seconds_each=0.05)
    ours, fused = bench.rows()
    assert ours.refused is None
    assert fused.refused is None
    assert bench.copy is not None
    assert ours.launches == 1
    assert (ours.allocations, ours.synchronises) == (0, False)
    assert ours.share is not None
    assert 0.2 < ours.share < 1.5
    assert fused.ratio is not None
