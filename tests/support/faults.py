"""Random damage in the files of a checkpoint, and whether every rank refuses it."""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

import dist_asgd
from dist_asgd import ShardedASGD
from dist_asgd.checkpoint import CheckpointError

SAVED_BY = 2


MANIFEST, STOCK = "manifest.json", ".metadata"


def make_state(steps: int) -> dict[str, Any]:
    """All that a checkpoint can hold; the values are a function of ``steps``, the layout is not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(33, 17), nn.BatchNorm1d(17), nn.Linear(17, 5)).requires_grad_()
    optimizer = ShardedASGD(model.named_parameters(), gradients="reduced", lr=0.1, t0=1)
    generator = torch.Generator().manual_seed(steps)
    for _ in range(steps):
        for param in model.parameters():
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()
    rows, order = torch.randn(300_000, generator=generator), torch.randperm(3000, generator=generator)
    data = {"rows": rows, "order": order, "at": torch.tensor(steps), "epoch": 10 + steps, "name": f"run {10 + steps}"}
    return {"model": model, "optimizer": optimizer, "data": data}


def values_of(state: Mapping[str, Any]) -> list[Any]:
    """Everything live in it, copied."""
    optimizer = state["optimizer"].state_dict()
    found = tree_flatten([state["model"].state_dict(), optimizer, state["data"]])[0]
    copies = [value.detach().clone() if isinstance(value, Tensor) else value for value in found]
    with state["optimizer"].averaged_parameters():
        return [*copies, *(param.detach().clone() for param in state["model"].parameters())]


def same(one: Any, other: Any) -> bool:
    if type(one) is Tensor and type(other) is Tensor:
        return one.dtype == other.dtype and torch.equal(one, other)
    return isinstance(one, Tensor) or bool(one == other)  # pieces of averages were compared as parameters


@dataclass(frozen=True)
class Place:
    """A part of a file of one kind."""

    kind: str
    file: str
    start: int
    stop: int
    keys: tuple[str, ...] = ()  # one of them has to be named


def places_of(folder: Path) -> dict[str, list[Place]]:
    """Where something can be damaged, by kind."""
    manifest = json.loads((folder / MANIFEST).read_text())
    keys: dict[int, list[str]] = {}
    for key, tensor in manifest["tensors"].items():
        for _, _, item in tensor["chunks"]:
            keys.setdefault(item, []).append(key)
    found: dict[str, list[Place]] = {}

    def add(kind: str, *where: Any) -> None:
        found.setdefault(kind, []).append(Place(kind, *where))

    ends = dict.fromkeys(manifest["files"], 0)
    for index, (file, offset, head, size, tail, *_) in enumerate(manifest["items"]):
        if index not in keys:
            continue
        bounds = [offset, offset + head, offset + head + size, offset + head + size + tail]
        for kind, start, stop in zip(("head", "payload", "tail"), bounds, bounds[1:], strict=False):
            add(f"{kind} of a tensor", file, start, stop, tuple(keys[index]))
        ends[file] = bounds[-1]
    for file, end in ends.items():
        size = (folder / file).stat().st_size
        add("file of a rank" if file != STOCK else STOCK, file, 0, size)
        if 0 < end < size:
            add("values for stock readers", file, end, size)
    add(MANIFEST, MANIFEST, 0, (folder / MANIFEST).stat().st_size)
    return found


Damage = Callable[[random.Random, Path, Path, Place], None]  # (..., the checkpoint, the other one, where)


def flip(choices: random.Random, folder: Path, other: Path, place: Place) -> None:
    data = bytearray((folder / place.file).read_bytes())
    data[choices.randrange(place.start, place.stop)] ^= 1 << choices.randrange(8)
    (folder / place.file).write_bytes(data)


def zeros(choices: random.Random, folder: Path, other: Path, place: Place) -> None:
    start, stop = _range(choices, place)
    _put(folder / place.file, start, bytes(stop - start))


def stale_bytes(choices: random.Random, folder: Path, other: Path, place: Place) -> None:
    start, stop = _range(choices, place)
    _put(folder / place.file, start, (other / place.file).read_bytes()[start:stop])


def moved_bytes(choices: random.Random, folder: Path, other: Path, place: Place) -> None:
    start, stop = _range(choices, place)
    data = (folder / place.file).read_bytes()
    source = choices.randrange(len(data) - (stop - start) + 1)
    _put(folder / place.file, start, data[source : source + stop - start])


def truncated(choices: random.Random, folder: Path, other: Path, place: Place) -> None:
    os.truncate(folder / place.file, choices.randrange(place.stop))


def longer(choices: random.Random, folder: Path, other: Path, place: Place) -> None:
    with open(folder / place.file, "ab") as file:
        file.write(choices.randbytes(choices.choice([1, 8, 4096])))


def missing(choices: random.Random, folder: Path, other: Path, place: Place) -> None:
    (folder / place.file).unlink()


def empty(choices: random.Random, folder: Path, other: Path, place: Place) -> None:
    (folder / place.file).write_bytes(b"")


def stale(choices: random.Random, folder: Path, other: Path, place: Place) -> None:
    shutil.copyfile(other / place.file, folder / place.file)


def swapped(choices: random.Random, folder: Path, other: Path, place: Place) -> None:
    """Two files of the checkpoint change their names."""
    partner = _other_file(choices, folder, place)
    one, two = (folder / place.file).read_bytes(), (folder / partner).read_bytes()
    (folder / place.file).write_bytes(two)
    (folder / partner).write_bytes(one)


def duplicated(choices: random.Random, folder: Path, other: Path, place: Place) -> None:
    shutil.copyfile(folder / _other_file(choices, folder, place), folder / place.file)


def fifo(choices: random.Random, folder: Path, other: Path, place: Place) -> None:
    """A reader would wait for its writer for ever."""
    (folder / place.file).unlink()
    os.mkfifo(folder / place.file)


def device(choices: random.Random, folder: Path, other: Path, place: Place) -> None:
    """A file without an end."""
    (folder / place.file).unlink()
    (folder / place.file).symlink_to("/dev/zero")


def folder_instead(choices: random.Random, folder: Path, other: Path, place: Place) -> None:
    (folder / place.file).unlink()
    (folder / place.file).mkdir()


def huge(choices: random.Random, folder: Path, other: Path, place: Place) -> None:
    """A sparse file, larger than memory."""
    os.truncate(folder / place.file, 2**40)


def _other_file(choices: random.Random, folder: Path, place: Place) -> str:
    return choices.choice(sorted(path.name for path in folder.iterdir() if path.name != place.file))


def _range(choices: random.Random, place: Place) -> tuple[int, int]:
    start = choices.randrange(place.start, place.stop)
    return start, choices.randrange(start, min(place.stop, start + 5000)) + 1


def _put(path: Path, start: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(start)
        file.write(data)


IN_PLACE: list[Damage] = [flip, flip, flip, zeros, stale_bytes, moved_bytes]


UNREADABLE: list[Damage] = [fifo, device, folder_instead, huge]


WHOLE: list[Damage] = [flip, truncated, longer, missing, empty, stale, swapped, duplicated, *UNREADABLE]


WHOLE_KINDS = ("file of a rank", STOCK, MANIFEST)


def put_fault(choices: random.Random, folder: Path, pristine: Path, other: Path) -> tuple[Damage, Place]:
    """Makes ``folder`` a damaged copy of ``pristine``."""
    places = places_of(pristine)
    while True:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(pristine, folder)
        kind = choices.choice(sorted(places))
        place, damage = choices.choice(places[kind]), choices.choice(WHOLE if kind in WHOLE_KINDS else IN_PLACE)
        if place.start < place.stop:
            damage(choices, folder, other, place)
            if damage in UNREADABLE or contents(folder) != contents(pristine):
                return damage, place


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def load_all(rank: int, folder: Path, count: int, seed: int) -> list[dict[str, Any]]:
    """Puts in ``count`` faults, one at a time, and loads. Collective; the rows are rank 0's."""
    choices = random.Random(seed)
    state = make_state(3)
    before = values_of(state)
    found = []
    for number in range(count):
        row: dict[str, Any] = {"fault": f"{seed}.{number}", "ranks": world_size()}
        keys: tuple[str, ...] = ()
        if rank == 0:
            damage, place = put_fault(choices, folder / "damaged", folder / "one", folder / "two")
            row |= {"damage": damage.__name__, "place": place.kind, "file": place.file}
            keys = place.keys if damage in IN_PLACE else ()
        barrier()
        try:
            dist_asgd.load(folder / "damaged", state)
            answer = "", "loaded"
        except CheckpointError as error:
            answer = CheckpointError.__name__, str(error)
        except Exception as error:
            answer = type(error).__name__, str(error)
        intact = all(map(same, values_of(state), before))
        if not intact:
            state = make_state(3)
        answers = gathered((answer, intact))
        if rank == 0:
            texts = [text for (_, text), _ in answers]
            row["refused"] = all(kind == CheckpointError.__name__ for (kind, _), _ in answers)
            row["file named"] = all(any(name in text for name in names(row, folder)) for text in texts)
            row["key named"] = not keys or all(any(repr(key) in text for key in keys) for text in texts)
            row["unchanged"] = all(intact for _, intact in answers)
            row["said"] = sorted({f"{kind}: {text}" for (kind, text), _ in answers})
            found.append(row)
    return found


def names(row: Mapping[str, Any], folder: Path) -> list[str]:
    """Files of which one has to be named: where two were swapped, or no longer fit the manifest, either."""
    if row["damage"] == "swapped" or row["file"] == MANIFEST:
        return [path.name for path in (folder / "one").iterdir()]
    return [row["file"]]


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def gathered(item: Any) -> list[Any]:
    everyone: list[Any] = [item] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(everyone, item)
    return everyone


def save_two(rank: int, folder: Path) -> None:
    for name, steps in (("one", 5), ("two", 6)):
        dist_asgd.save(folder / name, make_state(steps))


def on_ranks(count: int, folder: Path, work: Callable[[int], Any]) -> Any:
    """What ``work(rank)`` returns on rank 0 of ``count`` forked ranks."""
    place = Path(tempfile.mkdtemp(dir=folder))
    pids = []
    for rank in range(count):
        sys.stdout.flush()
        pids.append(os.fork())
        if pids[-1] == 0:
            try:
                if count > 1:
                    store = dist.FileStore(str(place / "store"), count)
                    limit = timedelta(seconds=60)
                    dist.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=limit)
                answer = work(rank)
                if rank == 0:
                    (place / "answer").write_text(json.dumps(answer))
                barrier()
                os._exit(0)
            finally:
                sys.excepthook(*sys.exc_info())
                os._exit(1)
    failed = [rank for rank, pid in enumerate(pids) if os.waitpid(pid, 0)[1]]
    if failed:
        raise RuntimeError(f"ranks {failed} have failed")
    return json.loads((place / "answer").read_text())


def find(count: int, seed: int) -> list[dict[str, Any]]:
    """Rows of ``count`` faults, half of them loaded by one rank and half by two."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        on_ranks(SAVED_BY, folder, lambda rank: save_two(rank, folder))
        one = on_ranks(1, folder, lambda rank: load_all(rank, folder, count - count // 2, seed))
        two = on_ranks(2, folder, lambda rank: load_all(rank, folder, count // 2, seed + 1))
        return [*one, *two]


CHECKS = ("refused", "file named", "key named", "unchanged")
