"""Text as bytes: where it comes from, what is held out, and which piece of it a training step reads.

The piece is a function of (seed, step, index in the global batch) and of nothing else. So a run that is stopped and
resumed, on as many ranks as before or on another number, reads exactly what it would have read without the stop.
"""

import contextlib
import hashlib
import math
import os
import random
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from torch import Tensor

from dist_asgd.checkpoint.storage.url import error_without_credentials, without_credentials

# Of the standard library: not installed packages, not tests, and not long tables of numbers.
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "__pycache__"}

File = tuple[str, AbstractFileSystem, str]  # what the user asked for, and where in which file system that is


@dataclass(frozen=True, slots=True)
class Text:
    """The bytes to train on, and the tail of the text that is only ever evaluated on."""

    train: Tensor  # (N,) uint8
    held_out: Tensor  # (M,) uint8
    digest: str  # of both: two runs with the same digest read the same text


def read_text(urls: Sequence[str], *, max_bytes: int, held_out_bytes: int) -> Text:
    """Read files one after the other, no more than `max_bytes`, and hold out the last `held_out_bytes` of them.

    Args:
        urls: fsspec URLs, globs or paths; if empty, the source of Python's standard library is read.
    """
    content = bytearray()
    for url, fs, path in _named_files(urls) if urls else _standard_library():
        with _said_of(url):
            content += fs.cat_file(path, start=0, end=max_bytes - len(content))
        if len(content) >= max_bytes:
            del content[max_bytes:]  # a web server may send the whole file, whatever it is asked for
            break
    if len(content) < 2 * held_out_bytes:
        raise SystemExit(
            f"There are {len(content)} bytes of text, fewer than twice the {held_out_bytes} to be held out: "
            "give more text, or a smaller --held-out-bytes."
        )
    whole = torch.frombuffer(content, dtype=torch.uint8)
    return Text(whole[:-held_out_bytes], whole[-held_out_bytes:], hashlib.sha256(content).hexdigest()[:16])


def _named_files(urls: Sequence[str]) -> Iterator[File]:
    """The files in the order of the command line, those of one glob or folder sorted by name."""
    for url in urls:
        with _said_of(url):
            fs, found = _find(url)
        files = [path for path, info in sorted(found.items()) if info["type"] == "file" and info["size"] != 0]
        if not files:
            raise SystemExit(f"--data {without_credentials(url)}: there is no file with text there.")
        yield from ((url, fs, path) for path in files)


@contextlib.contextmanager
def _said_of(url: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # each file system has its own: no such host, no credentials, no permission, a typo
        text = error_without_credentials(url, error)
        raise SystemExit(f"--data {without_credentials(url)}: {text}") from None


def _find(url: str) -> tuple[AbstractFileSystem, dict[str, Any]]:
    """The file system of a URL, and what fsspec knows about each file that the URL means."""
    fs, path = url_to_fs(url)
    if fs.isdir(path):
        return fs, fs.find(path, detail=True)
    if fs.exists(path):
        return fs, {path: fs.info(path)}
    return fs, fs.glob(path, detail=True) if any(c in path for c in "*?[") else {}


def _standard_library() -> Iterator[File]:
    """The standard library's .py files, in the order of their names."""
    root = sysconfig.get_paths()["stdlib"]
    if not os.path.exists(os.path.join(root, "os.py")):
        raise SystemExit(f"Python's standard library has no source text in {root}: name other text with --data.")
    fs = LocalFileSystem()
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(set(folders) - SKIPPED)  # os.walk goes on into what is left here
        yield from ((root, fs, os.path.join(folder, name)) for name in sorted(files) if name.endswith(".py"))


def rank_share(total: int, rank: int, world_size: int) -> range:
    """Which of `total` sequences are one rank's: neighbours, and as many as the other ranks' or one more.

    16 over 3 ranks: 5, 5 and 6.
    """
    return range(total * rank // world_size, total * (rank + 1) // world_size)


def sequences(text: Tensor, indices: range, *, seed: int, step: int, length: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets of one step, both (len(indices), length) int64: targets are inputs moved on by one byte."""
    starts = [random.Random(f"{seed} {step} {index}").randrange(len(text) - length) for index in indices]
    rows = torch.stack([text[start : start + length + 1] for start in starts]).long()  # (b, length + 1)
    return rows[:, :-1], rows[:, 1:]


def held_out_batches(text: Tensor, rank: int, world_size: int, *, length: int) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's share of the held-out text, as inputs and targets of up to 64 sequences that do not overlap.

    Every rank has as many batches as the others: under FSDP, they wait for each other in each forward.
    """
    rows = text.unfold(0, length + 1, length)  # (R, length + 1): the last byte of a row is the first of the next
    share = rank_share(len(rows), rank, world_size)
    for some in rows[share.start : share.stop].tensor_split(math.ceil(len(rows) / world_size / 64)):
        yield some[:, :-1].long(), some[:, 1:].long()
