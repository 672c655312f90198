"""Gathers the tensors of a live model on rank 0, one small part after another.

Each rank sends the parts of its own blocks, point to point, whatever mesh or wrapper has placed them. So memory does
not grow with the size of a tensor, and a rank outside of the mesh of a DTensor takes part like all ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from dist_asgd.boxes import Box, batches, intersection, within
from dist_asgd.checkpoint.errors import CheckpointError, together
from dist_asgd.checkpoint.export.formats import BATCH_BYTES, Exported
from dist_asgd.checkpoint.format.entries import TensorEntry
from dist_asgd.checkpoint.format.tensor_bytes import as_bits, memory, narrowed
from dist_asgd.checkpoint.saving.assign import Offer, holders_of
from dist_asgd.comm.consensus import Agreement

OwnedBoxes = dict[str, list[Box]]  # by key: the boxes of a tensor that one rank sends


class FailedOnAllRanks(Exception):
    """Tells that all ranks have raised ``error`` by an agreement, so that no further agreement is needed."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


def owned_boxes(offers: Sequence[Mapping[str, Offer]]) -> list[OwnedBoxes]:
    """Returns for each rank the boxes that it sends: each box of a tensor from the first rank that offers it.

    Args:
        offers: for each rank, what it has of each tensor by key.

    Raises:
        CheckpointError: ranks have different shapes or dtypes of a tensor, or their boxes do not make up the tensor.
    """
    owned: list[OwnedBoxes] = [{} for _ in offers]
    by_key: dict[str, dict[int, Offer]] = {}
    for rank, offered in enumerate(offers):
        for key, offer in offered.items():
            by_key.setdefault(key, {})[rank] = offer
    for key, by_rank in by_key.items():
        for box, ranks in holders_of(key, next(iter(by_rank.values())), by_rank).items():
            owned[ranks[0]].setdefault(key, []).append(box)
    return owned


@dataclass(frozen=True, slots=True)
class GatherSource:
    """Source of the tensors of a live model whose blocks are spread over all ranks."""

    agreement: Agreement
    entries: Mapping[str, TensorEntry]  # by key: this rank's blocks, in live memory
    owned: Sequence[OwnedBoxes]  # on rank 0: for each rank; on other ranks: for this rank only

    def payloads(self, tensors: Sequence[Exported]) -> Iterator[tuple[int, memoryview]]:
        """Yields on rank 0 the elements of all ``tensors`` in parts of at most BATCH_BYTES, in row-major order.

        Collective: every rank must exhaust the iterator, with equal ``tensors``. Yields pairs of the index of a tensor
        in ``tensors`` and the bytes of its next part. On other ranks than 0 the bytes are empty.

        Raises:
            FailedOnAllRanks: a rank has failed in this method, or has left its loop over the parts by an error.
        """
        for batch in batches([(tensor.shape, tensor.dtype.itemsize) for tensor in tensors], BATCH_BYTES):
            wanted = [(tensors[number], part) for number, part in batch]
            try:
                with together(self.agreement, "export()"):
                    parts = self._local_parts(wanted) if self.agreement.rank == 0 else []
                    sent = self._bytes_to_send(wanted) if self.agreement.rank else []
            except Exception as error:
                raise FailedOnAllRanks(error) from error
            with self.agreement.exchange():
                if sent:
                    dist.send(torch.cat(sent), group=self.agreement.group, group_dst=0)
                for rank in range(1, self.agreement.world_size) if self.agreement.rank == 0 else ():
                    self._receive_from(rank, wanted, parts)
            if self.agreement.rank:
                yield from ((number, memoryview(b"")) for number, _ in batch)
            else:
                yield from ((number, memory(part)) for (number, _), part in zip(batch, parts, strict=True))

    def _local_parts(self, wanted: Sequence[tuple[Exported, Box]]) -> list[Tensor]:
        """Returns the wanted parts in new memory on the CPU, filled where this rank owns them."""
        parts = [torch.empty(part.sizes, dtype=tensor.dtype, device="cpu") for tensor, part in wanted]
        for at, common in _overlaps(self.owned[0], wanted):
            tensor, part = wanted[at]
            narrowed(as_bits(parts[at]), within(common, part)).copy_(as_bits(self._local_view(tensor.key, common)))
        return parts

    def _bytes_to_send(self, wanted: Sequence[tuple[Exported, Box]]) -> list[Tensor]:
        """Returns what this rank owns of the wanted parts: uint8 tensors on the CPU, in the order of `_overlaps`."""
        blocks = (self._local_view(wanted[at][0].key, common) for at, common in _overlaps(self.owned[0], wanted))
        return [as_bits(block).cpu().contiguous().view(-1).view(torch.uint8) for block in blocks]

    def _receive_from(self, rank: int, wanted: Sequence[tuple[Exported, Box]], parts: Sequence[Tensor]) -> None:
        """Receives what ``rank`` owns of the wanted parts into ``parts``."""
        places = list(_overlaps(self.owned[rank], wanted))
        sizes = [common.numel * wanted[at][0].dtype.itemsize for at, common in places]
        if not places:
            return
        received = torch.empty(sum(sizes), dtype=torch.uint8, device="cpu")
        dist.recv(received, group=self.agreement.group, group_src=rank)
        for (at, common), data in zip(places, received.split(sizes), strict=True):
            tensor, part = wanted[at]
            block = data.clone().view(tensor.dtype).view(common.sizes)  # clone: aligns the bytes for the view in dtype
            narrowed(parts[at], within(common, part)).copy_(block)

    def _local_view(self, key: str, box: Box) -> Tensor:
        """Returns a view of the box of a tensor, which must lie in one block of this rank."""
        for block in self.entries[key].blocks:
            if intersection(block.box, box) == box:
                return narrowed(block.data, within(box, block.box))
        raise CheckpointError(f"this rank has no block of {key!r} with {box}")


def _overlaps(owned: OwnedBoxes, wanted: Sequence[tuple[Exported, Box]]) -> Iterator[tuple[int, Box]]:
    """Yields pairs of an index into ``wanted`` and the intersection of that part with one of the ``owned`` boxes."""
    for at, (tensor, part) in enumerate(wanted):
        for box in owned.get(tensor.key, ()):
            common = intersection(part, box)
            if common is not None:
                yield at, common
