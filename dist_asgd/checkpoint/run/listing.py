"""Lists a run: which checkpoints it has, which of them are abandoned, and whether its URL is that of a run at all."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from dist_asgd.checkpoint.errors import CheckpointError
from dist_asgd.checkpoint.format.manifest import MANIFEST, STOCK
from dist_asgd.checkpoint.run.directories import Directory, directories_of, is_directory_name, newest_by_step
from dist_asgd.checkpoint.run.history import HISTORY, HistoryEntry, entry_numbers, entry_path, read_entry
from dist_asgd.checkpoint.storage.storage import Storage

MAX_ENTRY = 2**28  # bytes of a file of the history: the names of millions of abandoned checkpoints
LOOKS = 10  # at a history whose newest file disappears, because a writer has added a newer one meanwhile


@dataclass(frozen=True, slots=True)
class Run:
    """What is below the URL of a run at one moment."""

    storage: Storage
    sizes: Mapping[str, int]  # bytes of each file by its path: at least of those in directories of checkpoints
    directories: Sequence[Directory]  # sorted by step and attempt
    last: HistoryEntry | None  # None before the first save, and after saves of version 0.1

    def live(self, without: Collection[str] = ()) -> dict[int, Directory]:
        """Returns for each step the checkpoint that loads by default use: committed, and not abandoned.

        Args:
            without: names of directories that are not considered.
        """
        return newest_by_step(d for d in self.directories if not d.is_abandoned and d.name not in without)

    def loadable(self) -> dict[int, Directory]:
        """Returns for each step the checkpoint that ``step=`` means: the live one, or else the newest abandoned one."""
        return {**newest_by_step(d for d in self.directories if d.is_abandoned), **self.live()}

    def require(self, *, saving: bool = False) -> None:
        """Raises ``CheckpointError`` if the URL is not that of a run, and says what is there instead.

        Args:
            saving: whether a checkpoint is to be written here, which nothing else may hold, not even beside a run.
        """
        url, has_run = self.storage.url, any(directory.is_committed for directory in self.directories)
        if MANIFEST in self.sizes and (saving or not has_run):
            raise CheckpointError(
                f"{url} is one checkpoint, not the directory of a run: it has a {MANIFEST}. To load it, call "
                "dist_asgd.load(url, state). Checkpointer takes the directory that holds the directories of all steps"
            )
        if saving and any(is_directory_name(name) for name in url.split("/")):
            raise CheckpointError(
                f"{url} is inside of a checkpoint's directory. Give Checkpointer a directory of its own"
            )
        if STOCK in self.sizes and not has_run:
            raise CheckpointError(
                f"{url} is not the directory of a run: it has a {STOCK}, which torch.distributed.checkpoint writes. To "
                "load it, call dist_asgd.load(url, state). Give Checkpointer a directory of its own"
            )
        if not self.sizes and self.storage.is_file():
            raise CheckpointError(f"{url} is a file, or lies below one. Checkpointer takes the directory of a run")


def list_run(storage: Storage, known: HistoryEntry | None = None) -> Run:
    """Returns what is below the URL of ``storage``, by one listing and, if there is a history, one read.

    Args:
        known: an entry of the history, which is not read again if it is still the last one.

    Raises:
        CheckpointError: the history is damaged.
        StorageError: the storage cannot be listed.
    """
    for _ in range(LOOKS):
        sizes = _sizes(storage)
        numbers = entry_numbers(sizes)
        try:
            last = _read(storage, numbers[-1], known, sizes) if numbers else None
        except FileNotFoundError:
            continue
        return Run(storage, sizes, directories_of(sizes, set(last.abandoned) if last else ()), last)
    raise CheckpointError(f"{storage.url}/{HISTORY} changes faster than it can be read: do several jobs save there?")


def last_entry(storage: Storage, known: HistoryEntry | None = None) -> HistoryEntry | None:
    """Returns the entry with the largest number in the history of a run, or None if there is none.

    Args:
        known: as for ``list_run``.
    """
    for _ in range(LOOKS):
        sizes = {f"{HISTORY}/{name}": size for name, size in storage.list(HISTORY).items() if size is not None}
        numbers = entry_numbers(sizes)
        try:
            return _read(storage, numbers[-1], known, sizes) if numbers else None
        except FileNotFoundError:
            continue
    raise CheckpointError(f"{storage.url}/{HISTORY} changes faster than it can be read: do several jobs save there?")


def _read(storage: Storage, number: int, known: HistoryEntry | None, sizes: Mapping[str, int]) -> HistoryEntry:
    if known is not None and known.number == number:
        return known
    path = entry_path(number)
    is_readable = 0 < sizes[path] <= MAX_ENTRY  # a FIFO has the size 0
    return read_entry(storage.read(path) if is_readable else b"", f"{storage.url}/{path}")


def _sizes(storage: Storage) -> dict[str, int]:
    """Returns the sizes of the files that concern a run, by their paths.

    An object store lists them all by one request. Of local folders only those of the run are read, because others may
    be unreadable (``lost+found``), and those of checkpoints may be links.
    """
    if not storage.is_local:
        return storage.sizes()
    found: dict[str, int] = {}
    for name, size in storage.list().items():
        if size is not None:
            found[name] = size
        elif name == HISTORY or is_directory_name(name):
            found |= {f"{name}/{path}": inner for path, inner in storage.sizes(name).items()}
    return found
