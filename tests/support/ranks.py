"""Ranks for tests: forked children of this process that talk to each other over gloo.

A world costs about 0.1 s, because nothing is imported again. It works only while the parent has no process group, no
thread pool and no CUDA context of its own, so tests train in children, also when one rank is enough (`run_alone`).
"""

import contextlib
import faulthandler
import io
import os
import pickle
import runpy
import select
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.processes import free_port

GRACE = 5.0  # seconds the other ranks get after one rank has failed


class RankError(AssertionError):
    """One rank or more failed, hung or died."""


def run_ranks(world_size: int, fn: Callable[..., Any], *args: Any, timeout: float = 60) -> list[Any]:
    """Run `fn(rank, *args)` on `world_size` ranks and return what each returned, in rank order."""
    return _run(world_size, fn, args, timeout, process_group=True)


def run_alone(fn: Callable[..., Any], *args: Any, timeout: float = 60) -> Any:
    """Run `fn(*args)` in one child without a process group."""
    return _run(1, lambda rank: fn(*args), (), timeout, process_group=False)[0]


def run_program(module: str, *arguments: object, timeout: float = 300) -> None:
    """Run what `python -m module arguments` runs, in one child, where torch and this package are imported already."""

    def program() -> None:
        sys.argv = [module, *map(str, arguments)]
        with warnings.catch_warnings():
            warnings.simplefilter("default")  # pytest's filters make errors of them
            runpy.run_module(module, run_name="__main__", alter_sys=True)

    run_alone(program, timeout=timeout)


def run_launched(world_size: int, fn: Callable[..., Any], *args: Any, timeout: float = 60) -> list[Any]:
    """Run `fn(*args)` on ranks that have the environment of torchrun's and no process group: `fn` makes that itself."""
    port = free_port()

    def launched(rank: int) -> Any:
        facts = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
        os.environ.update({name: str(value) for name, value in facts.items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
        return fn(*args)

    return _run(world_size, launched, (), timeout, process_group=False)


def _run(
    world_size: int, fn: Callable[..., Any], args: tuple[Any, ...], timeout: float, process_group: bool
) -> list[Any]:
    if dist.is_available() and dist.is_initialized():
        raise RuntimeError("the parent of forked ranks must not have a process group")
    folder = tempfile.mkdtemp(prefix="ranks-")
    children: dict[int, tuple[int, int]] = {}  # rank -> (pid, pipe to read)
    try:
        for rank in range(world_size):
            read_end, write_end = os.pipe()
            sys.stdout.flush()
            sys.stderr.flush()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12+: fork beside other threads
                pid = os.fork()
            if pid == 0:
                os.close(read_end)
                for _, other in children.values():
                    os.close(other)
                _child(rank, world_size, fn, args, timeout, process_group, folder, write_end)
            os.close(write_end)
            children[rank] = (pid, read_end)
        return _collect(children, folder, timeout)
    finally:
        for pid, read_end in children.values():
            os.close(read_end)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)
        shutil.rmtree(folder, ignore_errors=True)


def _child(
    rank: int,
    world_size: int,
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    timeout: float,
    process_group: bool,
    folder: str,
    pipe: int,
) -> None:
    code = 1
    try:
        with open(f"{folder}/stacks.{rank}", "w") as stacks:
            faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
            torch.set_num_threads(1)
            torch.manual_seed(1234 + rank)
            try:
                if process_group:
                    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
                    store = dist.FileStore(f"{folder}/store", world_size)
                    limit = timedelta(seconds=max(timeout, 1))
                    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=limit)
                answer = (True, fn(rank, *args))
                payload = pickle.dumps(answer)
                if process_group:
                    dist.barrier()
                code = 0
            except BaseException:
                payload = pickle.dumps((False, traceback.format_exc()))
            _send(pipe, payload)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # no atexit handlers, no pytest in the child


def _send(pipe: int, payload: bytes) -> None:
    view = memoryview(struct.pack("<Q", len(payload)) + payload)
    while view:
        view = view[os.write(pipe, view) :]


def _collect(children: dict[int, tuple[int, int]], folder: str, timeout: float) -> list[Any]:
    buffers = {rank: io.BytesIO() for rank in children}
    ranks_of = {read_end: rank for rank, (_, read_end) in children.items()}
    open_pipes = set(ranks_of)
    deadline = time.monotonic() + timeout
    failed_at = None
    while open_pipes and time.monotonic() < deadline:
        ready, _, _ = select.select(list(open_pipes), [], [], 0.1)
        for pipe in ready:
            chunk = os.read(pipe, 1 << 20)
            if chunk:
                buffers[ranks_of[pipe]].write(chunk)
                continue
            open_pipes.discard(pipe)
            if not _answer(buffers[ranks_of[pipe]])[0] and failed_at is None:
                failed_at = time.monotonic()
                deadline = min(deadline, failed_at + GRACE)
    hung = sorted(ranks_of[pipe] for pipe in open_pipes)
    answers = {rank: _answer(buffers[rank]) for rank in children if rank not in hung}
    problems = [f"--- rank {rank} failed ---\n{text}" for rank, (good, text) in sorted(answers.items()) if not good]
    if hung:
        stacks = _stacks(hung, children, folder)
        after = f"{GRACE:.0f} s after another rank failed" if failed_at else f"{timeout:.0f} s"
        problems.append(f"--- ranks {hung} of {len(children)} still running after {after} ---\n{stacks}")
    if problems:
        raise RankError("\n" + "\n".join(problems))
    return [answers[rank][1] for rank in sorted(answers)]


def _answer(buffer: io.BytesIO) -> tuple[bool, Any]:
    data = buffer.getvalue()
    if len(data) < 8 or len(data) != 8 + struct.unpack("<Q", data[:8])[0]:
        return False, "the process died without an answer (killed, or a crash in native code)"
    return pickle.loads(data[8:])


def _stacks(ranks: list[int], children: dict[int, tuple[int, int]], folder: str) -> str:
    for rank in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.kill(children[rank][0], signal.SIGUSR1)
    time.sleep(0.3)
    texts = [Path(f"{folder}/stacks.{rank}").read_text().split('ranks.py", line')[0] for rank in ranks]  # no pytest
    return "\n".join(f"rank {rank}:\n{text}" for rank, text in zip(ranks, texts, strict=True))


# What tests of collective code need again and again.


def message_of(fn: Callable[[], Any], *kinds: type[BaseException]) -> str:
    """The message of the error that `fn` raises; fails when it raises none or another kind."""
    expected = kinds or (ValueError, RuntimeError, TypeError)
    try:
        fn()
    except expected as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError(f"no error; expected one of {[kind.__name__ for kind in expected]}")


def same_everywhere(value: torch.Tensor) -> bool:
    """Whether a tensor has the same bits on every rank."""
    local = value.detach().contiguous()
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, local)
    return all(torch.equal(other, local) for other in every)


class Sent(TorchDispatchMode):
    """The number of elements of each collective call in its block."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            leaves = torch.utils._pytree.tree_leaves((args, kwargs))
            self.sizes.append(max(leaf.numel() for leaf in leaves if isinstance(leaf, torch.Tensor)))
        return func(*args, **(kwargs or {}))
