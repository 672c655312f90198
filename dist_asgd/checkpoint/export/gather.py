"""The tensors of live modules, gathered on rank 0 one small part after another.

Blocks that another rank has are sent as they are, whoever has placed them: no tensor is ever whole anywhere, and a rank
that is in no mesh of a DTensor takes part like any other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from dist_asgd.boxes import Box, batches, intersection, within
from dist_asgd.checkpoint.errors import CheckpointError, together
from dist_asgd.checkpoint.export.formats import Exported
from dist_asgd.checkpoint.format.entries import TensorEntry
from dist_asgd.checkpoint.format.tensor_bytes import memory, narrowed
from dist_asgd.checkpoint.saving.assign import Offer, holders_of
from dist_asgd.comm.consensus import Agreement

BATCH = 16 * 2**20  # bytes that are gathered together

Owned = dict[str, list[Box]]  # by key, the blocks that a rank brings


class AllFailed(Exception):
    """Every rank has raised the ``error``, so nobody needs to be told."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


def owned_by(offers: Sequence[Mapping[str, Offer]]) -> list[Owned]:
    """What each rank brings of what it offers: every element once, that of the first rank that has it.

    Raises:
        CheckpointError: ranks do not agree on a tensor, or have not all of it.
    """
    owned: list[Owned] = [{} for _ in offers]
    by_key: dict[str, dict[int, Offer]] = {}
    for rank, offered in enumerate(offers):
        for key, offer in offered.items():
            by_key.setdefault(key, {})[rank] = offer
    for key, by_rank in by_key.items():
        for box, ranks in holders_of(key, next(iter(by_rank.values())), by_rank).items():
            owned[ranks[0]].setdefault(key, []).append(box)
    return owned


@dataclass(frozen=True, slots=True)
class Gathering:
    """Tensors that come from all ranks."""

    agreement: Agreement
    entries: Mapping[str, TensorEntry]  # of this rank, live memory
    owned: Sequence[Owned]  # on rank 0 by rank; elsewhere this rank's only

    def payloads(self, tensors: Sequence[Exported]) -> Iterator[tuple[int, memoryview]]:
        """As ``Payloads``; collective. On ranks other than 0 the parts are empty.

        Raises:
            AllFailed: a rank has failed, here or in what it does with the parts.
        """
        for batch in batches([(tensor.shape, tensor.dtype.itemsize) for tensor in tensors], BATCH):
            wanted = [(tensors[number], part) for number, part in batch]
            try:
                with together(self.agreement, "export()"):
                    parts = self._filled(wanted) if self.agreement.rank == 0 else []
                    sent = self._brought(wanted) if self.agreement.rank else []
            except Exception as error:
                raise AllFailed(error) from error
            if sent:
                dist.send(torch.cat(sent), group=self.agreement.group, group_dst=0)
            for rank in range(1, self.agreement.world_size) if self.agreement.rank == 0 else ():
                self._receive(rank, wanted, parts)
            if self.agreement.rank:
                yield from ((number, memoryview(b"")) for number, _ in batch)
            else:
                yield from ((number, memory(part)) for (number, _), part in zip(batch, parts, strict=True))

    def _filled(self, wanted: Sequence[tuple[Exported, Box]]) -> list[Tensor]:
        """The parts, with what this rank has of them."""
        parts = [torch.empty(part.sizes, dtype=tensor.dtype, device="cpu") for tensor, part in wanted]
        for at, common in _common(self.owned[0], wanted):
            tensor, part = wanted[at]
            narrowed(parts[at], within(common, part)).copy_(self._block(tensor.key, common))
        return parts

    def _brought(self, wanted: Sequence[tuple[Exported, Box]]) -> list[Tensor]:
        """What this rank has of the parts, as bytes."""
        blocks = (self._block(wanted[at][0].key, common) for at, common in _common(self.owned[0], wanted))
        return [block.cpu().contiguous().view(-1).view(torch.uint8) for block in blocks]

    def _receive(self, rank: int, wanted: Sequence[tuple[Exported, Box]], parts: Sequence[Tensor]) -> None:
        places = list(_common(self.owned[rank], wanted))
        sizes = [common.numel * wanted[at][0].dtype.itemsize for at, common in places]
        if not places:
            return
        received = torch.empty(sum(sizes), dtype=torch.uint8, device="cpu")
        dist.recv(received, group=self.agreement.group, group_src=rank)
        for (at, common), data in zip(places, received.split(sizes), strict=True):
            tensor, part = wanted[at]
            block = data.clone().view(tensor.dtype).view(common.sizes)  # clone: a view must begin at a whole element
            narrowed(parts[at], within(common, part)).copy_(block)

    def _block(self, key: str, box: Box) -> Tensor:
        """A part of a block that this rank has."""
        for block in self.entries[key].blocks:
            if intersection(block.box, box) == box:
                return narrowed(block.data, within(box, block.box))
        raise CheckpointError(f"this rank has no block of {key!r} with {box}")


def _common(owned: Owned, wanted: Sequence[tuple[Exported, Box]]) -> Iterator[tuple[int, Box]]:
    """(index in ``wanted``, what is both in that part and in a block of ``owned``)."""
    for at, (tensor, part) in enumerate(wanted):
        for box in owned.get(tensor.key, ()):
            common = intersection(part, box)
            if common is not None:
                yield at, common
