"""``dist-asgd watch``: runs a command for each checkpoint of a run, once it is committed."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from dist_asgd.checkpoint.errors import CheckpointError
from dist_asgd.checkpoint.run.directories import Directory
from dist_asgd.checkpoint.run.listing import Run, list_run
from dist_asgd.checkpoint.storage.storage import Storage
from dist_asgd.cli.arguments import add_run_arguments, non_negative, positive
from dist_asgd.cli.output import flush, format_duration, note, write
from dist_asgd.cli.urls import UsageError, open_storage, storage_options

HELP = "run a command for each checkpoint of a run, at least once, when it is committed"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the run, the command, and which checkpoints it is run for."""
    add_run_arguments(parser)
    parser.add_argument(
        "--exec",
        required=True,
        metavar="COMMAND",
        dest="command",
        help="what to run, without a shell; {url} and {step} in its words become those of the checkpoint",
    )
    parser.add_argument("--every", type=positive, default=30, metavar="SECONDS", help="look so often (default: 30)")
    parser.add_argument("--since", type=non_negative, metavar="STEP", help="only for later steps (default: for all)")
    parser.add_argument("--until", type=non_negative, metavar="STEP", help="end when this step, or a later one, exists")
    parser.add_argument("--state", metavar="FILE", help="remembers what succeeded, for when the watcher starts again")


def run(arguments: argparse.Namespace) -> int:
    """Looks for checkpoints and runs the command for each, until ``--until``. Returns 1 if a command has not succeeded.

    A storage that fails at the first look raises; later the watcher says so and looks again.
    """
    words = _words(arguments.command)
    storage = open_storage(arguments.url, storage_options(arguments))
    watcher = Watcher(storage, words, Memory.open(storage.url, arguments.state), arguments.json)
    found: Run | None = _listed(storage)
    while True:
        if found is not None:
            live = sorted(found.live().values())
            is_over = arguments.until is not None and any(each.step >= arguments.until for each in live)
            watcher.look([each for each in live if _is_wanted(each.step, arguments.since, arguments.until)])
            if is_over:
                return 1 if watcher.failed else 0
        time.sleep(arguments.every)
        try:
            found = _listed(storage)
        except (CheckpointError, OSError) as error:
            note(f"{error}; looking again in {arguments.every} s")
            found = None


@dataclass(frozen=True, slots=True)
class Memory:
    """Names of the directories of checkpoints for which the command has succeeded, kept in a file if there is one."""

    url: str
    file: str | None
    done: set[str]

    @classmethod
    def open(cls, url: str, file: str | None) -> Memory:
        """Reads ``file``, or begins with nothing where it does not exist. Raises ``UsageError`` for another's file."""
        if file is None or not os.path.exists(file):
            return cls(url, file, set())
        try:
            with open(file, encoding="utf-8") as stream:
                found = json.load(stream)
            known, done = found["url"], {str(name) for name in found["done"]}
        except (ValueError, KeyError, TypeError):
            raise UsageError(f"--state {file} is not a file that dist-asgd watch wrote: name another one") from None
        except OSError as error:
            raise UsageError(f"cannot read --state {file}: {error.strerror}") from None
        if known != url:
            raise UsageError(f"--state {file} is of the run {known}, not of {url}: name another file")
        return cls(url, file, done)

    def add(self, name: str) -> None:
        """Remembers a directory. The file is replaced as a whole, so that a crash leaves the old one or the new one."""
        self.done.add(name)
        if self.file is None:
            return
        part = f"{self.file}.part"
        with open(part, "w", encoding="utf-8") as stream:
            json.dump({"url": self.url, "done": sorted(self.done)}, stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, self.file)


@dataclass(frozen=True, slots=True)
class Watcher:
    """Runs a command for checkpoints for which it has not succeeded yet.

    Attributes:
        words: the command, with ``{url}`` and ``{step}`` in it.
        failed: names of the directories for which the command was run and has not succeeded.
    """

    storage: Storage
    words: Sequence[str]
    memory: Memory
    as_json: bool
    failed: set[str] = field(default_factory=set)

    def look(self, checkpoints: Sequence[Directory]) -> None:
        """Runs the command for each of ``checkpoints`` for which it has not succeeded, in this order."""
        for name in self.failed - {checkpoint.name for checkpoint in checkpoints} - self.memory.done:
            note(f"{self.storage.url}/{name} was deleted or replaced before its command succeeded")
            self.memory.done.add(name)  # is said once; stays in failed
        for checkpoint in checkpoints:
            if checkpoint.name not in self.memory.done:
                self._run(checkpoint)

    def _run(self, checkpoint: Directory) -> None:
        url = f"{self.storage.url}/{checkpoint.name}"
        words = [word.replace("{step}", str(checkpoint.step)).replace("{url}", url) for word in self.words]
        flush()
        begun = time.monotonic()
        failure = _failure_of(words)
        seconds = time.monotonic() - begun
        self._report({"step": checkpoint.step, "url": url, "seconds": round(seconds, 3), "failure": failure})
        if failure is None:
            self.failed.discard(checkpoint.name)
            self.memory.add(checkpoint.name)
        else:
            self.failed.add(checkpoint.name)

    def _report(self, event: dict[str, Any]) -> None:
        if self.as_json:
            write(json.dumps(event))  # one line for each, because there is no end at which a list could be closed
        elif event["failure"] is None:
            write(f"step {event['step']}: done in {format_duration(event['seconds'])}: {event['url']}")
        if event["failure"] is not None:
            note(f"step {event['step']}: the command {event['failure']}, and is run again at the next look")


def _failure_of(words: Sequence[str]) -> str | None:
    """Runs a command. Returns why it failed, or None if its exit status is 0."""
    try:
        status = subprocess.run(words, stdin=subprocess.DEVNULL, check=False).returncode
    except OSError as error:
        return f"could not be started: {error.strerror}"
    if status == 0:
        return None
    return f"ended with status {status}" if status > 0 else f"was ended by signal {-status}"


def _words(command: str) -> list[str]:
    """Splits a command like a shell. Raises ``UsageError`` where that fails, or where there is no such program."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise UsageError(f"--exec cannot be split into words: {error}") from None
    if not words:
        raise UsageError("--exec is empty: expected a command, such as 'python evaluate.py {url}'")
    if "{" not in words[0] and shutil.which(words[0]) is None:
        raise UsageError(f"--exec: there is no program {words[0]!r}; a shell's own commands need sh -c")
    return words


def _is_wanted(step: int, since: int | None, until: int | None) -> bool:
    return (since is None or step > since) and (until is None or step <= until)


def _listed(storage: Storage) -> Run:
    """Lists a run, which may have no checkpoint yet. Raises ``CheckpointError`` where the URL is not that of a run."""
    found = list_run(storage)
    found.require()
    return found
