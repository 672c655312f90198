"""The twelve situations. Each is a real report of averages that went wrong; each is judged by what was computed."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.averaging_wounds.oracle import (
    RIGHT,
    WRONG,
    Finding,
    average_finding,
    average_of,
    distance,
    expected,
    failure,
    judged,
    output,
    parameters_only,
    together,
    undisturbed,
)
from benchmarks.averaging_wounds.peer import MEAN, Peer, Wish
from benchmarks.averaging_wounds.training import Training, batch, regression_of, scripted, sgd, values
from tests.support.memory import map_large_blocks, peak_resident, reset_peak

UNEVEN = (7, 5, 3, 1)  # widths of layers: 2 ranks have 3 and 2 rows of the first, 2 and 1, 1 and none
Part = Callable[[type[Peer], str, Path], Finding]


@dataclass(frozen=True)
class Situation:
    """A situation: a title, and what is run one after the other, each in fresh processes of so many ranks."""

    title: str
    phases: tuple[tuple[int, Part], ...]


def uneven_shards(kind: type[Peer], way: str, folder: Path) -> Finding:
    """FSDP2 with layers whose rows 2 ranks cannot share evenly: the average, then saved and loaded."""
    training = regression_of(*UNEVEN, layout="fsdp")
    peer = kind(training, Wish(way=way))
    peer.train(4, {4: lambda: peer.save(folder)})
    finding = average_finding(peer)
    other = kind(training, Wish(way=way))
    other.load(folder)
    off = distance(parameters_only(other, other.average()), parameters_only(peer, expected(peer)))
    return together([finding, judged("loaded", off)])


def low_precision(kind: type[Peer], way: str, folder: Path) -> Finding:
    """A bf16 weight that moves from 1 to 2 in 1024 steps, an EMA of decay 0.999; right within half a bf16 spacing."""
    steps, spacing = 1024, 2.0**-7
    line = 1 + torch.arange(1, steps + 1) // (steps // 128) * spacing
    training = scripted(torch.ones(4, dtype=torch.bfloat16), line[:, None].expand(steps, 4).bfloat16())
    peer = kind(training, Wish(decays=(0.999,), fp32=True, way=way))
    peer.train(steps)
    found, true = peer.average()["weights"], expected(peer)["weights"]
    verdict = RIGHT if distance({"": found}, {"": true}) <= spacing / 2 else WRONG
    return Finding(verdict, f"average {found.min().item():.3f} to {found.max().item():.3f}, true {true[0].item():.3f}")


def late_start(kind: type[Peer], way: str, folder: Path) -> Finding:
    """An EMA of decay 0.999 that starts after 5 steps and takes 20 iterates: whose weights are in it?

    One element of the weights is 1 before the start, one in the first iterate of the average, one in the newest, and 0
    otherwise: so the average is the weights that it gives to them. Right: nothing of before, and no more weight for the
    first than for the newest.
    """
    start, counted = 5, 20
    iterates = torch.zeros(start + counted, 3)
    iterates[:start, 0] = iterates[start, 1] = iterates[-1, 2] = 1
    peer = kind(scripted(torch.tensor([1.0, 0, 0]), iterates), Wish(decays=(0.999,), start=start, warmup=True, way=way))
    peer.train(len(iterates))
    before, first, newest = peer.average()["weights"].tolist()
    is_right = before < 1e-6 and first <= newest * (1 + 1e-5) and newest > 0
    note = f"weight of before the start {before:.4f}, of the first iterate {first:.4f}, of the newest {newest:.4f}"
    return Finding(RIGHT if is_right else WRONG, note)


def saved_sharded(kind: type[Peer], way: str, folder: Path) -> Finding:
    """Trains under FSDP2 on 2 ranks and saves; stores what is true beside it."""
    peer = kind(regression_of(*UNEVEN, layout="fsdp"), Wish(way=way))
    peer.train(4, {4: lambda: peer.save(folder)})
    if dist.get_rank() == 0:
        torch.save((peer.initial, peer.iterates), folder / "true.pt")
    return average_finding(peer)


def resumed_alone(kind: type[Peer], way: str, folder: Path) -> Finding:
    """Loads on 1 rank into a plain model, and takes 3 steps more: the average of all iterates."""
    peer = kind(regression_of(*UNEVEN, layout="alone"), Wish())
    peer.load(folder)
    peer.initial, peer.iterates = torch.load(folder / "true.pt")
    loaded = average_finding(peer)
    peer.train(3)
    going_on = average_finding(peer)
    return together([Finding(loaded.verdict, f"loaded: {loaded.note}"), Finding(going_on.verdict, going_on.note)])


def compiled(kind: type[Peer], way: str, folder: Path) -> Finding:
    """A model that ``torch.compile`` wrapped is averaged; the checkpoint is resumed without compiling."""
    training = regression_of(7, 5, 1, is_compiled=True)
    peer = kind(training, Wish(way=way))
    peer.train(4, {4: lambda: peer.save(folder)})
    finding = average_finding(peer)
    plain = kind(replace(training, is_compiled=False), Wish(way=way))
    plain.load(folder)
    plain.initial, plain.iterates = peer.initial, list(peer.iterates)
    plain.train(2)
    resumed = average_finding(plain)
    return together([finding, Finding(resumed.verdict, f"resumed: {resumed.note}")])


def saving(kind: type[Peer], way: str, folder: Path) -> Finding:
    """Saves the average of 8.4 million weights under FSDP2: right if no rank's memory grows by 3/4 of the average."""
    map_large_blocks()
    training = regression_of(*[1024] * 9, layout="fsdp")
    peer = kind(training, Wish(way=way))
    peer.train(1)
    peer.iterates.clear()
    size = sum(tensor.numel() * 4 for tensor in training.make().parameters())
    folder.mkdir(exist_ok=True)
    peer.save_averages(folder / "warm")
    start = reset_peak()
    dist.barrier()
    peer.save_averages(folder / "measured")
    growth = torch.tensor(float(peak_resident() - start))
    dist.all_reduce(growth, dist.ReduceOp.MAX)
    share = growth.item() / size
    return Finding(RIGHT if share < 0.75 else WRONG, f"a rank's memory grew by {share:.2f} of the average")


class Interrupted(Exception):
    """Ends an evaluation of the tests."""


def interrupted_evaluation(kind: type[Peer], way: str, folder: Path) -> Finding:
    """An evaluation on the average raises, and the caller catches it: right if the weights are those in training."""
    peer = kind(regression_of(7, 5, 1), Wish(way=way))

    def evaluate(model: nn.Module) -> None:
        model(batch(99, 7)[0])
        raise Interrupted

    with contextlib.suppress(Interrupted):
        peer.train(4, evaluations={4: evaluate})
    off = distance(values(peer.model), peer.iterates[-1])
    return judged("after an exception in an evaluation, weights", off)


def evaluations(kind: type[Peer], way: str, folder: Path) -> Finding:
    """Evaluates the average twice in a training under FSDP2: are the outputs those of the average, and is the training
    what it is without them?"""
    training = regression_of(8, 6, 4, 1, layout="fsdp")
    peer = kind(training, Wish(decays=(0.5,), way=way))
    x, seen = batch(99, 8)[0], []

    def evaluate(model: nn.Module) -> None:
        seen.append(model(x))

    peer.train(6, evaluations={2: evaluate, 4: evaluate})
    true = [output(training, expected(peer, iterates=peer.iterates[:steps]), x) for steps in (2, 4)]
    offs = [(found - wanted).abs().max().item() for found, wanted in zip(seen, true, strict=True)]
    trained = distance(peer.iterates[-1], undisturbed(training, 6))
    notes = ("FSDP2: output of the 1st evaluation", "of the 2nd", "the training's weights")
    return together(map(judged, notes, [*offs, trained]))


def validation(kind: type[Peer], way: str, folder: Path) -> Finding:
    """Both parts of validation on the average."""
    return together([part(kind, way, folder) for part in map(attempted, (interrupted_evaluation, evaluations))])


def attempted(part: Part) -> Part:
    """Returns a part whose exceptions, if every rank raises them, are findings beside those of other parts."""

    def run(kind: type[Peer], way: str, folder: Path) -> Finding:
        try:
            return part(kind, way, folder)
        except Exception as error:
            return failure(error)

    return run


def offload(kind: type[Peer], way: str, folder: Path) -> Finding:
    """The average is kept in the memory of the host, under FSDP2, by the option for it; saved and loaded too."""
    training = regression_of(8, 6, 4, 1, layout="fsdp")
    wish = Wish(offload=True, way=way)
    peer = kind(training, wish)
    peer.train(4, {4: lambda: peer.save(folder)})
    other = kind(training, wish)
    other.load(folder)
    off = distance(parameters_only(other, other.average()), parameters_only(peer, expected(peer)))
    return together([average_finding(peer), judged("loaded", off)])


def mid_window(kind: type[Peer], way: str, folder: Path) -> Finding:
    """A checkpoint in the middle of what is averaged, from step 2 on: resumed, the average is that of all iterates."""
    training = regression_of(7, 5, 1)
    wish = Wish(decays=(MEAN if kind.has_mean else 0.9,), start=2, way=way)
    peer = kind(training, wish)
    peer.train(5, {5: lambda: peer.save(folder)})
    resumed = kind(training, wish)
    resumed.load(folder)
    resumed.initial, resumed.iterates = peer.initial, list(peer.iterates)
    resumed.train(5)
    finding = average_finding(resumed)
    return Finding(finding.verdict, f"{'mean' if kind.has_mean else 'EMA'}, resumed: {finding.note}")


def two_averages(kind: type[Peer], way: str, folder: Path) -> Finding:
    """EMAs of two decays at once, with an evaluation and a checkpoint."""
    peer = kind(regression_of(7, 5, 1), Wish(decays=(0.5, 0.9), way=way))
    peer.train(6, {3: lambda: peer.save(folder)})
    findings = together([average_finding(peer, number) for number in range(2)])
    passes = "1 object, 1 pass" if peer.objects == 1 else f"{peer.objects} objects, a pass each"
    return Finding(findings.verdict, f"{passes}; {findings.note}")


class Experts(nn.Module):
    """A layer with BatchNorm and, as experts have it, a bias that is a buffer and moves by a rule of its own."""

    expert_bias: Tensor  # 1-D, fp32

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5))
        self.head = nn.Linear(5, 1)
        self.register_buffer("expert_bias", torch.zeros(5))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.body(x)
        if self.training:
            self.expert_bias += 0.1 * hidden.detach().sum(0).sign()
        return self.head(hidden + self.expert_bias)


def _make_experts() -> nn.Module:
    torch.manual_seed(0)
    return Experts()


def buffers(kind: type[Peer], way: str, folder: Path) -> Finding:
    """BatchNorm's statistics and an expert bias are averaged like weights; the counter of batches is the model's."""
    loss = regression_of(7, 1).loss
    training = Training(_make_experts, loss)
    peer = kind(training, Wish(buffers=True, way=way))
    peer.train(5)
    found, true = peer.average(), expected(peer)
    names = {"weights": "weight", "statistics": "running", "expert bias": "expert_bias", "counter": "num_batches"}
    findings = []
    for what, part in names.items():
        if what == "statistics" and peer.recomputed:
            findings.append(Finding(RIGHT, "statistics recomputed"))
        else:
            findings.append(judged(what, max(distance({n: found[n]}, {n: true[n]}) for n in true if part in n)))
    return together(findings)


def skipped_steps(kind: type[Peer], way: str, folder: Path) -> Finding:
    """GradScaler skips 3 of 8 steps: the average is that of the 5 iterates, beside SGD's loop and its fused form."""
    findings = []
    for form, options in {"loop": {"foreach": False}, "fused": {"fused": True}}.items():
        make: Any = functools.partial(sgd, **options)
        peer = kind(regression_of(7, 5, 1, optimizer=make, overflows=(2, 3, 5)), Wish(way=way))
        peer.train(8)
        finding = average_finding(peer)
        counted = "" if finding.verdict == RIGHT else f" ({_as_if_counted(peer)})"
        findings.append(Finding(finding.verdict, f"SGD {form}: {finding.note}{counted}"))
    return together(findings)


def _as_if_counted(peer: Peer) -> str:
    """Says whether the average is what it is if the skipped steps count."""
    overflows, taken = peer.training.overflows or (), iter(peer.iterates)
    counted, last = [], peer.initial
    for step in range(peer.steps):
        last = last if step in overflows else next(taken)
        counted.append(last)
    true = average_of(counted, peer.wish.decays[0], peer.initial if peer.holds_initial else None)
    off = distance(parameters_only(peer, peer.average()), parameters_only(peer, true))
    return f"with skipped steps counted, off by {off:.1e}"


def _on_2(part: Part) -> tuple[tuple[int, Part], ...]:
    return ((2, part),)


SITUATIONS = {
    1: Situation("uneven FSDP2 shards", _on_2(uneven_shards)),
    2: Situation("bf16 weights", _on_2(low_precision)),
    3: Situation("fixed decay, late start", _on_2(late_start)),
    4: Situation("resume on another number of ranks, another layout", ((2, saved_sharded), (1, resumed_alone))),
    5: Situation("torch.compile", _on_2(compiled)),
    6: Situation("saving under FSDP2", _on_2(saving)),
    7: Situation("validation on the average", _on_2(validation)),
    8: Situation("CPU offload under FSDP2", _on_2(offload)),
    9: Situation("checkpoint in the middle of averaging", _on_2(mid_window)),
    10: Situation("two averages", _on_2(two_averages)),
    11: Situation("BatchNorm, expert bias", _on_2(buffers)),
    12: Situation("GradScaler skips a step", _on_2(skipped_steps)),
}
