"""Opens the sources of a merge: checkpoints, of this library and of torch, and files of safetensors."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import BinaryIO, cast

import torch

from dist_asgd.boxes import strides
from dist_asgd.checkpoint.errors import CheckpointError, NoCheckpoint, naming
from dist_asgd.checkpoint.export.formats import Exported, format_by
from dist_asgd.checkpoint.export.from_checkpoint import (
    ExportSource,
    StockExportSource,
    shared_entries,
    tensors_matching,
    tensors_of,
    with_averages,
)
from dist_asgd.checkpoint.export.huggingface import CONFIGS
from dist_asgd.checkpoint.format.dcp_metadata import StoredChunk
from dist_asgd.checkpoint.format.entries import SavedTensor
from dist_asgd.checkpoint.format.manifest import (
    MANIFEST,
    STOCK,
    Manifest,
    TensorRecord,
    ValueRecord,
    in_directory,
    key_of_rank,
    read_manifest,
)
from dist_asgd.checkpoint.loading.ranges import FileRange, range_of
from dist_asgd.checkpoint.loading.sources import open_checkpoint
from dist_asgd.checkpoint.merging.payload import Chunk, Payload, SourceTensor, WholeArchive
from dist_asgd.checkpoint.merging.safetensors_files import SUFFIX, files_in, tensors_of_file
from dist_asgd.checkpoint.merging.steps import select_steps
from dist_asgd.checkpoint.run.listing import list_run
from dist_asgd.checkpoint.state.averages import copied_keys
from dist_asgd.checkpoint.state.tree import Path, key_of
from dist_asgd.checkpoint.stock.items import item_layout
from dist_asgd.checkpoint.storage.storage import Storage
from dist_asgd.checkpoint.storage.url import folder_and_name

STREAMED = 2**19  # bytes of a DCP item above which parts of it are read; its description then takes requests of its own
DESCRIPTION_BYTES = 2**12  # bytes of a request for the description of a DCP item
LAYOUT_THREADS = 8  # descriptions that are read at once


@dataclass(frozen=True, slots=True)
class Place:
    """The place of a tensor in the state that a checkpoint has."""

    path: Path
    rank: int | None = None  # the rank that had this tensor; None for a tensor of every rank

    @property
    def key(self) -> str:
        """The key of the tensor in a manifest."""
        return key_of(self.path) if self.rank is None else key_of_rank(key_of(self.path), self.rank)


@dataclass(frozen=True, slots=True)
class WeightSource:
    """The weights of one source by name, and where their elements are stored."""

    url: str  # without credentials
    storage: Storage
    tensors: Mapping[str, SourceTensor]
    dtypes: Mapping[str, torch.dtype]  # of the weights; averages may be stored in wider ones
    places: Mapping[str, Place]  # none for what is no checkpoint
    step: int | None = None
    average: str | None = None  # the name of the average whose values these are
    own: frozenset[str] = frozenset()  # where averages were asked for: the names of tensors that have none
    values: Mapping[str, ValueRecord] = field(default_factory=dict)  # of the entry; anything that is no tensor
    left_out: Sequence[str] = ()  # keys of values of the entry that are not in ``values``
    configs: Mapping[str, bytes] = field(default_factory=dict)  # files of Hugging Face by name

    @property
    def name(self) -> str:
        """The URL, with the average if there is one."""
        return self.url if self.average is None else f"{self.url} ({self.average})"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A source that was found: a checkpoint, or files of safetensors."""

    storage: Storage
    directory: str  # of a checkpoint, relative to the storage
    files: Mapping[str, int] | None = None  # of safetensors: their bytes by name; None for a checkpoint

    @property
    def url(self) -> str:
        """The URL of the checkpoint, or of the folder of the files, or of the file if there is one."""
        names = [*self.files] if self.files else []
        return in_directory(self.storage.url, names[0] if len(names) == 1 else self.directory)

    def open(self) -> ExportSource:
        """Opens a checkpoint. Raises ``CheckpointError`` if it is damaged."""
        if MANIFEST not in self.storage.list(self.directory):
            with naming(self.url):
                return StockExportSource.open(self.storage, self.directory)
        return ExportSource(self.storage, self.directory, read_manifest(open_checkpoint(self.storage, self.directory)))


def find_checkpoints(
    url: str, open_storage: Callable[[str], Storage], steps: Sequence[int | range | slice] | None
) -> list[Checkpoint]:
    """Returns what is at ``url``: one checkpoint, or those of a run.

    Args:
        open_storage: returns the files below a URL.
        steps: of a run, from ``parse_steps``; None for the newest.

    Raises:
        NoCheckpoint: there is nothing that can be merged.
        CheckpointError: steps do not exist, or were asked of what is no run.
        ValueError: the URL is not valid.
    """
    if (kind := format_by(url)) is not None:
        found = _file(url, open_storage, kind)
    else:
        storage = open_storage(url)
        names = storage.list()
        if {MANIFEST, STOCK} & names.keys():
            found = Checkpoint(storage, "")
        elif any(name.endswith(SUFFIX) for name in names):
            found = Checkpoint(storage, "", {name: names[name] or 0 for name in files_in(storage, names)})
        else:
            return _of_run(storage, steps)
    if steps is not None:
        raise CheckpointError(f"{found.url} is no run: steps are for the directory of a run, which has several")
    return [found]


def _file(url: str, open_storage: Callable[[str], Storage], kind: str) -> Checkpoint:
    folder, name = folder_and_name(url)
    storage = open_storage(folder)
    if kind != "safetensors":
        raise CheckpointError(
            f"{storage.url}/{name} is a file for torch.load, which is not read in parts: give a checkpoint, or "
            "files of safetensors"
        )
    size = storage.list().get(name)
    if size is None:
        raise NoCheckpoint(f"{storage.url}/{name} does not exist")
    return Checkpoint(storage, "", {name: size})


def _of_run(storage: Storage, steps: Sequence[int | range | slice] | None) -> list[Checkpoint]:
    run = list_run(storage)
    found = run.live() if steps is None else run.loadable()
    if not found:
        raise NoCheckpoint(
            f"{storage.url} has nothing to merge: neither {MANIFEST} nor {STOCK}, no committed steps below it, and no "
            "files of safetensors"
        )
    selected = [max(found)] if steps is None else select_steps(steps, sorted(found), storage.url)
    return [Checkpoint(storage, found[step].name) for step in selected]


def safetensors_source(found: Checkpoint, entry: str) -> WeightSource:
    """Returns the weights in files of safetensors.

    Raises:
        CheckpointError: a file is damaged, or two have a tensor of one name.
    """
    tensors: dict[str, SourceTensor] = {}
    for file, size in (found.files or {}).items():
        new = tensors_of_file(found.storage, file, size)
        if twice := sorted(new.keys() & tensors.keys()):
            raise CheckpointError(f"{found.storage.url} has {twice[0]!r} in several files")
        tensors |= new
    names = found.storage.list()
    configs = {name: found.storage.read(name) for name in CONFIGS if names.get(name) is not None}
    dtypes = {name: tensor.saved.dtype for name, tensor in tensors.items()}
    above = tuple(entry.split(".")) if entry else ()
    places = {name: Place((*above, name)) for name in tensors}
    return WeightSource(found.url, found.storage, tensors, dtypes, places, configs=configs)


def checkpoint_source(source: ExportSource, entry: str, average: bool | str) -> WeightSource:
    """Returns the weights of one entry of a checkpoint, or their averages.

    Args:
        entry: of the saved state, such as "model"; "" for everything.
        average: whether averages of the optimizers are taken, or the name of one.

    Raises:
        CheckpointError: there is no such entry or average, or a DCP checkpoint is damaged.
    """
    manifest, stock = source.manifest, isinstance(source, StockExportSource)
    url = in_directory(source.storage.url, source.directory)
    with naming(url):
        saved = _tensors(manifest, entry)
        wanted = with_averages(source, saved, None if average is True else average) if average else saved
    pairs = list(zip(wanted, saved, strict=True))
    own = {tensor.name for tensor, before in pairs if tensor.key == before.key} if average else set[str]()
    copied = copied_keys(*shared_entries(manifest)) if average else set[str]()
    values = {key: value for key, value in manifest.values.items() if _is_in(key, entry)}
    return WeightSource(
        url,
        source.storage,
        {tensor.name: stored for tensor, stored in zip(wanted, _stored(source, wanted), strict=True)},
        {tensor.name: tensor.dtype for tensor in wanted},
        {tensor.name: _place(manifest.tensors[tensor.key]) for tensor in saved},
        None if stock else manifest.step,
        None if average is False else "average" if average is True else average,
        frozenset(own | {tensor.name for tensor in wanted if tensor.key in copied}),
        {} if stock else values,
        sorted(values) if stock else (),
    )


def _tensors(manifest: Manifest, entry: str) -> list[Exported]:
    if not entry:
        return tensors_matching(manifest, "*")
    try:
        return tensors_of(manifest, entry)
    except CheckpointError as error:
        raise CheckpointError(f"{error}. Name one as entry, or '' for all tensors") from None


def _is_in(key: str, entry: str) -> bool:
    return not entry or key == entry or key.startswith(f"{entry}.")


def _place(record: TensorRecord) -> Place:
    return Place(record.path, record.rank)


def _stored(source: ExportSource, wanted: Sequence[Exported]) -> Iterator[SourceTensor]:
    """Yields where the elements of each tensor are."""
    if isinstance(source, StockExportSource):
        yield from _stock_tensors(source, wanted)
        return
    for tensor in wanted:
        record = source.manifest.tensors[tensor.key]
        chunks = []
        for chunk in record.chunks:
            item = source.manifest.items[chunk.item]
            file = in_directory(source.directory, item.file)
            chunks.append(Payload(chunk.box, file, item.start, item.block, item.crc32))
        yield SourceTensor(record.saved, chunks)


def _stock_tensors(source: StockExportSource, wanted: Sequence[Exported]) -> Iterator[SourceTensor]:
    with ThreadPoolExecutor(LAYOUT_THREADS, thread_name_prefix="dist_asgd-merge") as pool:
        for tensor in wanted:
            stock = source.stock.tensors[tensor.key]
            find = partial(_stock_chunk, source, tensor.key, stock.saved.dtype)
            with naming(in_directory(source.storage.url, source.directory)):
                chunks = list(pool.map(find, stock.chunks))
            yield SourceTensor(stock.saved, chunks)


def _stock_chunk(source: StockExportSource, key: str, dtype: torch.dtype, chunk: StoredChunk) -> Chunk:
    """Returns where the elements of a chunk are, for which it reads the description of a large one."""
    name, start, stop = range_of(chunk)
    name, sizes = in_directory(source.directory, name), chunk.box.sizes
    whole = WholeArchive(chunk.box, (name, start, stop))
    if stop - start <= STREAMED:
        return whole
    with FileRange(source.storage, name, start, stop) as raw, naming(f"{name} is damaged: {key!r}"):
        file = cast(BinaryIO, io.BufferedReader(raw, DESCRIPTION_BYTES))
        layout = item_layout(file, stop - start, SavedTensor(sizes, dtype))
    expected = zip(sizes, layout.strides, strides(sizes), strict=True)
    is_dense = all(found == step for size, found, step in expected if size > 1)
    if not is_dense or layout.nbytes != chunk.box.numel * dtype.itemsize:
        return whole  # a chunk that was saved transposed: its rows are not together
    return Payload(chunk.box, name, start + layout.start, layout.nbytes, f"{layout.crc32:08x}")
