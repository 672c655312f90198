"""``AveragedBuffers``: the buffers of a model that are averaged or copied with its parameters."""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dist_asgd._torch_private import non_persistent_buffers
from dist_asgd.asgd.rounding import compute_dtype
from dist_asgd.asgd.rule import average_step_
from dist_asgd.averages.options import AVERAGE, COPY
from dist_asgd.comm.consensus import Agreement
from dist_asgd.model_averages.parameters import unwrapped_names
from dist_asgd.model_averages.timing import Timing

Treatment = str | Mapping[str, str] | None  # the option ``buffers`` of ShardedAverages


@dataclass(frozen=True, slots=True)
class _Buffer:
    """A buffer by the module that holds it, since ``module.to()`` and others replace the tensor."""

    owner: nn.Module
    attribute: str
    is_averaged: bool  # otherwise the buffer counts as its own average

    @property
    def tensor(self) -> Tensor:
        found = self.owner._buffers[self.attribute]
        if found is None:
            raise RuntimeError(f"buffer {self.attribute!r} of a {type(self.owner).__name__} is None now")
        return found.detach()


class AveragedBuffers:
    """Buffers that belong to the averages of a model: averaged ones, and copied ones, which keep their values.

    Every rank averages its own buffers, which are small. Where ranks differ, rank 0's buffers count.

    Args:
        module: the model; None without buffers.
        treatment: ``"average"``: floating-point buffers are averaged, others copied. ``"copy"``: all are copied. A
            mapping of names, in which ``*`` stands for anything, to one of these. None: no buffer.
        names: the names of the averages.

    Attributes:
        iterates: the iterates that the averages have taken.

    Raises:
        ValueError, TypeError: the treatment is none of these, a pattern matches no buffer, or there is no module.
    """

    def __init__(self, module: nn.Module | None, treatment: Treatment, names: Sequence[str]) -> None:
        self._buffers = _chosen(module, _patterns(treatment), treatment)
        self._averages: dict[str, dict[str, Tensor]] = {name: {} for name in names}  # by average, then by buffer
        self.iterates = 0

    @property
    def names(self) -> list[str]:
        """The names of the buffers in the model."""
        return list(self._buffers)

    @property
    def treatment(self) -> dict[str, str]:
        """``AVERAGE`` or ``COPY`` by the name of the buffer in the model."""
        return {name: AVERAGE if buffer.is_averaged else COPY for name, buffer in self._buffers.items()}

    @torch.no_grad()
    def take_iterate(self, timing: Timing) -> None:
        """Moves the averages to the buffers as they are now."""
        mus = timing.scalars(self.iterates, timing.updates).mus
        self.iterates += 1
        for held, mu in zip(self._averages.values(), mus, strict=True):
            for name, buffer in self._buffers.items():
                if not buffer.is_averaged or not mu:
                    continue
                value = buffer.tensor
                if name not in held:
                    held[name] = value.to(compute_dtype(value.dtype.to_real()), copy=True)
                else:
                    average_step_(held[name], value, mu)

    def forget(self) -> None:
        """Forgets the averages, which then are the buffers themselves."""
        self.iterates = 0
        for held in self._averages.values():
            held.clear()

    def promote(self, source: str, target: str) -> None:
        """Lets the average ``source`` take the place of ``target`` and begin anew."""
        self._averages[target], self._averages[source] = self._averages[source], {}

    def values(self, average: str) -> dict[str, Tensor]:
        """Returns this rank's average of each buffer by name. A copied buffer counts as its own average."""
        held = self._averages[average]
        return {name: held.get(name, buffer.tensor) for name, buffer in self._buffers.items()}

    def load(self, values: Mapping[str, Mapping[str, Tensor]], iterates: int) -> None:
        """Takes over averages of buffers, by average and then by buffer. Copied buffers are the model's and stay."""
        self.iterates = iterates
        for average, held in self._averages.items():
            for name, buffer in self._buffers.items():
                if buffer.is_averaged and iterates:
                    value = buffer.tensor
                    held[name] = values[average][name].to(value.device, compute_dtype(value.dtype.to_real()), copy=True)

    @contextlib.contextmanager
    def swapped(self, average: str, agreement: Agreement) -> Iterator[None]:
        """Inside the block, buffers have rank 0's averages; afterwards, exactly what they held before. Collective."""
        kept = {name: buffer.tensor.clone() for name, buffer in self._buffers.items()}
        try:
            self._write(self.first_values(average, agreement))
            yield
        finally:
            self._write(kept)

    def first_values(self, average: str, agreement: Agreement) -> dict[str, Tensor]:
        """Returns rank 0's average of each buffer, on the devices of this rank's buffers. Collective."""
        own = self.values(average)
        if not own or agreement.world_size == 1:
            return own
        (first, *_) = agreement.gather({name: value.cpu() for name, value in own.items()} if not agreement.rank else {})
        return {name: value.to(own[name].device) for name, value in first.items()}

    @torch.no_grad()
    def _write(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            self._buffers[name].tensor.copy_(value)


def persistent_buffers(module: nn.Module | None) -> dict[str, Tensor]:
    """Returns the buffers that a module saves, by their names without wrappers' parts; none without a module."""
    found = {
        f"{path}.{name}" if path else name: value
        for path, owner in (() if module is None else module.named_modules(remove_duplicate=False))
        for name, value in owner._buffers.items()
        if value is not None and name not in non_persistent_buffers(owner)
    }
    return dict(zip(unwrapped_names(list(found), module), found.values(), strict=True))


def _patterns(treatment: Treatment) -> dict[str, str]:
    if treatment is None:
        return {}
    patterns = {"*": treatment} if isinstance(treatment, str) else treatment
    if not isinstance(patterns, Mapping):
        raise TypeError(f"buffers must be None, 'average', 'copy' or a mapping of names to these, got {treatment!r}")
    for pattern, kind in patterns.items():
        if kind not in (AVERAGE, COPY):
            raise ValueError(f"buffers must be None, 'average', 'copy' or a mapping of names to these, got {kind!r}")
        if not isinstance(pattern, str):
            raise TypeError(f"buffers has the key {pattern!r}, which is no name")
    return dict(patterns)


def _chosen(module: nn.Module | None, patterns: Mapping[str, str], treatment: Treatment) -> dict[str, _Buffer]:
    if not patterns:
        return {}
    if module is None:
        raise ValueError(f"buffers={treatment!r} without module=: only the model knows its buffers. Pass module=")
    chosen: dict[str, _Buffer] = {}
    present = [name for name, _ in module.named_buffers()]
    names = dict(zip(present, unwrapped_names(present, module), strict=True))
    for pattern, kind in patterns.items():
        matched = [name for name, known in names.items() if fnmatch.fnmatchcase(known, pattern)]
        if not matched and isinstance(treatment, Mapping):
            raise ValueError(
                f"buffers has the name {pattern!r}, and the module has no such buffer; it has {list(names.values())}"
            )
        for name in matched:
            path, _, attribute = name.rpartition(".")
            owner = module.get_submodule(path)
            floating = owner.get_buffer(attribute).is_floating_point()
            chosen[names[name]] = _Buffer(owner, attribute, kind == AVERAGE and floating)
    return chosen
