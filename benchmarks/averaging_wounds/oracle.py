"""What averages should be, from the stored iterates in fp64, and what was found beside it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.averaging_wounds.peer import MEAN, NotPossible, NotRun, Peer
from benchmarks.averaging_wounds.training import Training, Values, sgd

RIGHT, NOT_POSSIBLE, NOT_RUN = "right", "not possible", "not run"
ERROR, HANGS, WRONG = "error", "hangs", "silently wrong"
SEVERITY = (RIGHT, NOT_RUN, NOT_POSSIBLE, ERROR, HANGS, WRONG)
LINE = 160  # characters of an error that the table shows
TOLERANCE = 1e-5  # fp32 averages of a few iterates near 1; a wrong one is off by 1e-3 or more


@dataclass(frozen=True)
class Finding:
    """The verdict on a peer in a situation, with the figures or the reason."""

    verdict: str
    note: str


def together(findings: Iterable[Finding]) -> Finding:
    """Returns the most severe verdict with the notes of all."""
    findings = list(findings)
    worst = max(findings, key=lambda finding: SEVERITY.index(finding.verdict))
    return Finding(worst.verdict, "; ".join(finding.note for finding in findings))


def failure(error: BaseException) -> Finding:
    """Returns the finding that an exception is, with the beginning of its text in one line, without paths."""
    if isinstance(error, NotPossible | NotRun):
        return Finding(NOT_POSSIBLE if isinstance(error, NotPossible) else NOT_RUN, str(error))
    text = str(error).strip()
    text = text.splitlines()[-1] if "Traceback" in text else text  # DCP's errors are the tracebacks of all ranks
    text = re.sub(r"(/[\w.+-]+){2,}|0x[0-9a-f]+", "…", re.sub(r"\s+", " ", text))
    text = text.replace("](", "] (")  # in a Markdown file it would be a link
    text = text if len(text) <= LINE else text[:LINE].rstrip() + "…"
    return Finding(ERROR, f"{type(error).__name__}: {text}")


def judged(what: str, off: float, tolerance: float = TOLERANCE) -> Finding:
    """Judges by how far something is from what it should be."""
    return Finding(RIGHT if off <= tolerance else WRONG, f"{what} off by {off:.1e}")


def average_of(iterates: Sequence[Values], decay: float, initial: Values | None = None) -> Values:
    """Returns the average of iterates in fp64: an EMA of a decay, or their mean. Integers are the last iterate's.

    Args:
        iterates: in their order.
        decay: of the EMA; ``MEAN`` for the mean.
        initial: what the EMA begins with; None is the first iterate.
    """
    first, *later = iterates if initial is None else [initial, *iterates]
    average = dict(first)
    for number, iterate in enumerate(later, 2):
        weight = 1 / number if decay == MEAN else 1 - decay
        for name, value in iterate.items():
            held = average[name]
            average[name] = held + (value - held) * weight if value.is_floating_point() else value
    return average


def expected(peer: Peer, number: int = 0, iterates: Sequence[Values] | None = None) -> Values:
    """Returns what an average of a peer should be by its own rule, of the iterates since its start."""
    iterates = (peer.iterates if iterates is None else iterates)[peer.wish.start :]
    return average_of(iterates, peer.wish.decays[number], peer.initial if peer.holds_initial else None)


def parameters_only(peer: Peer, found: Values) -> Values:
    """Returns the values of parameters, without those of buffers."""
    names = {name for name, _ in peer.training.make().named_parameters()}
    return {name: value for name, value in found.items() if name in names}


def distance(found: Values, true: Values) -> float:
    """Returns the largest difference of any element; infinite where a name is missing, or a value is not finite."""
    if found.keys() != true.keys():
        return torch.inf
    return max((_difference(found[name], true[name]) for name in true), default=0.0)


def _difference(found: Tensor, true: Tensor) -> float:
    off = (found.double() - true.double()).abs().max().item() if true.numel() else 0.0
    return off if off == off else torch.inf


def average_finding(peer: Peer, number: int = 0) -> Finding:
    """Judges an average of a peer now. Collective under FSDP2."""
    found = parameters_only(peer, peer.average(number))
    return judged("average", distance(found, parameters_only(peer, expected(peer, number))))


def output(training: Training, weights: Values, x: Tensor) -> Tensor:
    """Returns the output of the plain model with these weights."""
    model = training.make()
    model.load_state_dict({name: value.to(model.state_dict()[name].dtype) for name, value in weights.items()})
    return _eval_output(model, x)


@torch.no_grad()
def _eval_output(model: nn.Module, x: Tensor) -> Tensor:
    return model.eval()(x)


def undisturbed(training: Training, steps: int) -> Values:
    """Returns the weights after a training of the plain model in this process that nobody averages."""
    model = training.make()
    optimizer = sgd(model.parameters())
    for step in range(steps):
        training.loss(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: value.detach().double() for name, value in model.state_dict().items()}
