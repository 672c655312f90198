"""Shared reads: bytes that several ranks need a little of are read by one rank, which sends each its part.

Example: a tensor was saved by rows and is loaded by columns. Every rank needs a part of every row, but a checksum
covers a block of whole rows. If every rank read all blocks, the store would send the tensor once for each rank.
Instead the ranks read different pieces, verify them, and exchange the parts by all-to-all, a few megabytes at a time.
No rank ever holds a whole tensor.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from dist_asgd.boxes import Box, cut_to_extents, extent, intersection, strides, within
from dist_asgd.checkpoint.errors import only_checkpoint_errors, together
from dist_asgd.checkpoint.format.casts import copy_rounded
from dist_asgd.checkpoint.format.manifest import Manifest
from dist_asgd.checkpoint.format.tensor_bytes import memory, narrowed
from dist_asgd.checkpoint.loading.ranges import READ_BYTES
from dist_asgd.checkpoint.loading.reader import ChunkPart, ChunkRead, RangeRequest, blocks_of, read_verified
from dist_asgd.checkpoint.loading.spool import Spool
from dist_asgd.checkpoint.progress import Progress
from dist_asgd.checkpoint.storage.storage import Storage
from dist_asgd.comm.consensus import Agreement

EXCHANGE_BYTES = 4 * 2**20  # bytes of one shared read
EXCHANGES_AHEAD = 4  # shared reads of each rank in one all-to-all
READ_OVERHEAD = 1.05  # bytes that a rank would read by itself, over bytes that it needs: parts above this are shared


@dataclass(frozen=True, slots=True)
class RemotePart:
    """A part of a chunk that any rank needs or reads, as it is described to the other ranks."""

    key: str  # of one of the tensors that use the item, for error messages
    item: int  # index into Manifest.items
    sizes: tuple[int, ...]  # of the chunk
    itemsize: int  # bytes of an element
    box: Box  # the part, in the coordinates of the chunk


def split_shared(
    agreement: Agreement, parts: Sequence[ChunkPart]
) -> tuple[list[ChunkPart], list[list[RemotePart]], list[ChunkPart]]:
    """Divides ``parts``, the needs of this rank, into those that it reads by itself and those that ranks share.

    A part is shared if reading it alone has an overhead above ``READ_OVERHEAD`` and another rank needs a part of the
    item, with such an overhead, too. Collective.

    Returns:
        The parts that this rank reads by itself; for each rank its shared parts; the shared parts of this rank, in
        that order.
    """
    sparse = [part for part in parts if agreement.world_size > 1 and _reads_more(part)]
    everyone = agreement.gather([RemotePart(p.key, p.item, p.sizes, p.dtype.itemsize, p.box) for p in sparse])
    ranks_of = Counter(item for wanted in everyone for item in {part.item for part in wanted})
    alone = {item for item, ranks in ranks_of.items() if ranks == 1}
    shared = [part for part in sparse if part.item not in alone]
    chosen = {id(part) for part in shared}
    own = [part for part in parts if id(part) not in chosen]
    return own, [[part for part in wanted if part.item not in alone] for wanted in everyone], shared


def _reads_more(part: ChunkPart) -> bool:
    """Returns whether this rank would read much more than the part, because bytes between its rows are not needed."""
    most = READ_BYTES // part.dtype.itemsize
    extents = (extent(box, part.sizes) for box in cut_to_extents(part.box, part.sizes, most))
    return sum(stop - start for start, stop in extents) > READ_OVERHEAD * part.box.numel


def plan_shared_reads(everyone: Sequence[Sequence[RemotePart]]) -> list[RemotePart]:
    """Cuts all that is shared into reads of at most ``EXCHANGE_BYTES``, which ranks take in turn.

    Not collective: every rank computes equal reads from equal arguments.

    Args:
        everyone: by rank, its shared parts.
    """
    by_item = _by_item([part for wanted in everyone for part in wanted])
    reads: list[RemotePart] = []
    for _, numbered in sorted(by_item.items()):
        first, bounds = numbered[0][1], _bounding_box([part.box for _, part in numbered])
        for box in cut_to_extents(bounds, first.sizes, max(1, EXCHANGE_BYTES // first.itemsize)):
            reads.append(replace(first, box=box))
    return reads


def _by_item(wanted: Sequence[RemotePart]) -> dict[int, list[tuple[int, RemotePart]]]:
    """Groups parts by their item; each part is paired with its index in ``wanted``."""
    found: dict[int, list[tuple[int, RemotePart]]] = {}
    for number, part in enumerate(wanted):
        found.setdefault(part.item, []).append((number, part))
    return found


def _bounding_box(boxes: Sequence[Box]) -> Box:
    starts = [min(offsets) for offsets in zip(*(box.offsets for box in boxes), strict=True)]
    ends = zip(*(map(sum, zip(box.offsets, box.sizes, strict=True)) for box in boxes), strict=True)
    return Box(tuple(starts), tuple(max(stops) - start for stops, start in zip(ends, starts, strict=True)))


class SharedParts(Spool):
    """The shared parts of this rank: ``read`` exchanges and verifies them, ``apply`` copies them to live tensors.

    Used as a context manager. The received bytes wait in a spool file in between.

    Args:
        everyone: by rank, its shared parts, as ``split_shared`` returns them.
        parts: the shared parts of this rank, in the order of ``everyone[rank]``.
    """

    def __init__(
        self,
        storage: Storage,
        directory: str,
        manifest: Manifest,
        everyone: Sequence[Sequence[RemotePart]],
        parts: Sequence[ChunkPart],
    ) -> None:
        super().__init__(sum(part.box.numel * part.dtype.itemsize for part in parts))
        self._storage, self._directory, self._manifest = storage, directory, manifest
        self._everyone = [_by_item(wanted) for wanted in everyone]
        self._parts, self._reads = parts, plan_shared_reads(everyone)
        self._received: list[tuple[ChunkPart, Box, int]] = []  # a part, a box of it in the chunk, position in the spool

    def read(self, agreement: Agreement, progress: Progress) -> None:
        """Reads, verifies and exchanges all shared parts. Changes no tensor. Collective.

        Raises:
            CheckpointError: on every rank: bytes are damaged, or a rank failed.
        """
        ranks = range(agreement.world_size)
        at_once = EXCHANGES_AHEAD * len(ranks)
        for first in range(0, len(self._reads), at_once):
            by_reader = [self._reads[first : first + at_once][rank :: len(ranks)] for rank in ranks]
            with together(agreement, "load()"):
                by_rank = self._read_and_pack(by_reader[agreement.rank])
                counts = [self._exchanged_bytes(reads, agreement.rank) for reads in by_reader]
                received = torch.empty(sum(counts), dtype=torch.uint8, device="cpu")
            with only_checkpoint_errors(), agreement.exchange():
                sizes = [part.numel() for part in by_rank]
                dist.all_to_all_single(received, torch.cat(by_rank), counts, sizes, group=agreement.group)
            with together(agreement, "load()"):
                self._keep(by_reader, received, agreement.rank)
            progress.add(received.numel())

    def apply(self, progress: Progress) -> None:
        """Copies all shared parts of this rank to its live tensors. Called after ``read``."""
        for part, box, position in self._received:
            buffer = torch.empty(box.sizes, dtype=part.dtype, device="cpu")
            memory(buffer)[:] = self._read_back(position, buffer.nbytes)
            torch.autograd.graph.increment_version(part.data)
            copy_rounded(narrowed(part.data, within(box, part.box)), buffer)
            progress.add(buffer.nbytes)

    def _overlaps(self, read: RemotePart, rank: int) -> Iterator[tuple[int, Box]]:
        """Yields (number of a shared part of ``rank``, the box of the chunk that the part and the read have)."""
        for number, wanted in self._everyone[rank].get(read.item, ()):
            box = intersection(read.box, wanted.box)
            if box is not None:
                yield number, box

    def _exchanged_bytes(self, reads: Sequence[RemotePart], rank: int) -> int:
        """Returns how many bytes of ``reads`` are for ``rank``."""
        return sum(box.numel * read.itemsize for read in reads for _, box in self._overlaps(read, rank))

    def _read_and_pack(self, own: Sequence[RemotePart]) -> list[Tensor]:
        """Reads and verifies the reads of this rank; returns for each rank the bytes that it needs (1-D, uint8)."""
        requests = [self._request(read) for read in own]
        parts: list[dict[int, list[Tensor]]] = [{} for _ in self._everyone]  # by rank, then by index into own
        for index, data in read_verified(self._storage, self._directory, requests):
            elements = _elements(own[index], requests[index], data)
            for rank, of_rank in enumerate(parts):
                boxes = (within(box, own[index].box) for _, box in self._overlaps(own[index], rank))
                of_rank[index] = [narrowed(elements, box).reshape(-1) for box in boxes]
        nothing = torch.empty(0, dtype=torch.uint8, device="cpu")
        return [torch.cat([nothing, *(x for index in sorted(of_rank) for x in of_rank[index])]) for of_rank in parts]

    def _request(self, read: RemotePart) -> RangeRequest:
        item = self._manifest.items[read.item]
        blocks = blocks_of(read.box, read.sizes, read.itemsize, item)
        nothing = torch.empty(0, dtype=torch.uint8, device="cpu")
        chunk_read = ChunkRead(read.key, item, read.sizes, read.box, torch.uint8, nothing, blocks)
        return RangeRequest(*chunk_read.place, (chunk_read,))

    def _keep(self, by_reader: Sequence[Sequence[RemotePart]], received: Tensor, rank: int) -> None:
        """Spools the received bytes, and records where each box lies, in the order in which readers packed them."""
        position = self._append(memory(received))
        for read in itertools.chain.from_iterable(by_reader):
            for number, box in self._overlaps(read, rank):
                self._received.append((self._parts[number], box, position))
                position += box.numel * read.itemsize


def _elements(read: RemotePart, request: RangeRequest, data: bytes) -> Tensor:
    """Returns the elements of the read as bytes: uint8, shape (*sizes of its box, bytes of an element).

    Args:
        data: the bytes of ``request``, which contains the read.
    """
    (chunk_read,) = request.reads
    first, last = extent(read.box, read.sizes)
    at = chunk_read.item.start - request.start + first * read.itemsize
    flat = torch.frombuffer(bytearray(data[at : at + (last - first) * read.itemsize]), dtype=torch.uint8)
    steps = tuple(step * read.itemsize for step in strides(read.sizes))
    return flat.as_strided((*read.box.sizes, read.itemsize), (*steps, 1))
