"""Launch configurations: the defaults, how they are measured and chosen, and that results do not depend on them.

Kernels run for real, in the interpreter or on a GPU; a clock of the tests' own says how long they took.
"""

from __future__ import annotations

import gc
import inspect
import json
import os
import subprocess
import sys
import timeit
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import tritopt.optim
from tests.engine.test_tuning_cache import ENTRY
from tritopt.commands.app import app
from tritopt.commands.tune import print_rows
from tritopt.engine import driver, gram
from tritopt.engine.device import is_capturing
from tritopt.engine.gram import Product
from tritopt.engine.group import LaunchGroup
from tritopt.engine.phase import LaunchSpec
from tritopt.engine.plan import Planner
from tritopt.engine.tuning import autotune, cache, config
from tritopt.engine.tuning.autotune import Scratch, Variant
from tritopt.engine.tuning.config import Config, Tiles
from tritopt.kernels.adamw import adamw_update
from tritopt.tools import numerics, tune

H200 = "NVIDIA H200"
DEFAULT = Config(block_size=64, chunk_size=128, tail_size=64, num_warps=1)
TINY = 600
"""Two tensors, of 300 elements each."""


@pytest.fixture(autouse=True)
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU of which nothing is known yet, whose kernels are launched in small blocks."""
    monkeypatch.setenv("TRITOPT_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TRITOPT_AUTOTUNE", raising=False)
    monkeypatch.setattr(cache, "_WARNED", set())
    monkeypatch.setattr(autotune, "_CHOSEN", {})
    monkeypatch.setattr(gram, "_CHOSEN", {})
    monkeypatch.setattr(autotune, "gpu_of", lambda device: H200)
    monkeypatch.setattr(autotune, "is_capturing", lambda device: False)
    monkeypatch.setattr(autotune, "default_of", lambda *_: DEFAULT)
    monkeypatch.setattr(autotune, "size_of", lambda n_elements: TINY)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """Patch in as few candidates as the interpreter has time for."""
    candidates = [DEFAULT, Config(128, 128, 64, 1), Config(128, 256, 64, 1)]
    monkeypatch.setattr(autotune, "candidates", lambda variant, best: iter(candidates))
    return candidates


class Clock:
    """A timer: runs the kernel once, and says that it took `seconds(configuration)`. Keeps what it was asked for."""

    def __init__(self, seconds: Callable[[Any], float]) -> None:
        self.seconds, self.asked = seconds, list[Any]()

    def __call__(self, run: Callable[[], object], seconds: float) -> float:
        assert isinstance(run, partial)
        run()
        self.asked.append(run.args[-1])
        return self.seconds(run.args[-1])


def storage(name: str) -> numerics.StorageFormat:
    return numerics.FORMATS[name]


def device() -> torch.device:
    return torch.empty(0).device


def variant_of(cls: type[tritopt.optim.Optimizer] = tritopt.optim.AdamW, name: str = "fp32") -> Variant:
    (variant,) = tune.variants_of(cls, storage(name), device())
    assert isinstance(variant, Variant)
    return variant


def train(cls: type[tritopt.optim.Optimizer], name: str, steps: int = 2, **options: Any) -> list[torch.Tensor]:
    """Weights and states after some steps, of tensors with whole blocks, tails, and one that is not aligned."""
    generator = torch.Generator(device()).manual_seed(1)
    buffer = torch.randn(1600, generator=generator).to(storage(name).dtype)
    params = [
        buffer[:640].view(10, 64),
        buffer[704:704].view(0, 64),
        buffer[705 : 705 + 192].view(3, 64),
        buffer[1500:],
    ]
    params = [torch.nn.Parameter(param) for param in params]
    opt = cls(params, **storage(name).arguments, **options)
    for _ in range(steps):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        opt.step()
    states = [value for param in params for value in opt.state[param].values() if isinstance(value, torch.Tensor)]
    return [param.detach().clone() for param in params] + [state.clone() for state in states]


def assert_same_bits(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a.view(-1).view(torch.uint8), b.view(-1).view(torch.uint8))


def random_state() -> torch.Tensor:
    return torch.cuda.get_rng_state() if device().type == "cuda" else torch.get_rng_state()


# Results.


@pytest.mark.parametrize("name", ["fp32", "stochastic+fp16", "split8+int8", "kahan+fp8", "split16+bf16"])
def test_no_configuration_changes_a_bit_of_what_is_elementwise(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for candidate in (DEFAULT, Config(64, 320, 64, 2), Config(256, 256, 128, 4), Config(1024, 2048, 256, 4)):
        monkeypatch.setattr(autotune, "choose", lambda *args, candidate=candidate: candidate)
        results.append(train(tritopt.optim.AdamW, name))
    for result in results[1:]:
        assert_same_bits(result, results[0])


@pytest.mark.parametrize("options", [{"max_grad_norm": 0.5}, {"max_grad_norm": 0.5, "track": True}])
def test_sums_are_the_same_on_every_gpu(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """LAMB's norms and the global one, whatever is shipped or tuned; but not if all launches were changed."""
    monkeypatch.setattr(autotune, "GENERIC", DEFAULT)
    expected = train(tritopt.optim.LAMB, "fp32", steps=4, **options)
    for candidate in (Config(128, 128, 64, 1), Config(256, 512, 128, 2)):
        monkeypatch.setattr(autotune, "default_of", lambda *_, candidate=candidate: candidate)
        monkeypatch.setattr(autotune, "_CHOSEN", {})
        assert_same_bits(train(tritopt.optim.LAMB, "fp32", steps=4, **options), expected)
        monkeypatch.setattr(Planner, "config", candidate)
        different = train(tritopt.optim.LAMB, "fp32", steps=4, **options)
        monkeypatch.setattr(Planner, "config", None)
        assert not all(torch.equal(a, b) for a, b in zip(different, expected, strict=True))


def test_tuning_in_a_step_changes_nothing(few: list[Config], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = train(tritopt.optim.AdamW, "stochastic+bf16")
    clock = Clock(lambda candidate: 1.0 / candidate.block_size)
    monkeypatch.setattr(autotune, "event_median", clock)
    monkeypatch.setattr(autotune, "_CHOSEN", {})
    monkeypatch.setenv("TRITOPT_AUTOTUNE", "1")
    torch.manual_seed(0)
    before = random_state()
    assert_same_bits(train(tritopt.optim.AdamW, "stochastic+bf16"), expected)
    assert torch.equal(random_state(), before)
    assert clock.asked == few


# Choosing.


@pytest.mark.parametrize("value", ["yes", "2", "", "true"])
def test_another_value_of_the_switch(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITOPT_AUTOTUNE", value)
    with pytest.raises(ValueError, match=f"TRITOPT_AUTOTUNE='{value}' must be 0 .* or 1 "):
        train(tritopt.optim.SGD, "fp32")


def launched(monkeypatch: pytest.MonkeyPatch, **options: Any) -> list[Config]:
    """The configurations that two steps were launched with, those of measurements left out."""
    seen: list[Config] = []
    original = driver._config_of

    def config_of(phase: driver.Apply, group: LaunchGroup, launch: LaunchSpec, n_earlier: int) -> Config:
        chosen = original(phase, group, launch, n_earlier)
        if launch.config is None:
            seen.append(chosen)
        return chosen

    with monkeypatch.context() as patched:
        patched.setattr(driver, "_config_of", config_of)
        train(tritopt.optim.AdamW, "fp32", **options)
    return list(dict.fromkeys(seen))


def test_the_default_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launched(monkeypatch) == [DEFAULT]


def test_on_the_cpu_it_is_for_any_size_and_where_telemetry_sums_generic(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launched(monkeypatch, track=True) == [config.GENERIC]
    monkeypatch.setattr(autotune, "gpu_of", lambda device: None)
    monkeypatch.setattr(autotune, "default_of", config.default_of)
    assert launched(monkeypatch) == [Config(chunk_size=8192, block_size=config.GENERIC.block_size // 2)]


def test_the_cache_is_used_without_tuning(monkeypatch: pytest.MonkeyPatch) -> None:
    variant = variant_of()
    cache.put(H200, variant.key(TINY), ENTRY)
    monkeypatch.setattr(autotune, "tune", None)
    assert launched(monkeypatch) == [ENTRY.config]


def test_a_changed_kernel_is_another_one() -> None:
    variant = variant_of()
    assert variant.key(TINY) == variant_of().key(TINY)
    assert variant.key(TINY) != variant._replace(source="changed").key(TINY)
    assert variant.key(TINY) != variant_of(name="split8+int8").key(TINY)
    group = LaunchGroup([0], device(), variant.formats, variant.dtypes, [torch.Size([4])])
    phases = [driver.Apply(adamw_update), driver.Apply(adamw_update, writes_states=False)]
    assert len({phase.source(group, variant.launch, 0) for phase in phases}) == 2


def test_the_choice_stays(few: list[Config], monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process may write the cache meanwhile: what has been chosen, is; the next process takes it."""
    assert launched(monkeypatch) == [DEFAULT]
    cache.put(H200, variant_of().key(TINY), ENTRY)
    assert launched(monkeypatch) == [DEFAULT]
    monkeypatch.setattr(autotune, "_CHOSEN", {})
    assert launched(monkeypatch) == [ENTRY.config]


def test_what_a_step_tunes_is_kept(few: list[Config], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITOPT_AUTOTUNE", "1")
    clock = Clock(lambda candidate: 1.0 / candidate.chunk_size)
    monkeypatch.setattr(autotune, "event_median", clock)
    assert launched(monkeypatch) == [few[2]]
    assert clock.asked == few  # once, for both steps
    monkeypatch.setattr(autotune, "_CHOSEN", {})
    assert launched(monkeypatch) == [few[2]]
    assert clock.asked == few
    ((key, entry),) = cache.read(H200).items()
    assert (key.kernel, key.formats, key.size) == ("adamw_update", ("plain",) * 3, TINY)
    assert (entry.config, entry.default) == (few[2], DEFAULT)
    assert (entry.microseconds, entry.default_microseconds) == (3906.25, 7812.5)


def test_nothing_is_measured_while_a_graph_is_captured(few: list[Config], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITOPT_AUTOTUNE", "1")
    monkeypatch.setattr(autotune, "is_capturing", lambda device: True)
    clock = Clock(lambda candidate: 1.0 / candidate.chunk_size)
    monkeypatch.setattr(autotune, "event_median", clock)
    assert launched(monkeypatch) == [DEFAULT]
    assert clock.asked == []
    assert cache.read(H200) == {}
    monkeypatch.setattr(autotune, "is_capturing", lambda device: False)
    assert launched(monkeypatch) == [few[2]]


def test_without_memory_it_is_the_default(few: list[Config], monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(run: object, seconds: float) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setenv("TRITOPT_AUTOTUNE", "1")
    monkeypatch.setattr(autotune, "event_median", out_of_memory)
    with pytest.warns(UserWarning, match="adamw_update: launched with the default, .* OutOfMemoryError: CUDA"):
        assert launched(monkeypatch) == [DEFAULT]
    assert cache.files() == []


def test_a_warm_launch_does_not_look_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def choose(*args: Any) -> Config:
        asked.append(args)
        return DEFAULT

    monkeypatch.setattr(autotune, "choose", choose)
    train(tritopt.optim.AdamW, "fp32", steps=3)
    assert len(asked) == 2  # of tensors that are aligned, and of the one that is not
    phase, group, launch, *_ = asked[0]
    warm = partial(driver._config_of, phase, group, launch, 0)
    # Less than 1 us; with room for a machine that does other things as well.
    assert min(timeit.repeat(warm, number=1000, repeat=20)) / 1000 < 5e-6


# Measuring.


def test_the_default_is_measured_first_and_must_be_beaten(few: list[Config]) -> None:
    clock = Clock({few[0]: 1.0, few[1]: 0.99, few[2]: 0.97}.__getitem__)
    entry, n_bytes, tried = autotune.tune(variant_of(), TINY, device(), clock)
    assert clock.asked == few
    assert (entry.config, entry.microseconds, entry.default_microseconds, tried) == (few[2], 0.97e6, 1e6, 3)
    assert n_bytes == 28 * 600
    noise = autotune.tune(variant_of(), TINY, device(), Clock(lambda candidate: 1.0 - 0.019 * (candidate != DEFAULT)))
    assert noise.entry.config == DEFAULT


def test_time_is_bounded(few: list[Config], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autotune, "VARIANT_SECONDS", -1.0)
    clock = Clock(lambda candidate: 1.0 / candidate.chunk_size)
    tuned = autotune.tune(variant_of(), TINY, device(), clock)
    assert clock.asked == [DEFAULT]
    assert tuned.entry.config == DEFAULT


def test_what_does_not_compile_is_passed_over(few: list[Config], monkeypatch: pytest.MonkeyPatch) -> None:
    original = Scratch.launch

    def launch(self: Scratch, candidate: Config) -> None:
        if candidate in refused:
            raise RuntimeError("out of resource: shared memory")
        original(self, candidate)

    monkeypatch.setattr(Scratch, "launch", launch)
    refused = [few[1]]
    clock = Clock(lambda candidate: 1.0 / candidate.chunk_size)
    tuned = autotune.tune(variant_of(), TINY, device(), clock)
    assert clock.asked == [few[0], few[2]]
    assert tuned.entry.config == few[2]
    refused = [DEFAULT]
    with pytest.raises(RuntimeError, match="out of resource: shared memory"):
        autotune.tune(variant_of(), TINY, device(), clock)


def bytes_of(scratch: Scratch) -> int:
    return sum(plane.nbytes for plane in scratch._planes)


@pytest.mark.parametrize("name", ["fp32", "split8+int8"])
def test_scratch_takes_a_quarter_of_what_is_free(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    variant, size = variant_of(name=name), 2**18
    whole = Scratch(variant, size, device())
    assert 0.9 * 2**18 < whole.n_elements < 1.1 * 2**18
    for free in (4 * bytes_of(whole), 4 * bytes_of(whole) - 1, bytes_of(whole)):
        monkeypatch.setattr(autotune, "free_bytes", lambda device, free=free: free)
        scratch = Scratch(variant, size, device())
        assert free / 16 < bytes_of(scratch) <= free / 4
        assert (scratch.n_elements == whole.n_elements) == (free == 4 * bytes_of(whole))
    monkeypatch.setattr(autotune, "free_bytes", lambda device: 1000)
    with pytest.raises(torch.OutOfMemoryError, match="more than 25% of what is free"):
        Scratch(variant, size, device())


@pytest.mark.parametrize("name", ["fp32", "master", "split16+bf16", "split8+int8", "kahan+fp8", "stochastic+fp16"])
def test_scratch_is_stored_as_the_users_tensors_are(name: str) -> None:
    variant = variant_of(name=name)
    scratch = Scratch(variant, TINY, device())
    assert [plane.dtype for plane in scratch._planes] == list(variant.dtypes)
    addresses = scratch._words[:, :-1]
    assert addresses.shape == (2, len(variant.dtypes))
    assert not (addresses % 16).any()
    assert bytes_of(scratch) == variant.resident * 2048
    before = [plane.clone() for plane in scratch._planes]
    scratch.launch(DEFAULT)
    ends = [plane.data_ptr() + plane.nbytes for plane in scratch._planes]
    assert (addresses < ends).all()
    for i, (plane, was) in enumerate(zip(scratch._planes, before, strict=True)):
        assert torch.isfinite(plane.float()).all()
        is_gradient = i == variant.formats[0].n_planes
        assert torch.equal(plane, was) == is_gradient
    # What lies between and behind the tensors is nobody's.
    assert torch.equal(scratch._planes[0][300:1024], before[0][300:1024])
    assert not torch.equal(scratch._planes[0][1024:1324], before[0][1024:1324])


def test_scratch_gives_later_phases_their_sums() -> None:
    """LAMB's last phase receives norms, and is the only one with a choice."""
    variant = variant_of(tritopt.optim.LAMB)
    assert variant.n_earlier > 0
    scratch = Scratch(variant, TINY, device())
    scratch.launch(DEFAULT)
    assert torch.isfinite(scratch._planes[0]).all()


def test_the_timer_takes_seconds_and_gives_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    do_bench = pytest.importorskip("triton.testing").do_bench
    asked: dict[str, Any] = {}

    def record(*args: Any, **options: Any) -> float:
        asked.update(inspect.signature(do_bench).bind(*args, **options).arguments)
        return 2.5  # milliseconds

    monkeypatch.setattr("triton.testing.do_bench", record)
    assert autotune.event_median(random_state, 0.5) == 2.5e-3
    assert asked == {"fn": random_state, "warmup": 100, "rep": 400, "return_mode": "median"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_events_on_a_gpu(few: list[Config]) -> None:
    gc.collect()  # as tuning does, which frees what other tests have left
    before = torch.cuda.memory_allocated()
    tuned = autotune.tune(variant_of(name="split8+int8"), TINY, device())
    assert tuned.tried == len(few)
    assert 0.1 < tuned.entry.microseconds < 1e4
    assert torch.cuda.memory_allocated() == before
    value = torch.zeros(1)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        value += 1
        assert is_capturing(value.device)
    assert not is_capturing(value.device)


@pytest.mark.parametrize("name", ["fp32", "master", "split8+int8"])
@pytest.mark.parametrize("default", [Config(), Config(1024, 2048), Config(2048, 65536)])
def test_candidates(name: str, default: Config) -> None:
    variant = variant_of(name=name)
    best = [default]
    tried = []
    for candidate in autotune.candidates(variant, best):
        tried.append(candidate)
        if candidate.block_size == 512:
            best.append(candidate)
    assert tried[0] == default
    assert 5 < len(tried) == len(set(tried)) <= 14
    for candidate in tried:
        assert config.from_fields(candidate._asdict()) == candidate
        per_thread = candidate.block_size // (32 * candidate.num_warps)
        assert per_thread >= (8 if name == "split8+int8" else 4)
    assert (512, 4) in {(candidate.block_size, candidate.num_warps) for candidate in tried} or name == "split8+int8"
    chunks = {candidate.chunk_size for candidate in tried if candidate.block_size == 512}
    assert len(chunks) >= 3


@pytest.mark.parametrize(
    ("elements", "size", "chunk"),
    [
        (0, 2**20, 1024),
        (2**20 - 1, 2**20, 1024),
        (2**23 - 1, 2**22, 1024),
        (2**23, 2**23, 2048),
        (25_557_032, 2**24, 4096),
        (2**25, 2**25, 8192),
        (2**40, 2**27, 8192),
    ],
)
def test_sizes_and_their_defaults(elements: int, size: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "GENERIC", config.NVIDIA)
    assert config.size_of(elements) == size
    assert config.default_of(elements) == config.default_of(size) == Config(chunk_size=chunk)
    assert config.default_of(elements, has_four=True) == Config(512, chunk)
    monkeypatch.setattr(config, "GENERIC", config.AMD)
    assert config.default_of(elements) == Config(2048, max(2048, chunk))
    assert config.default_of(elements, has_four=True) == Config(1024, max(2048, chunk))


@pytest.mark.parametrize(
    ("name", "takes_four"),
    [("fp32", True), ("master", True), ("split16", True), ("kahan", True), ("none", False), ("split16+bf16", False),
     ("split8+int8", False), ("fp32+int8", False), ("stochastic", False)],
)  # fmt: skip
def test_four_elements_a_thread_beside_fp32_where_nothing_draws(name: str, takes_four: bool) -> None:
    variant = variant_of(name=name)
    assert config.takes_four(variant.formats, variant.dtypes) == takes_four
    default = config.default_of(2**40, takes_four)
    assert config.unrolled(default, config.GENERIC, variant.dtypes) == {True: 4 if name == "fp32" else 2}.get(
        takes_four, 1
    )


def test_blocks_hold_whole_scales_and_less_of_fp64() -> None:
    """The interpreter's small configurations too."""
    codes = variant_of(name="fp32+int8")
    assert config.adapted(Config(32, 96, 16, 2), codes.formats, codes.dtypes) == Config(64, 128, 64, 2)
    assert config.adapted(Config(), codes.formats, codes.dtypes) == Config()
    plain = variant_of()
    assert config.adapted(Config(32, 48, 16, 2), plain.formats, plain.dtypes) == Config(32, 48, 16, 2)
    assert config.adapted(Config(), plain.formats, (torch.float64,) * 4) == Config(256, 8192, 256, 4)


def test_bytes_of_a_variant() -> None:
    """Bytes are those of README's table of formats, without the norm's."""
    assert variant_of(name="master").moved == (16, 14)
    assert sum(variant_of(name="split8+int8").moved) == 12.125
    assert variant_of(name="split8+int8").resident == 7 + 2 * 2 / 64


# Products.


@pytest.fixture
def few_tiles(monkeypatch: pytest.MonkeyPatch) -> list[Tiles]:
    """Patch in as few tiles, and as small ones, as the interpreter has time for."""
    tiles = [Tiles(16, 16, 2, 4, 2), Tiles(16, 32, 2, 4, 2)]
    monkeypatch.setattr(gram, "tiles_of", lambda dtype: tiles[0])
    monkeypatch.setattr(gram, "candidates", lambda best: iter(tiles))
    monkeypatch.setattr(gram, "size_of", lambda n_elements: TINY)
    return tiles


def test_what_is_tuned_of_products_is_kept(few_tiles: list[Tiles], capsys: pytest.CaptureFixture[str]) -> None:
    """One row for all formats of Muon, whose products are in bf16; a step takes what was best."""
    clock = Clock(lambda tiles: 1e-3 / tiles.block_k)
    formats = [storage("fp32"), storage("split8+int8")]
    rows = list(tune.Tuning([tritopt.optim.Muon], formats, [TINY], device(), clock, gpu=H200).rows())
    assert clock.asked == few_tiles
    assert [(row.kernel, row.default, row.best, row.tried) for row in rows] == [("gram", *few_tiles, 2)]
    assert rows[0].gigabytes_per_second == pytest.approx(2 * 24 * 24 * 2 / (1e-3 / 32) / 1e9, rel=1e-3)
    ((key, entry),) = cache.read(H200).items()
    assert (key.dtypes, entry.config, entry.default) == (("bfloat16",), few_tiles[1], few_tiles[0])
    assert gram.choose(device(), torch.bfloat16, 3 * 24 * 24) == few_tiles[1]
    assert gram.choose(device(), torch.float32, 3 * 24 * 24) == few_tiles[0]
    print_rows(rows)
    assert "16 x 32, 2, 4, 2" in capsys.readouterr().out
    assert "16 x 32, 2, 4, 2" in run("--show").output


def test_tiles_of_a_product_stay(few_tiles: list[Tiles], monkeypatch: pytest.MonkeyPatch) -> None:
    """A step never measures them, since they decide the order of sums; nor does the cache change them under way."""
    monkeypatch.setenv("TRITOPT_AUTOTUNE", "1")
    monkeypatch.setattr(autotune, "event_median", None)
    product = Product(torch.bfloat16)
    x = torch.zeros(1, 20, 20, dtype=torch.bfloat16)
    gram.symmetric_product(x)
    cache.put(H200, product.key(TINY), product.tune(TINY, device(), Clock(lambda tiles: 1.0 / tiles.block_k)).entry)
    assert gram.choose(device(), torch.bfloat16, 400) == few_tiles[0]
    monkeypatch.setattr(gram, "_CHOSEN", {})
    assert gram.choose(device(), torch.bfloat16, 400) == few_tiles[1]


@pytest.mark.parametrize("default", [Tiles(), Tiles(64, 32, 8, 4, 2)])
def test_candidates_of_products(default: Tiles) -> None:
    best = [default]
    tried = []
    for tiles in gram.candidates(best):
        tried.append(tiles)
        if tiles.block_size == 64 and tiles.block_k == 128:
            best.append(tiles)
    assert tried[0] == default
    assert 10 < len(tried) == len(set(tried)) <= 16
    assert all(config.from_fields(tiles._asdict(), Tiles) == tiles for tiles in tried)
    assert {tiles.num_stages for tiles in tried if (tiles.block_size, tiles.block_k) == (64, 128)} >= {2, 3, 5}


# The command.


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["tune", *arguments])


def test_a_rehearsal(few: list[Config], capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock(lambda candidate: 1e-3 / candidate.chunk_size)
    classes = [tritopt.optim.AdamW, tritopt.optim.Adam, tritopt.optim.Adafactor]
    formats = [storage("fp32"), storage("split8+int8")]
    session = tune.Tuning(classes, formats, [TINY], device(), clock, gpu="rehearsal")
    rows = list(session.rows())
    assert len(rows) == len(session)
    measured = [row for row in rows if row.best is not None]
    assert [(row.optimizer, row.format, row.kernel) for row in measured[:2]] == [
        ("AdamW", "fp32", "adamw_update"),
        ("AdamW", "split8+int8", "adamw_update"),
    ]
    for row in measured:
        assert (row.default, row.best, row.tried) == (DEFAULT, few[2], 3)
        assert row.microseconds == pytest.approx(1e3 / 256, abs=1e-3)
        assert row.default_microseconds == pytest.approx(1e3 / 128, abs=1e-3)
    assert measured[0].gigabytes_per_second == pytest.approx(28 * 600 / (1e-3 / 256) / 1e9, rel=1e-3)
    others = {(row.optimizer, row.format): row.reason for row in rows if row.best is None}
    assert others["Adafactor", "fp32"] == "all its phases sum, and always run as they are"
    assert "Adafactor" in others["Adafactor", "split8+int8"]
    entries = cache.read("rehearsal")
    assert len(entries) == len(measured)
    assert {entry.config for entry in entries.values()} == {few[2]}
    print_rows(rows)
    printed = capsys.readouterr().out
    assert "64 x 128, 64, 1" in printed
    assert "128 x 256, 64, 1" in printed
    assert json.loads(json.dumps([row.to_json() for row in rows]))[0]["best"]["chunk_size"] == 256


def test_show_and_clear() -> None:
    cache.put(H200, variant_of(name="split8+int8").key(TINY), ENTRY)
    shown = run("--show").output
    for text in ("AMD", "not measured", "adamw_update", "bfloat16 split8", "512 x 2048, 128, 2", "10.5"):
        assert text in shown
    document = json.loads(run("--show", "--json").output)
    assert document["cached"][0]["config"]["block_size"] == 512
    assert [(row["gpu"], row["block_size"]) for row in document["shipped"]] == [
        ("NVIDIA", 1024), ("NVIDIA, fp32", 512), ("AMD", 2048), ("AMD, fp32", 1024),
    ]  # fmt: skip
    assert "deleted" in run("--clear").output
    assert cache.files() == []
    assert json.loads(run("--clear", "--json").output) == {"deleted": []}
    assert "nothing tuned yet" in run("--show").output


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--optimizer", "AdmaW"), "AdamW"),
        (("--format", "split9"), "split8"),
        (("--size", "smal"), "small"),
        (("--size", "0"), "unknown size '0'"),
        (("--show", "--clear"), "exclude each other"),
    ],
)
def test_bad_arguments(arguments: tuple[str, ...], expected: str) -> None:
    done = run(*arguments)
    assert done.exit_code == 2
    assert expected in done.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu() -> None:
    done = run()
    assert done.exit_code == 2
    assert "measures on a GPU, and there is none" in done.output


# Cold start.

COLD = """
import json, time, torch, triton
import tritopt.optim
from tritopt.tools.compiled import CompiledNorm, CompiledStep, compile_launches
from tritopt.kernels.formats.weights import MASTER_FP32
hits = []
triton.knobs.compilation.listener = lambda **event: hits.append([event["metadata"]["name"], event["cache_hit"]])
began = time.monotonic()
bf16 = torch.bfloat16
compile_launches([CompiledStep(tritopt.AdamW(), bf16, bf16, MASTER_FP32), CompiledNorm(bf16)])
print(json.dumps([hits, time.monotonic() - began]))
"""


def test_the_second_process_does_not_compile(tmp_path: Path) -> None:
    """The first step of AdamW with an fp32 master and a clip, as far as it can be made without a GPU."""
    pytest.importorskip("triton")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # Another order of sets and hashes in each process: nothing of that may be in a key.
    kernels = ["multi_tensor_adamw_update", "multi_tensor_square_update", "sum_partials"]
    for seed, is_there in (("1", False), ("2", True)):
        env |= {"TRITON_CACHE_DIR": str(tmp_path / "triton"), "PYTHONHASHSEED": seed}
        done = subprocess.run([sys.executable, "-c", COLD], env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        hits, seconds = json.loads(done.stdout)
        assert hits == [[name, is_there] for name in kernels]
        assert seconds < 10
