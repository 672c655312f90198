"""Weighted means of checkpoints: of every kind of source, in every form, bounded, verified, whole or not at all."""

import itertools
import math
import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

import dist_asgd
from dist_asgd import Checkpointer, PolynomialDecay, ShardedASGD, ShardedAverages, Uniform, merge
from dist_asgd.checkpoint import CheckpointError
from dist_asgd.checkpoint.format.manifest import read_manifest
from dist_asgd.checkpoint.merging import mean, sources, sums, target
from dist_asgd.checkpoint.merging.power_averages import Profile, combine, gamma_of_width
from dist_asgd.checkpoint.merging.steps import parse_steps, select_steps
from dist_asgd.checkpoint.merging.weights import DECAYS, decay_weights
from dist_asgd.checkpoint.storage.storage import Storage
from dist_asgd.cli.main import main
from tests.support import counting_proxy
from tests.support.layouts import Model, backward, build, named_parameters, place, whole
from tests.support.memory import map_large_blocks, peak_resident, reset_peak
from tests.support.ranks import message_of, run_alone, run_ranks
from tests.support.stores import *  # noqa: F403 fixtures

Tensors = dict[str, Tensor]


def same(found: Tensors, expected: Tensors) -> bool:
    return found.keys() == expected.keys() and all(
        found[name].dtype == tensor.dtype and torch.equal(found[name], tensor) for name, tensor in expected.items()
    )


def mean_of(states: list[Tensors], weights: list[float]) -> Tensors:
    """In float64, rounded to the dtype, which is float32."""
    total = math.fsum(weights)
    return {
        name: (sum(w * state[name].double() for w, state in zip(weights, states, strict=True)) / total).to(tensor.dtype)
        for name, tensor in states[-1].items()
    }


def read(path: Path) -> Tensors:
    """Any of the targets but a checkpoint, by the libraries that are meant to read it."""
    if path.suffix == ".pt":
        return torch.load(path, weights_only=True)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    return {name: tensor for file in files for name, tensor in safetensors.torch.load_file(file).items()}


def size_of(path: Path) -> int:
    return sum(file.stat().st_size for file in [path, *path.rglob("*")] if file.is_file())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of weights with steps 10, 20, 40 and 50; weight w is the number of the step."""
    folder = tmp_path_factory.mktemp("merging") / "run"

    def save() -> None:
        with Checkpointer(folder) as checkpointer:
            for step in (10, 20, 40, 50):
                state = {"w": torch.full((3, 2), float(step)), "n": torch.tensor(step), "mask": torch.tensor([True])}
                checkpointer.save(step, {"model": state, "optimizer": {"lr": 0.1}, "data": {"at": step}})

    run_alone(save)
    return folder


# Sources and targets


def test_sources_of_every_kind_into_targets_of_every_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several layouts, world sizes and libraries, cut into parts that no block of a checksum fits."""
    monkeypatch.setattr(mean, "PART_BYTES", 1000)
    monkeypatch.setattr(sources, "STREAMED", 1500)
    monkeypatch.setattr(target, "MAX_ITEM_BYTES", 300)
    states = [Model(seed).state_dict() for seed in range(5)]

    def ranks(rank: int, layout: str, seed: int) -> None:
        model, _ = build(layout, seed, lr=0.1)
        dist_asgd.save(tmp_path / str(seed), {"model": model, "step": seed})

    def stock(rank: int) -> None:
        dcp.save({"model": place("tp", Model(2)).state_dict()}, checkpoint_id=tmp_path / "2")

    run_ranks(3, ranks, "fsdp", 0)
    run_ranks(2, ranks, "tp", 1)
    run_ranks(2, stock)
    safetensors.torch.save_file(states[3], tmp_path / "3.safetensors")
    names, weights = ["0", "1", "2", "3.safetensors", "4"], [1.0, 2.0, 0.5, -1.0, 3.0]

    def alone() -> None:
        dist_asgd.export(tmp_path / "4", Model(4), max_shard_bytes=2000)
        places, expected = [tmp_path / name for name in names], mean_of(states, weights)
        report = merge(places, tmp_path / "out", weights=weights)
        assert (report.format, report.tensors, report.left_out) == ("checkpoint", len(expected), [])
        assert list(report.weights.values()) == pytest.approx([weight / 5.5 for weight in weights])
        ours, stock = Model(9), {"model": Model(9).state_dict()}
        dist_asgd.load(tmp_path / "out", {"model": ours})
        dcp.load(stock, checkpoint_id=tmp_path / "out")
        assert same(ours.state_dict(), expected) and same(stock["model"], expected)
        for out in ("x.safetensors", "x.pt", "hf/"):
            report = merge(places, f"{tmp_path}/{out}", weights=weights)
            assert same(read(tmp_path / out), expected) and report.bytes == size_of(tmp_path / out)
        merge(tmp_path / "out", tmp_path / "copy.safetensors")
        assert same(read(tmp_path / "copy.safetensors"), expected)
        assert main(["verify", str(tmp_path / "out")]) == 0

    run_alone(alone)


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64, torch.complex128]


def test_dtypes_and_what_has_no_mean(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def state(step: int) -> Tensors:
        torch.manual_seed(step)
        found = {str(dtype): torch.randn(5, 7, dtype=dtype) for dtype in DTYPES}
        found |= {"scalar": torch.tensor(float(step)), "empty": torch.empty(0, 3), "transposed": torch.randn(4, 6).mT}
        return found | {"count": torch.tensor(step), "equal": torch.arange(3), "other": torch.tensor([True, step == 2])}

    class Extra(nn.Module):
        """State that is no tensor."""

        def __init__(self, step: int) -> None:
            super().__init__()
            self.step = step
            for name, tensor in state(step).items():
                self.register_buffer(name.replace(".", "_"), tensor)

        def get_extra_state(self) -> Any:
            return {"step": self.step}

        def set_extra_state(self, found: Any) -> None:
            self.step = found["step"]

    def alone() -> None:
        for step in (1, 2, 3):
            dist_asgd.save(tmp_path / str(step), {"model": Extra(step), "optimizer": {"step": step}})
        places = [tmp_path / str(step) for step in (1, 2, 3)]
        report = merge(places, tmp_path / "out")
        assert report.from_last == ["count", "equal", "other"] and report.differing == ["count", "other"]
        assert "integers that differ are the last source's" in caplog.text and ": other." in caplog.text
        loaded = Extra(9)
        dist_asgd.load(tmp_path / "out", {"model": loaded})
        assert (
            loaded.step == 3 and "optimizer" not in read_manifest((tmp_path / "out/manifest.json").read_bytes()).values
        )
        states, found = [Extra(step).state_dict() for step in (1, 2, 3)], loaded.state_dict()
        for name, tensor in list(states[2].items())[:-4]:
            real = [torch.view_as_real(one[name]) if tensor.is_complex() else one[name] for one in states]
            exact = (sum(part.double() for part in real) / 3).to(real[0].dtype)
            expected = torch.view_as_complex(exact) if tensor.is_complex() else exact
            assert found[name].dtype == tensor.dtype and torch.equal(found[name], expected), name
        assert all(torch.equal(found[name], states[2][name]) for name in ("count", "equal", "other"))
        assert merge(places, tmp_path / "x.pt").left_out == ["model._extra_state.step"]

    run_alone(alone)


def test_a_mean_is_rounded_once() -> None:
    """PyTorch rounds float64 to float32 first, and just above the middle of two bfloat16 that is the middle."""
    values = torch.tensor([1 + 2**-8 + 2**-40, 1 + 2**-8, 1 + 2**-8 - 2**-40, -1 - 2**-8 - 2**-40], dtype=torch.float64)
    assert values.to(torch.bfloat16).tolist() == [1, 1, 1, -1]
    assert sums.rounded(values, torch.bfloat16).tolist() == [1 + 2**-7, 1, 1, -1 - 2**-7]
    special = torch.tensor([math.inf, -math.inf, 1e300, -1e300, 1e-300, 0.0, -0.0, 65519.99, 65520.0, 2**-25])
    special = torch.cat([special.double(), torch.tensor([2**-25 + 2**-60, math.nan], dtype=torch.float64)])
    expected = [math.inf, -math.inf, math.inf, -math.inf, 0, 0, 0, 65504, math.inf, 0, 2**-24]
    assert sums.rounded(special, torch.float16)[:-1].tolist() == expected
    assert sums.rounded(special, torch.float16)[-1].isnan()


def test_compiled_means_have_the_bits_of_operators() -> None:
    """Of all values of 16 bits, and of means at and around the middles between them."""

    def alone() -> None:
        for dtype in (torch.bfloat16, torch.float16):
            values = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
            exact = values.double()[values.isfinite()].sort().values
            middles = (exact[1:] + exact[:-1]) / 2
            around = [torch.nextafter(middles, exact[1:]), torch.nextafter(middles, exact[:-1])]
            special = torch.tensor([1e300, -1e300, 1e-300, -1e-300, math.inf, math.nan], dtype=torch.float64)
            check_arithmetic(dtype, [values, values.flip(0)], torch.cat([exact, middles, *around, special]))
        for dtype in (torch.float32, torch.float64):
            check_arithmetic(dtype, list(torch.randn(3, 10_001).to(dtype)), torch.randn(10_001, dtype=torch.float64))

    run_alone(alone)


def check_arithmetic(dtype: torch.dtype, parts: list[Tensor], totals: Tensor) -> None:
    compiled, weights = sums.compiled(dtype), [0.3, -1.7, 0.6][: len(parts)]
    assert compiled is not None
    found = []
    for arithmetic in (compiled, sums.Operators()):
        total, mean = torch.empty(len(parts[0]), dtype=torch.float64), torch.empty(len(totals), dtype=dtype)
        arithmetic.add(total, parts, weights, True)
        arithmetic.add(total, parts, weights, False)
        arithmetic.finish(mean, totals.clone(), 1.0)
        found.append((total, mean))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one.isnan(), other.isnan()) and torch.equal(one[~one.isnan()], other[~other.isnan()])


# Weights


def test_the_shapes_of_a_decay() -> None:
    assert decay_weights("linear", 4) == pytest.approx([0.25] * 4)
    for name, shape in DECAYS.items():
        scales = [shape(number / 5) for number in range(6)]  # of the updates to the iterates, and 0 after the last
        assert decay_weights(name, 5) == pytest.approx([a - b for a, b in itertools.pairwise(scales)])
        # A training that adds u_i to its weights ends at the sum of the scaled u_i.
        updates = [random.Random(number).random() for number in range(4)]
        iterates = [0.0, *itertools.accumulate(updates)]
        decayed = sum(scale * update for scale, update in zip(scales[1:], updates, strict=False))
        weighted = sum(w * x for w, x in zip(decay_weights(name, 5), iterates, strict=True))
        assert weighted == pytest.approx(decayed)


def test_weights_and_steps(run: Path, tmp_path: Path) -> None:
    def values(number: int = itertools.count(), **options: Any) -> float:
        out = f"{tmp_path}/{next(number)}.safetensors"
        merge(run, out, **options)
        return read(Path(out))["w"][0, 0].item()

    def alone() -> None:
        assert values() == 50  # the newest of a run
        assert values(steps="10,40") == 25 and values(steps="10:40") == pytest.approx(70 / 3)
        assert values(steps="10:40:30") == 25 and values(steps=range(10, 50, 30)) == 25 and values(steps=":") == 30
        assert values(steps=[40, 10], weights=[1, 3]) == 17.5 and values(steps=[10, 20], weights=[-1, 2]) == 30
        assert values(steps="10:20", decay="linear") == 15
        assert values(steps="10:20", decay="cosine") == values(steps="10:20")
        assert values(steps="10:20", decay="1-sqrt") == pytest.approx(10 + 10 * (1 - math.sqrt(0.5)), rel=1e-6)

    run_alone(alone)
    for text, steps in {"2:": [2, 5], "1,2:": [1, 2, 5], "1:5:4": [1, 5], "5,1": [5, 1]}.items():
        assert select_steps(parse_steps(text), [1, 2, 5], "x") == steps


# Power averages of other widths


def iterates_and_checkpoints(folder: Path, steps: int, every: int, t0: int) -> tuple[list[str], list[Tensor]]:
    """Trains, saves, and returns the names of parameters and the iterates of the averages (1-D, fp64)."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    averages = {"mean": Uniform(), "wide": PolynomialDecay(6.94), "narrow": PolynomialDecay(16.97)}
    optimizer = ShardedASGD(model.named_parameters(), lr=0.05, t0=t0, average=averages)
    iterates = []
    with Checkpointer(folder) as checkpointer:
        for step in range(1, steps + 1):
            model(torch.randn(8, 3)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if step >= t0 + 2:
                iterates.append(torch.cat([param.detach().double().flatten() for param in model.parameters()]))
            if step % every == 0:
                checkpointer.save(step, {"model": model, "optimizer": optimizer})
    return [name for name, _ in model.named_parameters()], iterates


def test_a_power_average_of_another_width(tmp_path: Path) -> None:
    """Out of two that were stored 15 times. It is compared with the recursion over all iterates."""

    def alone() -> None:
        names, iterates = iterates_and_checkpoints(tmp_path / "run", steps=300, every=20, t0=20)
        for width in (0.06, 0.08):
            gamma, exact = gamma_of_width(width), iterates[0].clone()
            for number, iterate in enumerate(iterates[1:], 2):
                exact += (iterate - exact) * PolynomialDecay(gamma).weight(number)
            out = tmp_path / f"{width}.safetensors"
            report = merge(tmp_path / "run", out, steps="40:", ema_width=width)
            state = read(out)
            found = torch.cat([state[name].double().flatten() for name in names])
            assert report.profile_error < 0.01
            assert report.from_last == ["1.num_batches_tracked", "1.running_mean", "1.running_var"]
            assert (found - exact).norm() < 0.002 * (iterates[-1] - exact).norm()
        merge(tmp_path / "run", tmp_path / "raw.safetensors")
        assert torch.equal(read(tmp_path / "raw.safetensors")["1.running_var"], state["1.running_var"])
        averaged = merge(tmp_path / "run", tmp_path / "a.safetensors", steps="280:", average="mean")
        assert averaged.own == ["1.running_mean", "1.running_var"]
        assert "of the kind PolynomialDecay" in message_of(lambda: plain(tmp_path), CheckpointError)

    def plain(folder: Path) -> None:
        dist_asgd.save(folder / "plain", {"model": nn.Linear(2, 2)})
        merge(folder / "plain", folder / "y", ema_width=0.05)

    run_alone(alone)


class Normed(Model):
    """A model with two buffers that each step changes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(3))
        self.register_buffer("newest", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.seen += x.detach().abs().mean()
            self.newest.fill_(x.detach().mean().item())
        return super().forward(x)


@pytest.mark.parametrize("layout", ["ddp", "fsdp", "tp"])
def test_a_power_average_beside_another_optimizer(layout: str, tmp_path: Path) -> None:
    """Out of checkpoints of two ranks. The oracle has the exact profile of the width over whole iterates, in fp64."""

    def ranks(rank: int) -> list[Tensors]:
        model = place(layout, Normed())
        named, inner = named_parameters(model), getattr(model, "module", model)
        optimizer = torch.optim.AdamW(named.values(), lr=0.02, foreach="tp" not in layout)
        kinds = {"wide": PolynomialDecay(6.94), "mean": Uniform(), "narrow": PolynomialDecay(16.97)}
        buffers = {"seen": "average", "newest": "copy"}
        averages = ShardedAverages(named.items(), kinds, optimizer=optimizer, start=5, module=model, buffers=buffers)
        iterates = []
        with Checkpointer(tmp_path / "run") as checkpointer:
            for step in range(1, 66):
                backward(model, layout, step)
                optimizer.step()
                optimizer.zero_grad()
                if step > 5:
                    whole_now = {name: whole(param).double() for name, param in named.items()}
                    iterates.append(whole_now | {name: value.double() for name, value in inner.named_buffers()})
                if step == 5 or step % 5 == 0:
                    checkpointer.save(step, {"model": model, "averages": averages})
        return iterates

    def alone(iterates: list[Tensors]) -> None:
        width = 0.08
        gamma, exact = gamma_of_width(width), dict(iterates[0])
        for number, iterate in enumerate(iterates[1:], 2):
            mu = PolynomialDecay(gamma).weight(number)
            exact = {name: value + (iterate[name] - value) * mu for name, value in exact.items()}
        report = merge(tmp_path / "run", tmp_path / "x.safetensors", steps="15:", ema_width=width)
        assert len(report.weights) == 2 * 11 and report.profile_error < 0.01 and report.from_last == ["newest"]
        found = read(tmp_path / "x.safetensors")
        assert torch.equal(found.pop("newest").double(), iterates[-1]["newest"])
        for name, value in found.items():
            assert (value - exact[name]).norm() <= 0.03 * (iterates[-1][name] - exact[name]).norm(), name
        text = message_of(lambda: merge(tmp_path / "run", tmp_path / "y", steps="5", ema_width=width), CheckpointError)
        assert "'averages' has not begun to average" in text

    run_alone(alone, run_ranks(2, ranks)[0])


def test_power_averages_that_cannot_be_combined(tmp_path: Path) -> None:
    def saved(name: str, other: str = "PolynomialDecay(every=1, gamma=16.97)", **progress: Any) -> None:
        kinds = {"wide": "PolynomialDecay(every=1, gamma=6.94)", "narrow": other}
        counts = {"kinds": kinds, "iterates": 20, "others": {}, "buffers": 20, "treatment": {}} | progress
        averages = {"wide": {"w": torch.zeros(2)}, "narrow": {"w": torch.ones(2)}, "progress": counts}
        dist_asgd.save(tmp_path / name, {"model": {"w": torch.ones(2)}, "averages": averages})
        merge(tmp_path / name, tmp_path / f"{name}.pt", ema_width=0.08)

    def alone() -> None:
        saved("good", treatment={"b": "copy"}, buffers=3)
        for number, (text, changes) in enumerate(
            {
                "take iterates at different distances, every=[1, 2]": {"other": "PolynomialDecay(every=2, gamma=17.0)"},
                "different numbers of iterates into their averages: [3, 20]": {"others": {"w.x": 3}},
                "iterates into their averages: [7, 20]": {"buffers": 7, "treatment": {"b": "average"}},
                "'averages' has not begun to average": {"iterates": 0},
                "has one power average": {"other": "Uniform(every=1)"},
            }.items()
        ):
            assert text in message_of(lambda changes=changes, n=number: saved(f"bad{n}", **changes), CheckpointError)

    run_alone(alone)


def test_profiles() -> None:
    assert gamma_of_width(0.10) == pytest.approx(6.94, abs=0.01) and gamma_of_width(0.05) == pytest.approx(
        16.97, abs=0.01
    )
    weights, error = combine([Profile(6.94, 1000), Profile(16.97, 1000)], Profile(16.97, 1000))
    assert weights == pytest.approx([0, 1], abs=1e-6) and error < 1e-6
    # Inner products of EDM2, for many iterates.
    stored = [Profile(gamma, count) for count in (20_000, 40_000) for gamma in (6.94, 16.97)]
    weights, error = combine(stored, Profile(10, 40_000))

    def product(a: Profile, b: Profile) -> float:
        a, b = sorted((a, b), key=lambda profile: profile.count)
        ratio = (a.count / b.count) ** b.gamma / b.count
        return (a.gamma + 1) * (b.gamma + 1) * ratio / (a.gamma + b.gamma + 1)

    grams = torch.tensor([[product(a, b) for b in stored] for a in stored], dtype=torch.float64)
    wanted = torch.tensor([product(a, Profile(10, 40_000)) for a in stored], dtype=torch.float64)
    solution = torch.linalg.solve(grams, wanted)
    assert weights == pytest.approx((solution / solution.sum()).tolist(), abs=0.01) and error < 0.1


# What goes wrong


def other(folder: Path, name: str, **changes: Any) -> str:
    """Saves a checkpoint like those of the run but for ``changes``; None leaves a tensor out."""
    state = {"w": torch.ones(3, 2), "n": torch.tensor(1), "mask": torch.tensor([True])} | changes
    dist_asgd.save(folder / name, {"model": {key: value for key, value in state.items() if value is not None}})
    return str(folder / name)


def misfits(run: Path, here: Path) -> Any:
    misfit = other(here, "misfit", w=torch.ones(2, 3), n=torch.tensor(1.0), mask=None, more=torch.ones(1))
    return merge([other(here, "other"), misfit], here / "out")


def float8(run: Path, here: Path) -> Any:
    tensors = {"w": torch.ones(3, 2).to(torch.float8_e4m3fn)}
    return merge([other(here, "other", **tensors), other(here, "more", **tensors)], here / "out")


def target_exists(run: Path, here: Path) -> Any:
    (here / "x.safetensors").write_text("older")
    return merge(run, here / "x.safetensors")


def into_a_source(run: Path, here: Path) -> Any:
    place = other(here, "other")
    return merge([place], place)


def inside_a_checkpoint(run: Path, here: Path) -> Any:
    return merge(run, f"{other(here, 'other')}/merged")


def no_tensors(run: Path, here: Path) -> Any:
    return merge(other(here, "other"), here / "out", entry="nothing")


def damaged_header(run: Path, here: Path) -> Any:
    safetensors.torch.save_file({"w": torch.ones(2)}, here / "x.safetensors")
    data = (here / "x.safetensors").read_bytes()
    (here / "x.safetensors").write_bytes(data[:-1])
    return merge(here / "x.safetensors", here / "out")


WRONG = {
    misfits: "nothing was written (4):\n  mask: bool of shape (1,) in {here}/other; missing in {here}/misfit\n  n: "
    "int64 of shape () in {here}/other; float32 of shape () in {here}/misfit\n  w: float32 of shape (3, 2) in ",
    float8: "w: float8_e4m3fn of shape (3, 2), whose mean needs their scales",
    target_exists: "x.safetensors exists: a merge replaces nothing",
    into_a_source: "other is a checkpoint: checkpoints are never overwritten",
    inside_a_checkpoint: "other is a checkpoint, which nothing may be added to",
    no_tensors: "no tensors in an entry 'nothing'; it has ['model']. Name one as entry",
    damaged_header: "x.safetensors is no sound file of safetensors: 'w', F32 of shape [2], is said",
    lambda run, here: merge(run, run): "is not empty: checkpoints are never overwritten",
    lambda run, here: merge(
        run, run / "step-00000060-0001-0123abcd"
    ): "is a name of the steps that a Checkpointer saves",
    lambda run, here: merge([], here / "out"): "there is nothing to merge",
    lambda run, here: merge([run, run], here / "out"): "is given twice",
    lambda run, here: merge(
        here / "none", here / "out"
    ): "none has nothing to merge: neither manifest.json nor .metadata",
    lambda run, here: merge(here / "no.safetensors", here / "out"): "no.safetensors does not exist",
    lambda run, here: merge(here / "x.pt", here / "out"): "x.pt is a file for torch.load",
    lambda run, here: merge(run, here / "out", steps="10:50:10"): "has no checkpoint of step 30; it has 10, 20, 40, 50",
    lambda run, here: merge(run, here / "out", steps=[10, 10]): "steps 10 of",
    lambda run, here: merge(run, here / "out", steps="60:"): "has no steps in 60:None; it has 10, 20, 40, 50",
    lambda run, here: merge(run, here / "out", steps="5-7"): "'5-7' names no steps",
    lambda run, here: merge(run, here / "out", steps=[]): "steps is empty",
    lambda run, here: merge(other(here, "other"), here / "out", steps="10"): "is no run: steps are for",
    lambda run, here: merge(run, here / "out", steps="10:40", weights=[1, 2]): "2 weights are given for 3 checkpoints",
    lambda run, here: merge(run, here / "out", weights=[1, -1]): "weights add up to 0.0",
    lambda run, here: merge(run, here / "out", weights=[]): "weights add up to 0.0",
    lambda run, here: merge(run, here / "out", weights=[1, math.nan]): "weights must be finite numbers, got nan",
    lambda run, here: merge(run, here / "out", weights=[math.inf]): "weights must be finite numbers, got inf",
    lambda run, here: merge(run, here / "out", weights="1,2"): "weights must be a list of numbers",
    lambda run, here: merge(run, here / "out", weights=[1], decay="linear"): "weights and decay exclude each other",
    lambda run, here: merge(run, here / "out", decay="1-sqrt"): "a decay takes at least two checkpoints",
    lambda run, here: merge(
        run, here / "out", decay="cosine", steps=":"
    ): "checkpoints at equal distances, in the order",
    lambda run, here: merge(run, here / "out", decay="cosine", steps=[20, 10]): "checkpoints at equal distances",
    lambda run, here: merge(run, here / "out", decay="cubic"): "decay must be one of linear, cosine, 1-sqrt, or None",
    lambda run, here: merge(run, here / "out", ema_width=0.3): "ema_width must be in [0.0001, 0.2887)",
    lambda run, here: merge(run, here / "out", ema_width=0.05): "has no averages of the kind PolynomialDecay",
    lambda run, here: merge(run, here / "out", average=True): "has no averages",
    lambda run, here: merge(run, here / "out", average="ema"): "has no average 'ema'",
    lambda run, here: merge(run, ""): "expected a URL or a path, got ''",
    lambda run, here: merge(run, [here]): "merge(sources, url) writes to url",
    lambda run, here: merge(run, here / "out", format="zip"): "format must be one of checkpoint, huggingface, torch",
    lambda run, here: merge("memory://none", here / "out", {"x": 1}): "memory://none has nothing to merge",
}


def test_errors(run: Path, tmp_path: Path) -> None:
    """They say what to do, and leave nothing."""

    def alone() -> None:
        before = sorted(path for path in run.rglob("*"))
        for number, (act, text) in enumerate(WRONG.items()):
            here = tmp_path / str(number)
            here.mkdir()
            found = message_of(lambda act=act, here=here: act(run, here), CheckpointError, ValueError, TypeError)
            assert text.format(here=here) in found, (text, found)
            assert {path.name for path in here.iterdir()} <= {"other", "more", "misfit", "x.safetensors"}, text
        assert sorted(path for path in run.rglob("*")) == before

    run_alone(alone)
    assert (tmp_path / "2" / "x.safetensors").read_text() == "older"


@pytest.mark.parametrize(("out", "worth_it"), [("out", 0), ("x.safetensors", 2**30), ("x/", 2**30)])
def test_damage_is_noticed_and_leaves_nothing(
    out: str, worth_it: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the last block of one source of two, whichever library wrote it, by compiled code and without."""
    monkeypatch.setattr(mean, "PART_BYTES", 100_000)
    monkeypatch.setattr(mean, "LARGE", worth_it)
    weights = {"a": torch.randn(300, 100), "b": torch.randn(200, 300)}

    def alone() -> None:
        dist_asgd.save(tmp_path / "ours", {"model": weights})
        dcp.save({"model": weights}, checkpoint_id=tmp_path / "stock")
        monkeypatch.setattr(sources, "STREAMED", 150_000)  # "b" is read in parts, "a" as a whole
        for name, key in itertools.product(("ours", "stock"), weights):
            file = tmp_path / name / "__0_0.distcp"
            sound, element = file.read_bytes(), weights[key].numpy().tobytes()
            data = bytearray(sound)
            data[sound.index(element) + len(element) - 3] ^= 1
            file.write_bytes(data)
            places = [tmp_path / "ours", tmp_path / "stock"]
            text = message_of(lambda places=places: merge(places, f"{tmp_path}/{out}"), CheckpointError)
            assert name in text and "damaged" in text and f"'{key}'" in text, text
            assert {path.parent.name for path in tmp_path.rglob("*") if path.is_file()} == {"ours", "stock"}
            file.write_bytes(sound)
        merge([tmp_path / "ours", tmp_path / "stock"], f"{tmp_path}/{out}")
        assert main(["verify", str(tmp_path / "out")]) == 0 if out == "out" else same(read(tmp_path / out), weights)

    run_alone(alone)


@pytest.mark.parametrize("out", ["out", "x.safetensors", "x/"])
def test_a_merge_that_is_killed_leaves_no_checkpoint(
    run: Path, out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether its last part is being made or its files wait for the commit."""

    def killed(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    for owner, name in [(mean.MeanSource, "_results"), (target, "commit")][: 2 if out == "out" else 1]:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, killed)
            with pytest.raises(AssertionError, match="rank 0"):
                run_alone(lambda: merge(run, f"{tmp_path}/{out}", steps=":"))
    files = {path.name for path in tmp_path.rglob("*") if path.is_file() and not path.name.startswith(".")}
    assert files <= {"__0_0.distcp"}
    if out != "out":  # what was begun is in nobody's way
        run_alone(lambda: merge(run, f"{tmp_path}/{out}", steps=":"))
        assert read(tmp_path / out)["w"][0, 0] == 30


# Ranks


def test_ranks_merge_once(run: Path, tmp_path: Path) -> None:
    def ranks(rank: int) -> tuple[Any, str, str]:
        report = merge(run, tmp_path / "out", steps=":")
        text = message_of(lambda: merge(run, tmp_path / "out"), CheckpointError)
        wrong = message_of(lambda: merge(run, tmp_path / "out", decay="x" if rank else None), ValueError)
        model = {"w": torch.zeros(3, 2), "n": torch.tensor(0), "mask": torch.tensor([False])}
        dist_asgd.load(tmp_path / "out", {"model": model})
        assert torch.equal(model["w"], torch.full((3, 2), 30.0)) and model["n"] == 50
        return report, text, wrong

    found = run_ranks(2, ranks)
    assert found[0][0] == found[1][0] and len(found[0][0].weights) == 4
    assert all("checkpoints are never overwritten" in text for _, text, _ in found)
    assert all("rank 1: decay must be one of" in wrong for _, _, wrong in found)


def test_processes_without_a_group_are_refused(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    text = message_of(lambda: run_alone(merge, run, tmp_path / "out"), AssertionError)
    assert "torchrun started 2 processes, and each would merge" in text and not list(tmp_path.iterdir())


# Stores, bytes and memory


def test_on_a_store(s3_server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each byte of the weights is sent once, whatever the layouts, and little else."""
    monkeypatch.setattr(mean, "PART_BYTES", 2**20)
    url, size = s3_server.new_url(), 4 * (600 * 700 + 400 * 300 + 50)

    def weights(seed: int) -> Tensors:
        generator = torch.Generator().manual_seed(seed)
        shapes = {"a": (600, 700), "b": (400, 300), "c": (50,)}
        return {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}

    def ranks(rank: int) -> None:
        mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
        for dim in (0, 1):  # rows, columns
            state = {
                name: dist.tensor.distribute_tensor(tensor, mesh, [dist.tensor.Shard(dim if tensor.dim() > 1 else 0)])
                for name, tensor in weights(dim).items()
            }
            dist_asgd.save(tmp_path / str(dim), {"model": state, "optimizer": torch.ones(700, 700)})

    def alone() -> None:
        for dim in ("0", "1"):
            storage = Storage.open(f"{url}/{dim}", s3_server.options)
            for file in (tmp_path / dim).iterdir():
                storage.write(file.name, [file.read_bytes()])
        places, expected = [f"{url}/0", f"{url}/1"], mean_of([weights(0), weights(1)], [1, 3])
        with counting_proxy.proxied(s3_server.address, s3_server.options, 0.0) as (proxy, options):
            merge(places, tmp_path / "x.safetensors", options, weights=[1, 3])
            assert 2 * size < proxy.traffic().sent < 2.02 * size + 30_000  # manifests, and headers of HTTP
        assert same(read(tmp_path / "x.safetensors"), expected)
        merge([*places, tmp_path / "x.safetensors"], f"{url}/out", s3_server.options, weights=[1, 3, 4])
        found = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
        dist_asgd.load(f"{url}/out", {"model": found}, s3_server.options)
        assert all((found[name] - tensor).abs().max() < 1e-6 for name, tensor in expected.items())

    run_ranks(2, ranks)
    run_alone(alone)


def test_memory_does_not_grow_with_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mean, "PART_BYTES", 2**20)

    def alone() -> int:
        map_large_blocks()
        weights = {"a": torch.zeros(4096, 2048), "b": torch.zeros(8192, 1024)}  # 2 x 32 MiB
        dist_asgd.save(tmp_path / "ours", {"model": weights})
        dcp.save({"model": weights}, checkpoint_id=tmp_path / "stock")
        del weights
        dist_asgd.save(tmp_path / "small", {"model": {"a": torch.ones(3)}})
        merge(tmp_path / "small", tmp_path / "warm")
        start = reset_peak()
        merge([tmp_path / "ours", tmp_path / "stock"], tmp_path / "out")
        return peak_resident() - start

    assert run_alone(alone) < 24 * 2**20  # a source has 64 MiB; code that is run for the first time takes some MiB


def test_urls_of_one_store_share_a_client(s3_server: Any) -> None:
    url, known = s3_server.new_url(), []
    for name in ("a", "b"):  # the driver changes the options that it is given
        Storage.open(f"{url}/{name}", s3_server.options, known=known).write("file", [b"x"])
    other = {**s3_server.options, "default_block_size": 2**23}
    assert Storage.open(f"{url}/a", other, known=known).read("file") == b"x"
    assert len(known) == 2
    assert known[0].get() is not known[1].get()
