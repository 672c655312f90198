"""What several ranks need a little of is read by one of them, and handed to the others.

A tensor that was saved by rows and is loaded by columns: every rank needs a part of every row, and what has a checksum
are whole blocks of rows. If each rank read all of it, the store would send the tensor as many times as there are ranks.
So the ranks read a piece each, verify it, and exchange what the others need of it. Nothing is gathered: a rank
receives its own part of the tensor, a few megabytes at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from dist_asgd.boxes import Box, cut_to_extents, extent, intersection, strides, within
from dist_asgd.checkpoint.errors import only_checkpoint_errors, together
from dist_asgd.checkpoint.format.manifest import Manifest, in_directory
from dist_asgd.checkpoint.format.tensor_bytes import memory, narrowed
from dist_asgd.checkpoint.loading.reader import EXTENT, ChunkPart, ChunkRead, RangeRequest, blocks_of, verify_range
from dist_asgd.checkpoint.loading.spool import Spool
from dist_asgd.checkpoint.progress import Progress
from dist_asgd.checkpoint.storage.storage import Storage
from dist_asgd.comm.consensus import Agreement

EXCHANGE_BYTES = 4 * 2**20  # bytes that a rank reads at once of what it shares
EXCHANGES_AHEAD = 4  # pieces of a rank in one exchange
MORE = 1.05  # times what is needed: who would read more than that shares


@dataclass(frozen=True, slots=True)
class RemotePart:
    """A part of one rank, as the others know it."""

    key: str
    item: int  # index of Manifest.items
    sizes: tuple[int, ...]  # of the chunk
    itemsize: int
    box: Box  # in the chunk


@dataclass(frozen=True, slots=True)
class SharedRead:
    """What one rank reads for all."""

    reader: int
    key: str  # for messages: one of those that have it
    item: int
    sizes: tuple[int, ...]
    itemsize: int
    box: Box


def shared(
    agreement: Agreement, parts: Sequence[ChunkPart]
) -> tuple[list[ChunkPart], list[list[RemotePart]], list[ChunkPart]]:
    """Which of its ``parts`` this rank reads by itself, what each rank shares, and the parts of this rank among that.

    Collective.
    """
    sparse = [part for part in parts if agreement.world_size > 1 and _reads_more(part)]
    everyone = agreement.gather([RemotePart(p.key, p.item, p.sizes, p.data.element_size(), p.box) for p in sparse])
    ranks_of: dict[int, set[int]] = {}
    for rank, wanted in enumerate(everyone):
        for one in wanted:
            ranks_of.setdefault(one.item, set()).add(rank)
    alone = {item for item, ranks in ranks_of.items() if len(ranks) == 1}
    mine = [part for part in sparse if part.item not in alone]
    chosen = {id(part) for part in mine}
    own = [part for part in parts if id(part) not in chosen]
    return own, [[one for one in wanted if one.item not in alone] for wanted in everyone], mine


def _reads_more(part: ChunkPart) -> bool:
    """Whether much of what this rank would read for the part lies between the rows of its box."""
    most = EXTENT // part.data.element_size()
    extents = (extent(box, part.sizes) for box in cut_to_extents(part.box, part.sizes, most))
    return sum(stop - start for start, stop in extents) > MORE * part.box.numel


def plan_shared_reads(everyone: Sequence[Sequence[RemotePart]]) -> list[SharedRead]:
    """All that is wanted, cut into pieces; ranks take turns. The same on every rank."""
    by_item = _by_item([one for wanted in everyone for one in wanted])
    pieces: list[SharedRead] = []
    for item, of_item in sorted(by_item.items()):
        first, around = of_item[0][1], _around([one.box for _, one in of_item])
        for box in cut_to_extents(around, first.sizes, max(1, EXCHANGE_BYTES // first.itemsize)):
            pieces.append(SharedRead(len(pieces) % len(everyone), first.key, item, first.sizes, first.itemsize, box))
    return pieces


def _by_item(wanted: Sequence[RemotePart]) -> dict[int, list[tuple[int, RemotePart]]]:
    """With their numbers."""
    found: dict[int, list[tuple[int, RemotePart]]] = {}
    for number, one in enumerate(wanted):
        found.setdefault(one.item, []).append((number, one))
    return found


def _around(boxes: Sequence[Box]) -> Box:
    starts = [min(offsets) for offsets in zip(*(box.offsets for box in boxes), strict=True)]
    ends = zip(*(map(sum, zip(box.offsets, box.sizes, strict=True)) for box in boxes), strict=True)
    return Box(tuple(starts), tuple(max(stops) - start for stops, start in zip(ends, starts, strict=True)))


class SharedParts(Spool):
    """The ``parts`` of this rank that are among what all ranks share. Used as a context manager.

    Args:
        everyone: what each rank shares, in the order of its parts.
    """

    def __init__(
        self,
        storage: Storage,
        directory: str,
        manifest: Manifest,
        everyone: Sequence[Sequence[RemotePart]],
        parts: Sequence[ChunkPart],
    ) -> None:
        super().__init__(sum(part.data.nbytes for part in parts))
        self._storage, self._directory, self._manifest = storage, directory, manifest
        self._everyone = [_by_item(wanted) for wanted in everyone]
        self._parts, self._pieces = parts, plan_shared_reads(everyone)
        self._places: list[
            tuple[ChunkPart, Box, int]
        ] = []  # a part, a box of it in the chunk, where its bytes are kept

    def read(self, agreement: Agreement, progress: Progress) -> None:
        """Reads and verifies everything, and exchanges it. Changes nothing. Collective.

        Raises:
            CheckpointError: on every rank, where anything is damaged or a rank fails.
        """
        at_once = EXCHANGES_AHEAD * agreement.world_size
        for first in range(0, len(self._pieces), at_once):
            pieces = self._pieces[first : first + at_once]
            with together(agreement, "load()"):
                given = self._given(pieces, agreement.rank)
                takes = [self._bytes(pieces, rank, agreement.rank) for rank in range(agreement.world_size)]
                taken = torch.empty(sum(takes), dtype=torch.uint8, device="cpu")
            with only_checkpoint_errors():
                sizes = [part.numel() for part in given]
                dist.all_to_all_single(taken, torch.cat(given), takes, sizes, group=agreement.group)
            with together(agreement, "load()"):
                self._take(pieces, taken, agreement)
            progress.add(taken.numel())

    def apply(self, progress: Progress) -> None:
        """Writes everything to where it belongs."""
        for part, box, place in self._places:
            buffer = torch.empty(box.sizes, dtype=part.data.dtype, device="cpu")
            memory(buffer)[:] = self._kept(place, buffer.nbytes)
            torch.autograd.graph.increment_version(part.data)
            narrowed(part.data, within(box, part.box)).copy_(buffer)
            progress.add(buffer.nbytes)

    def _common(self, piece: SharedRead, rank: int) -> Iterator[tuple[int, Box]]:
        """(number of a part of ``rank``, what it needs of the piece)."""
        for number, wanted in self._everyone[rank].get(piece.item, ()):
            box = intersection(piece.box, wanted.box)
            if box is not None:
                yield number, box

    def _bytes(self, pieces: Sequence[SharedRead], reader: int, rank: int) -> int:
        """How much ``rank`` gets from ``reader``."""
        of_reader = (piece for piece in pieces if piece.reader == reader)
        return sum(box.numel * piece.itemsize for piece in of_reader for _, box in self._common(piece, rank))

    def _given(self, pieces: Sequence[SharedRead], reader: int) -> list[Tensor]:
        """By rank, what it needs of the ``pieces`` that this rank reads, as bytes."""
        own = [piece for piece in pieces if piece.reader == reader]
        requests = [self._request(piece) for piece in own]
        ranges = [(in_directory(self._directory, request.file), request.start, request.stop) for request in requests]
        given: list[dict[int, list[Tensor]]] = [{} for _ in self._everyone]  # by rank, by piece
        for index, data in self._storage.read_ranges(ranges):
            verify_range(requests[index], data)
            elements = _elements(own[index], requests[index], data)
            for rank, of_rank in enumerate(given):
                boxes = (within(box, own[index].box) for _, box in self._common(own[index], rank))
                of_rank[index] = [narrowed(elements, box).reshape(-1) for box in boxes]
        nothing = torch.empty(0, dtype=torch.uint8, device="cpu")
        return [torch.cat([nothing, *(part for index in sorted(one) for part in one[index])]) for one in given]

    def _request(self, piece: SharedRead) -> RangeRequest:
        item = self._manifest.items[piece.item]
        blocks = blocks_of(piece.box, piece.sizes, piece.itemsize, item)
        need = ChunkRead(piece.key, item, piece.sizes, piece.box, torch.empty(0, device="cpu"), blocks)
        return RangeRequest(item.file, need.start, need.stop, (need,))

    def _take(self, pieces: Sequence[SharedRead], taken: Tensor, agreement: Agreement) -> None:
        """Keeps what came, in the order in which ``_given`` has put it."""
        place, at = self._keep(memory(taken)), 0
        for reader in range(agreement.world_size):
            for piece in (piece for piece in pieces if piece.reader == reader):
                for number, box in self._common(piece, agreement.rank):
                    self._places.append((self._parts[number], box, place + at))
                    at += box.numel * piece.itemsize


def _elements(piece: SharedRead, request: RangeRequest, data: bytes) -> Tensor:
    """The elements of the piece in the ``data`` of its request: uint8, of the sizes of its box, and of an element's."""
    (need,) = request.needs
    first, last = extent(piece.box, piece.sizes)
    at = need.item.start - request.start + first * piece.itemsize
    flat = torch.frombuffer(bytearray(data[at : at + (last - first) * piece.itemsize]), dtype=torch.uint8)
    steps = tuple(step * piece.itemsize for step in strides(piece.sizes))
    return flat.as_strided((*piece.box.sizes, piece.itemsize), (*steps, 1))
