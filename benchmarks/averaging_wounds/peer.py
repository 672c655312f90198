"""``Peer``: one way to keep averages of a model's weights, as its user writes it."""

from __future__ import annotations

import contextlib
import importlib.metadata
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from benchmarks.averaging_wounds.training import Training, Values, shard, values

MEAN = 1.0  # in place of a decay: the mean of all iterates
MADE_LAST, MADE_FIRST = "made of the sharded or compiled model", "made before the model is sharded or compiled"


class NotPossible(Exception):
    """The peer has no API for what the situation asks; the message says which is missing."""


class NotRun(Exception):
    """The situation cannot be run on this machine; the message says why."""


@dataclass(frozen=True)
class Wish:
    """What a situation asks of a peer.

    Attributes:
        decays: an EMA of this decay for each average; ``MEAN`` is the mean of all iterates.
        start: iterates before the first one that counts.
        warmup: whether the first iterates of an EMA shall share the weight.
        fp32: whether averages of bf16 weights shall be right.
        buffers: whether buffers of floating point are averaged and counters copied.
        offload: whether averages are kept in the memory of the host.
        way: which of the peer's ways for the situation is used.
    """

    decays: tuple[float, ...] = (0.9,)
    start: int = 0
    warmup: bool = False
    fp32: bool = False
    buffers: bool = False
    offload: bool = False
    way: str = ""


class Peer(ABC):
    """A model in training, with averages that the peer keeps.

    Class attributes:
        title: the heading of its column.
        package: the distribution to install.
        has_mean: whether it has the mean of all iterates.
        holds_initial: whether an average begins with the weights at its construction, not with the first iterate.
        ways: by the number of a situation, its ways where it has several; the first is what its documentation says.

    Attributes:
        model: the model, as a user has it: sharded or compiled in its place.
        initial: its values when training began.
        iterates: its values after each step that was taken, those that a GradScaler skipped left out.
        objects: how many objects keep the averages.
        recomputed: whether BatchNorm's statistics are computed anew of the averaged weights.
    """

    title: ClassVar[str]
    package: ClassVar[str]
    has_mean: ClassVar[bool] = True
    holds_initial: ClassVar[bool] = False
    ways: ClassVar[Mapping[int, tuple[str, ...]]] = {}
    objects = 1
    recomputed = False

    def __init__(self, training: Training, wish: Wish) -> None:
        self.training, self.wish = training, wish
        self.iterates: list[Values] = []
        self.steps = 0  # calls of the optimizer, as a training script counts them
        self.scaler = None if training.overflows is None else torch.amp.GradScaler("cpu", init_scale=8.0)
        self.model = training.make()
        self.initial = values(self.model)
        self.begin()

    @classmethod
    def version(cls) -> str | None:
        """Returns the version of the package, or None where it is not installed."""
        try:
            return importlib.metadata.version(cls.package)
        except importlib.metadata.PackageNotFoundError:
            return None

    def begin(self) -> None:
        """Prepares the training, then builds the averages."""
        self.prepare()
        self.keep()

    def prepare(self) -> None:
        """Compiles and places the model, and builds the optimizer."""
        if self.training.is_compiled:
            self.model = torch.compile(self.model, backend="eager")  # type: ignore[assignment]
        self.called = self.training.place(self.model)
        self.optimizer = self.training.optimizer(self.model.parameters())

    @abstractmethod
    def keep(self) -> None:
        """Builds the averages of ``model``."""

    def update(self) -> None:  # noqa: B027 - a peer that follows the optimizer by itself needs none
        """Takes an iterate after each call of the optimizer."""

    @abstractmethod
    def average(self, number: int = 0) -> Values:
        """Returns an average, whole, by the names of the plain model. Collective under FSDP2."""

    def train(
        self,
        steps: int,
        pauses: Mapping[int, Callable[[], None]] | None = None,
        evaluations: Mapping[int, Callable[[nn.Module], None]] | None = None,
    ) -> None:
        """Takes so many steps more.

        Args:
            steps: how many.
            pauses: what to do after so many steps of the whole training.
            evaluations: what to do then with a model that has the first average, in the way of the peer.
        """
        for _ in range(steps):
            self._take_step()
            self.update()
            if self.steps in (pauses or {}):
                (pauses or {})[self.steps]()
            if self.steps in (evaluations or {}):
                self.evaluate((evaluations or {})[self.steps])

    def _take_step(self) -> None:
        loss = self.training.loss_at(self.called, self.steps)
        skipped = self.steps in (self.training.overflows or ())
        if self.scaler is None:
            loss.backward()
            self.optimizer.step()
        else:
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad()
        self.steps += 1
        self.took_step(skipped)

    def took_step(self, skipped: bool = False) -> None:
        """Stores the iterate of a step that was not skipped. Collective under FSDP2."""
        if not skipped:
            self.iterates.append(values(self.model))

    def evaluate(self, function: Callable[[nn.Module], None]) -> None:
        """Calls a function with a model that has the first average."""
        with torch.no_grad(), self.averaged() as model:
            function(model)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        """Gives a model that has the first average inside the block."""
        raise NotPossible("no API to evaluate the average")
        yield

    # Checkpoints -----------------------------------------------------------------------------------------------------

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Returns the state of the averages, as the peer has it."""

    @abstractmethod
    def restore(self, state: dict[str, Any]) -> None:
        """Loads what ``state`` has returned."""

    def save(self, folder: Path) -> None:
        """Saves model and averages by ``torch.distributed.checkpoint``, which takes any state dict. Collective."""
        dcp.save(self._checkpoint(), checkpoint_id=folder)

    def save_averages(self, folder: Path) -> None:
        """Saves the averages alone. Collective."""
        dcp.save({"averages": self.state()}, checkpoint_id=folder)

    def load(self, folder: Path) -> None:
        """Loads what ``save`` wrote, of another number of ranks too. Collective."""
        state = self._checkpoint()
        dcp.load(state, checkpoint_id=folder)
        self._plain_model().load_state_dict(state["model"])
        self.restore(state["averages"])
        self.steps = int(state["steps"])

    def _checkpoint(self) -> dict[str, Any]:
        return {"model": self._plain_model().state_dict(), "averages": self.state(), "steps": self.steps}

    def _plain_model(self) -> nn.Module:
        """Returns the model without ``torch.compile``'s wrapper, whose names a user keeps out of checkpoints."""
        model: nn.Module = getattr(self.model, "_orig_mod", self.model)
        return model


class CopiedModel(Peer):
    """A peer that averages into a copy of the model, which is evaluated in its place.

    FSDP2 refuses copies of a sharded model, and the copy of a compiled one has the names of ``torch.compile``. So there
    is a second way beside that of examples: the copy is made first, and sharded as the model is.
    """

    ways: ClassVar[Mapping[int, tuple[str, ...]]] = dict.fromkeys((1, 4, 5, 6, 7, 8), (MADE_LAST, MADE_FIRST))
    first: ClassVar[tuple[str, ...]] = (MADE_FIRST,)  # the ways in which the copy is made first
    copies: list[nn.Module]

    def begin(self) -> None:
        if self.wish.way not in self.first:
            super().begin()
            return
        self.keep()
        if self.training.layout == "fsdp":
            for copy in self.copies:
                shard(self.module_of(copy))
        self.prepare()

    def keep(self) -> None:
        self.copies = [self.copied(decay) for decay in self.wish.decays]
        self.objects = len(self.copies)

    @abstractmethod
    def copied(self, decay: float) -> nn.Module:
        """Returns the peer's object for an average."""

    @staticmethod
    @abstractmethod
    def module_of(copy: nn.Module) -> nn.Module:
        """Returns the copy of the model in the peer's object."""

    def average(self, number: int = 0) -> Values:
        return values(self.module_of(self.copies[number]))

    @contextlib.contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        yield self.copies[0].eval()

    def state(self) -> dict[str, Any]:
        return {str(number): copy.state_dict() for number, copy in enumerate(self.copies)}

    def restore(self, state: dict[str, Any]) -> None:
        for number, copy in enumerate(self.copies):
            copy.load_state_dict(state[str(number)])
