"""Reads the tensors of a source once, from their first elements to their last, and verifies them while it does.

A merge takes parts of tensors in row-major order. So the elements of each chunk of a tensor are read in the order in
which they lie in the file, whatever boxes the tensor is cut into, and no byte is read twice: a running checksum takes
the place of reading whole blocks that have checksums.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from dist_asgd.boxes import Box, extent, intersection, within
from dist_asgd.checkpoint.errors import CheckpointError, naming
from dist_asgd.checkpoint.format.entries import SavedTensor
from dist_asgd.checkpoint.format.tensor_bytes import Checksums, elements_of, narrowed
from dist_asgd.checkpoint.loading.ranges import GAP, READ_BYTES, ByteRange, read_joined
from dist_asgd.checkpoint.stock.items import item_tensor
from dist_asgd.checkpoint.storage.storage import Storage


@dataclass(frozen=True, slots=True)
class Payload:
    """A chunk of a tensor whose elements lie in row-major order, without gaps, in a range of a file."""

    box: Box  # in the whole tensor
    file: str  # relative to the storage
    start: int  # bytes of the file before the elements
    block: int = 0  # bytes that have one checksum; 0 where nothing has
    crc32: str = ""  # 8 hex digits for each block, as in Item


@dataclass(frozen=True, slots=True)
class WholeArchive:
    """A chunk of a tensor that is read as a whole: an archive of ``torch.save``, which has one checksum."""

    box: Box  # in the whole tensor
    place: ByteRange  # the file relative to the storage


Chunk: TypeAlias = Payload | WholeArchive


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """A tensor of a source."""

    saved: SavedTensor
    chunks: Sequence[Chunk]  # each element of the tensor is in exactly one chunk


@dataclass(frozen=True, slots=True)
class _Piece:
    """The part of a chunk that fills a wanted part of a tensor, or some of it."""

    name: str  # of the tensor
    number: int  # of the chunk in the tensor
    chunk: Chunk
    saved: SavedTensor  # of the whole tensor
    box: Box  # the part, in the coordinates of the chunk
    wanted: int  # the index of the wanted box
    within: Box  # the part, in the coordinates of the wanted box

    @property
    def place(self) -> ByteRange:
        """The bytes to read."""
        if isinstance(self.chunk, WholeArchive):
            return self.chunk.place
        first, last = extent(self.box, self.chunk.box.sizes)
        size = self.saved.dtype.itemsize
        return self.chunk.file, self.chunk.start + first * size, self.chunk.start + last * size


class PayloadReader:
    """Reads tensors of one source. Each tensor must be read once, in row-major order. One thread may use it at a time.

    Args:
        storage: of the source.
        tensors: of the source, by name.
    """

    def __init__(self, storage: Storage, tensors: Mapping[str, SourceTensor]) -> None:
        self._storage, self._tensors = storage, tensors
        self._sums: dict[tuple[str, int], Checksums] = {}  # by tensor and chunk: of the bytes so far
        self._held: dict[tuple[str, int], Tensor] = {}  # elements of archives of which some are still wanted
        self._taken: dict[tuple[str, int], int] = {}  # elements of such archives that have been taken

    def read(self, wanted: Sequence[tuple[str, Box]]) -> list[Tensor]:
        """Returns the elements of each wanted box of a tensor, in the dtype of the source, on the CPU; to be read only.

        Raises:
            CheckpointError: elements are damaged, or could not be read.
        """
        parts: list[Tensor] = []
        pieces: list[_Piece] = []
        for index, (name, box) in enumerate(wanted):
            dtype, found = self._tensors[name].saved.dtype, list(self._cut(name, box, index))
            is_range = len(found) == 1 and isinstance(found[0].chunk, Payload)  # becomes the part, without a copy
            parts.append(torch.empty((0,) if is_range else box.sizes, dtype=dtype, device="cpu"))
            pieces += found
        missing = sorted((p for p in pieces if (p.name, p.number) not in self._held), key=lambda piece: piece.place)
        read = dict(read_joined(self._storage, "", [piece.place for piece in missing], READ_BYTES, GAP))
        for index, piece in enumerate(missing):
            data = read.pop(index)
            if isinstance(piece.chunk, WholeArchive):
                self._hold(piece, piece.chunk, data)
                continue
            self._verify(piece, piece.chunk, data)
            elements = elements_of(data, piece.saved.dtype).view(piece.box.sizes)
            if piece.within.numel == wanted[piece.wanted][1].numel:
                parts[piece.wanted] = elements
            else:
                narrowed(parts[piece.wanted], piece.within).copy_(elements)
        for piece in pieces:
            if isinstance(piece.chunk, WholeArchive):
                self._take(piece, narrowed(parts[piece.wanted], piece.within))
        return parts

    def _cut(self, name: str, box: Box, wanted: int) -> Iterator[_Piece]:
        """Yields the pieces of chunks that make up the ``box`` of a tensor, number ``wanted`` of those read."""
        tensor = self._tensors[name]
        for number, chunk in enumerate(tensor.chunks):
            common = intersection(chunk.box, box)
            if common is not None:
                yield _Piece(name, number, chunk, tensor.saved, within(common, chunk.box), wanted, within(common, box))

    def _verify(self, piece: _Piece, chunk: Payload, data: bytes) -> None:
        """Adds the next bytes of a chunk to its checksums. Raises ``CheckpointError`` where a block is damaged."""
        if not chunk.block:
            return
        place, size = (piece.name, piece.number), chunk.box.numel * piece.saved.dtype.itemsize
        sums = self._sums.setdefault(place, Checksums(chunk.block))
        sums.add(memoryview(data))
        done = piece.place[2] - chunk.start
        complete = -(-size // chunk.block) if done == size else done // chunk.block
        if sums.text()[: 8 * complete] != chunk.crc32[: 8 * complete]:
            raise CheckpointError(
                f"{chunk.file} is damaged: bytes up to {chunk.start + done}, of {piece.name!r}, do not have the "
                "checksums that were saved with them"
            )
        if done == size:
            del self._sums[place]

    def _hold(self, piece: _Piece, chunk: WholeArchive, data: bytes) -> None:
        """Verifies an archive and keeps its elements until all have been taken."""
        name, start, stop = chunk.place
        with naming(f"{name} is damaged: bytes {start} to {stop}, of {piece.name!r}"):
            self._held[piece.name, piece.number] = item_tensor(data, piece.saved.dtype, chunk.box.sizes)

    def _take(self, piece: _Piece, target: Tensor) -> None:
        """Copies a part of an archive that is held, and lets go of the archive with the last part."""
        place = piece.name, piece.number
        target.copy_(narrowed(self._held[place], piece.box))
        self._taken[place] = self._taken.get(place, 0) + piece.box.numel
        if self._taken[place] == piece.chunk.box.numel:
            del self._held[place], self._taken[place]
