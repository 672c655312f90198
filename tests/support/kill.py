"""SIGKILL at random moments of real training runs, and what the next start finds."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import re
import select
import signal
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_asgd import Checkpointer, ShardedASGD
from dist_asgd.checkpoint.retention import RetentionPolicy, delete_outdated
from dist_asgd.checkpoint.saving import rendezvous
from dist_asgd.checkpoint.storage.storage import Storage
from dist_asgd.comm import roll_call

KEEP = 2


TOGETHER = 15  # kills in one directory


LIMIT = 120.0  # seconds that a survivor may take to end: a silent rank counts as dead after 30


STEPS = 10  # between two kills, at most


ROWS = 150_000  # of int64: so large that ranks share the writing of it


OPTIONS: dict[str, Any] = {"lr": 0.1, "t0": 2, "lambd": 1e-3}


_DIRECTORY = re.compile(r"step-(\d{8})-(\d{4})-[0-9a-f]{8}")


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(33, 17), nn.Linear(17, 5), nn.Linear(5, 1))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for param in model.parameters():
        param.grad = torch.randn(param.shape, generator=generator)
    optimizer.step()


def rows(step: int) -> Tensor:
    return torch.arange(ROWS) * step


def make_truth(steps: int) -> list[dict[str, Tensor]]:
    """Parameters and averages of an uninterrupted run, by step."""
    model = make_model()
    optimizer = torch.optim.ASGD(model.named_parameters(), foreach=False, **OPTIONS)
    truth: list[dict[str, Tensor]] = [{}]
    for step in range(1, steps + 1):
        train(model, optimizer, step)
        values = {name: param.detach().clone() for name, param in model.named_parameters()}
        averages = {f"{name}.ax": optimizer.state[param]["ax"].clone() for name, param in model.named_parameters()}
        truth.append(values | averages)
    return truth


def differences(state: Mapping[str, Any], step: int, truth: Sequence[Mapping[str, Tensor]]) -> list[str]:
    """Names of what is not as it should be at ``step``. Collective."""
    model, found = state["model"], {"rows": state["rows"]}
    found |= {name: param.detach().clone() for name, param in model.named_parameters()}
    with state["optimizer"].averaged_parameters():
        found |= {f"{name}.ax": param.detach().clone() for name, param in model.named_parameters()}
    expected = {**truth[step], "rows": rows(step)}
    wrong = [name for name, value in found.items() if not torch.equal(value, expected[name])]
    return wrong if state["data"]["step"] == step else [*wrong, "data.step"]


@dataclass(frozen=True)
class Job:
    """What the ranks of one start are to do."""

    url: str
    options: Mapping[str, Any] | None
    world_size: int
    trains: bool  # or loads only
    goes_back: bool  # begins with the checkpoint before the newest, whose line it abandons by its first save
    store_on_rank: bool  # the key-value store is rank 0's and dies with it; otherwise it is a launcher's
    seed: int
    beats: tuple[float, float]  # seconds: between heartbeats, and of silence
    truth: Sequence[Mapping[str, Tensor]] = field(repr=False)


Tell = Callable[..., None]


def work(job: Job, tell: Tell) -> None:
    choices = random.Random(job.seed)  # the same on every rank
    model = make_model()
    optimizer = ShardedASGD(model.named_parameters(), gradients="reduced", **OPTIONS)
    state: dict[str, Any] = {"model": model, "optimizer": optimizer, "rows": rows(-1), "data": {"step": -1}}
    with Checkpointer(job.url, job.options, keep_last=KEEP) as checkpointer:
        tell("load")
        steps = checkpointer.steps()
        goes_back = job.goes_back and len(steps) > 1
        step = checkpointer.load(state, step=steps[-2] if goes_back else None) or 0
        tell("loaded", step, differences(state, step, job.truth) if step else [])
        if goes_back:
            tell("back", step)
        while job.trains:
            step += 1
            train(model, optimizer, step)
            state["rows"].copy_(rows(step))
            state["data"]["step"] = step
            wait = choices.random() < 0.5
            tell("save", step, wait)
            checkpointer.save(step, state, wait=wait)
            tell("saved", step, wait)


def run_rank(job: Job, rank: int, tell: Tell, ports: tuple[int, int]) -> None:
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # torch writes stack traces there when ranks die
        rendezvous.HEARTBEAT_SECONDS, rendezvous.DEAD_SECONDS = job.beats
        roll_call.LISTEN_SECONDS = min(roll_call.LISTEN_SECONDS, job.beats[0])
        roll_call.ANSWER_SECONDS = min(roll_call.ANSWER_SECONDS, job.beats[1] / 2)
        if job.world_size > 1:
            if rank == 0 and job.store_on_rank:
                store = make_store(ports, job.world_size)
            else:
                port = int.from_bytes(os.read(ports[0], 4), "little")
                store = dist.TCPStore("127.0.0.1", port, job.world_size)
            limit = timedelta(seconds=10 * LIMIT)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=job.world_size, timeout=limit)
        work(job, tell)
    except BaseException as error:
        tell("failed", type(error).__name__, str(error), traceback.format_exc())
    for thread in threading.enumerate():  # as the interpreter does at its end
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()


def make_store(ports: tuple[int, int], world_size: int) -> dist.TCPStore:
    store = dist.TCPStore("127.0.0.1", 0, world_size, is_master=True, wait_for_workers=False)
    os.write(ports[1], store.port.to_bytes(4, "little") * world_size)
    return store


def launch(ports: tuple[int, int], world_size: int) -> None:
    """What torchrun's agent is to its ranks: it has their store."""
    store = make_store(ports, world_size)
    while store:
        signal.pause()


@dataclass
class Start:
    """The processes of one start, and what they tell."""

    job: Job
    pids: list[int] = field(default_factory=list)  # of the ranks, and of the launcher
    pipes: dict[int, int] = field(default_factory=dict)  # open ones: rank by what to read from
    told: list[list[tuple[float, list[Any]]]] = field(default_factory=list)  # by rank, with the time
    rests: list[bytes] = field(default_factory=list)

    def __enter__(self) -> Start:
        ports = os.pipe()
        for rank in range(self.job.world_size):
            read_end, write_end = os.pipe()
            self.pids.append(forked(run_rank, self.job, rank, teller(write_end), ports))
            os.close(write_end)
            self.pipes[read_end] = rank
            self.told.append([])
            self.rests.append(b"")
        if self.job.world_size > 1 and not self.job.store_on_rank:
            self.pids.append(forked(launch, ports, self.job.world_size))
        os.close(ports[0])
        os.close(ports[1])
        return self

    def __exit__(self, *error: object) -> None:
        self.kill(range(len(self.pids)))
        while self.pipes:
            self._listen()

    def kill(self, ranks: Sequence[int]) -> None:
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pids[rank], signal.SIGKILL)
        for rank in ranks:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self.pids[rank], 0)

    def until(self, condition: Callable[[], bool], seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while not condition() and time.monotonic() < deadline and self.pipes:
            self._listen()
        return condition()

    def of(self, rank: int, kind: str) -> list[list[Any]]:
        return [words for _, words in self.told[rank] if words[0] == kind]

    def all_of(self, kind: str) -> list[list[Any]]:
        return [words for rank in range(self.job.world_size) for words in self.of(rank, kind)]

    def is_alive(self, rank: int) -> bool:
        return rank in self.pipes.values()

    def durable(self) -> int:
        """The newest step whose save had returned: if in the background, when the next call did."""
        return max((step if wait else step - 1 for _, step, wait in self.all_of("saved")), default=0)

    def seconds(self) -> list[float]:
        """What saves have taken that nobody interrupted."""
        pairs = itertools.pairwise(self.told[0])
        return [done - begun for (begun, _), (done, words) in pairs if words[0] == "saved" and words[2]]

    def _listen(self) -> None:
        for pipe in select.select(list(self.pipes), [], [], 0.02)[0]:
            rank, data = self.pipes[pipe], os.read(pipe, 1 << 16)
            *lines, self.rests[rank] = (self.rests[rank] + data).split(b"\n")
            self.told[rank] += [(time.monotonic(), json.loads(line)) for line in lines]
            if not data:
                os.close(pipe)
                del self.pipes[pipe]


def forked(run: Callable[..., Any], *args: Any) -> int:
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        try:
            run(*args)
        except Exception:
            traceback.print_exc()
        finally:
            os._exit(1)
    return pid


def teller(pipe: int) -> Tell:
    def tell(*words: Any) -> None:
        os.write(pipe, json.dumps(words).encode() + b"\n")

    return tell


@dataclass(frozen=True)
class Place:
    url: str
    options: Mapping[str, Any] | None
    files: Callable[[], list[str]]  # by paths relative to the URL
    read: Callable[[str], bytes]
    is_fast: bool  # so that a phase can be waited for

    def attempts(self) -> dict[tuple[int, int], set[str]]:
        """Names of files, by step and attempt."""
        found: dict[tuple[int, int], set[str]] = {}
        for path in self.files():
            folder, _, name = path.partition("/")
            if match := _DIRECTORY.fullmatch(folder):
                found.setdefault((int(match[1]), int(match[2])), set()).add(name)
        return dict(sorted(found.items()))

    def newest(self) -> int:
        """The newest committed step that the last entry of the history does not call abandoned."""
        files = self.files()
        entries = [path for path in files if path.startswith("history/") and path.endswith(".json")]
        abandoned = json.loads(json.loads(self.read(max(entries)))["entry"])["abandoned"] if entries else []
        folders = {path.partition("/")[0] for path in files if path.endswith("/manifest.json")} - set(abandoned)
        return max((int(match[1]) for folder in folders if (match := _DIRECTORY.fullmatch(folder))), default=0)

    def phase(self, step: int) -> str:
        """What ranks that were about to save ``step`` must be doing."""
        attempts = self.attempts()
        mine = max((place for place in attempts if place[0] == step), default=None)
        if mine is None:
            return "before the first file"
        if "manifest.json" in attempts[mine]:
            committed = sum("manifest.json" in names for names in attempts.values())
            half = any("manifest.json" not in names and ".metadata" in names for names in attempts.values())
            return "retention" if committed > KEEP or half else "after the commit"
        return "committing" if any("meta" in name or "manifest" in name for name in attempts[mine]) else "writing"


def local_place(folder: str) -> Place:
    def files() -> list[str]:
        return [os.path.relpath(f"{above}/{name}", folder) for above, _, names in os.walk(folder) for name in names]

    def read(path: str) -> bytes:
        with open(f"{folder}/{path}", "rb") as file:
            return file.read()

    return Place(folder, None, files, read, is_fast=True)


def s3_place(url: str, options: Mapping[str, Any]) -> Place:
    """Listed by botocore, which needs no thread: this process forks."""
    import botocore.session

    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    keys = {"aws_access_key_id": options["key"], "aws_secret_access_key": options["secret"]}
    client = botocore.session.get_session().create_client(
        "s3", "us-east-1", endpoint_url=options["endpoint_url"], **keys
    )

    def files() -> list[str]:
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=f"{prefix}/")
        return [entry["Key"][len(prefix) + 1 :] for page in pages for entry in page.get("Contents", [])]

    def read(path: str) -> bytes:
        return bytes(client.get_object(Bucket=bucket, Key=f"{prefix}/{path}")["Body"].read())

    return Place(url, options, files, read, is_fast=False)


@dataclass
class Run:
    """Kills in one place, one after the other."""

    place: Place
    seed: int
    beats: tuple[float, float]
    seconds: float = 0.1  # that a save takes, about
    durable: int = 0  # the newest step whose save had returned

    def kills(self, count: int) -> Iterator[dict[str, Any]]:
        """A row for each."""
        self._truth = make_truth(STEPS * (count + 1))
        self._choices = random.Random(self.seed)
        for number in range(count):
            row = {"kill": f"{self.seed}.{number}", **self._kill()}
            yield row | self._check()
        with self._start(trains=False) as start:  # nothing is left of what was killed
            start.until(lambda: not start.pipes, LIMIT)
        pid = forked(delete_outdated, Storage.open(self.place.url, self.place.options), RetentionPolicy(KEEP), 0.0)
        os.waitpid(pid, 0)
        left = self.place.attempts()
        if len(left) > KEEP or any("manifest.json" not in names for names in left.values()):
            raise RuntimeError(f"a sweep has left {left}")
        row = self._check()
        if row["stale"] or row["mixtures"] or row["errors"]:
            raise RuntimeError(f"a sweep has damaged what it should keep: {row}")

    def _start(self, trains: bool) -> Start:
        size, on_rank, seed = self._choices.choice([1, 2, 2, 3]), self._choices.random(), self._choices.getrandbits(32)
        place, goes_back = self.place, trains and self._choices.random() < 0.25
        return Start(
            Job(place.url, place.options, size, trains, goes_back, on_rank < 0.3, seed, self.beats, self._truth)
        )

    def _kill(self) -> dict[str, Any]:
        choices = self._choices
        with self._start(trains=True) as start:
            ranks = range(start.job.world_size)
            saves = choices.randrange(STEPS - 2)
            phase = choices.choice(["writing", "committing", "retention", None, None])
            share, delay = choices.random(), choices.choice([None, None, choices.random()])
            victims = choices.choice([[0], [ranks[-1]], list(ranks)])
            start.until(lambda: len(start.of(0, "save" if saves else "load")) >= max(1, saves), LIMIT)
            self._wait(start.of(0, "save")[-1][1] if start.of(0, "save") else 0, share, phase)
            start.kill(victims)
            killed = time.monotonic()
            last = start.told[0][-1][1]
            phase = "loading" if last[0] in ("load", "loaded") else self.place.phase(last[1])
            others = [rank for rank in ranks if rank not in victims]
            if delay is not None:  # a launcher ends the others, too
                start.until(lambda: time.monotonic() - killed > delay, delay)
                start.kill(others)
            ended = start.until(lambda: not any(map(start.is_alive, others)), LIMIT)
        said = {rank: [words[1:] for words in start.of(rank, "failed")] for rank in others if delay is None}
        times = [at - killed for rank in said for at, words in start.told[rank] if words[0] == "failed"]
        self.seconds = statistics.median([self.seconds, *start.seconds()])
        back = [step for _, step in start.all_of("back")]
        self.durable = max(start.durable(), *(back[:1] or [self.durable]))
        background = last[0] in ("save", "saved") and not last[2]
        return {
            "phase": phase,
            "background": background,
            "ranks": len(ranks),
            "back": bool(back),
            "killed": victims,
            "survivors": len(said),
            "hangs": 0 if ended else 1,
            "silent": sum(not words for words in said.values()),
            "noticed": max(times, default=None),
            "said": said,
        }

    def _wait(self, step: int, share: float, phase: str | None) -> None:
        if phase is None or not self.place.is_fast:
            time.sleep(share * 1.3 * self.seconds)
            return
        deadline = time.monotonic() + 1.0
        while time.monotonic() < deadline and self.place.phase(step) not in (phase, "retention", "after the commit"):
            pass

    def _check(self) -> dict[str, Any]:
        """What another start finds."""
        expected = self.place.newest()
        with self._start(trains=False) as start:
            start.until(lambda: not start.pipes, LIMIT)
        loaded, failed = start.all_of("loaded"), start.all_of("failed")
        complete = len(loaded) == start.job.world_size
        return {
            "expected": expected,
            "durable": self.durable,
            "loaded": [step for _, step, _ in loaded],
            "loaded by": start.job.world_size,
            "mixtures": sum(bool(wrong) for _, _, wrong in loaded),
            "stale": sum(step != expected or step < self.durable for _, step, _ in loaded),
            "errors": 0 if complete and not failed else 1,
            "why": failed,
        }


FAULTS = ("mixtures", "stale", "errors", "silent", "hangs")


def kill_all(count: int, seed: int, make_place: Callable[[], Place], beats: tuple[float, float]) -> Iterator[Any]:
    """Rows of ``count`` kills, ``TOGETHER`` in one place."""
    for first in range(0, count, TOGETHER):
        yield from Run(make_place(), seed + first, beats).kills(min(TOGETHER, count - first))
