"""How the ranks meet at the start: those that do not come, or stick on the way, are named with their hosts."""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

import torch.distributed as dist

from dist_asgd.comm.roll_call import place_of_this_process, ranges
from dist_asgd.comm.store import StoreClient, StoreUnresponsive

POLL = 0.05  # seconds between two looks into the store
ANSWER = 2.0  # seconds within which a rank that runs has answered, and so has the store
STUCK = 5.0  # seconds after the timeout, after which a rank that is still inside of torch is ended


class RanksMissing(RuntimeError):
    """Ranks did not come to the start in time, or came and do not answer."""


class Meeting:
    """Ranks in the store that rank 0, or torchrun, has opened at MASTER_ADDR.

    Args:
        rank, size: of this process, and of the world.
        seconds: how long to wait for the store, for the other ranks, and for each `connecting`.

    Raises:
        RanksMissing: the store, which is on rank 0's host, is not there in time.
    """

    def __init__(self, rank: int, size: int, seconds: float) -> None:
        self.host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self._rank, self._size, self._seconds = rank, size, seconds
        is_torchruns = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self._first = f"on {self.host}"  # where rank 0 is, in words
        absent = (
            f"after {seconds:.0f} s (--timeout) nothing answers at {self.host}:{port}, where rank 0 opens the store"
        )
        patience = timedelta(seconds=seconds)
        with self._ended_when_stuck(lambda: absent):
            try:  # wait_for_workers=False: torch would wait here for ranks, and name none
                self.store = dist.TCPStore(
                    self.host, port, is_master=rank == 0 and not is_torchruns, timeout=patience, wait_for_workers=False
                )
            except dist.DistError as error:
                raise RanksMissing(f"Rank {rank}: {absent}. {error}") from error
        self._client = StoreClient(self.store, rank)  # its calls end, also where the store's process is stopped

    def call_the_roll(self, words: bytes) -> bytes:
        """Returns what rank 0 has given for `words`, when all ranks are here. Raises `RanksMissing`."""
        # Rank 0, whose end may take the store away, says who is missing; another one does where it is rank 0.
        deadline = time.monotonic() + self._seconds + (2 * ANSWER if self._rank else 0.0)
        with self._store_watched():
            if self._rank == 0:
                self._client.set("words", words, self._seconds)
            self._client.set(f"place/{self._rank}", place_of_this_process(), self._seconds)
            if self._client.add("here", 1, self._seconds) == self._size:
                self._client.set("all here", b"", self._seconds)
            while not self._client.has("all here", self._seconds):
                if time.monotonic() > deadline:
                    self._client.set_new("absent", self._absent(), ANSWER)
                    time.sleep(ANSWER)
                if (absent := self._client.get("absent", self._seconds)) is not None:
                    raise RanksMissing(f"Rank {self._rank}: {absent.decode()}")
                time.sleep(POLL)
            self._first = self._names([0])
            return self._client.get("words", self._seconds) or b""

    @contextlib.contextmanager
    def connecting(self, what: str) -> Iterator[None]:
        """Lets torch connect the ranks in the block, which all of them enter, and names those that stick in it.

        Args:
            what: tells this block from others, for messages.

        Raises:
            RanksMissing: the block has failed as it took too long, and ranks do not answer. A rank whose block does not
                even fail (torch waits without limit where the process of the store is stopped) says so and ends.
        """
        begun = time.monotonic()
        try:
            with self._ended_when_stuck(lambda: self._silent(what), lambda: self._answer(what)):
                yield
            with self._store_watched():
                self._answer(what)
        except RanksMissing:
            raise
        except RuntimeError as error:
            if time.monotonic() - begun < 0.9 * self._seconds:
                raise  # a rank has ended, or an address is wrong; torch says which
            raise RanksMissing(f"Rank {self._rank}: {self._silent(what)}. {error}") from error

    def _answer(self, what: str) -> None:
        self._client.set(f"{what}/{self._rank}", b"", ANSWER)

    def _absent(self) -> str:
        missing = [rank for rank in range(self._size) if not self._client.has(f"place/{rank}", ANSWER)]
        there = [rank for rank in range(self._size) if rank not in missing]
        return (
            f"{ranges(missing)} did not come within {self._seconds:.0f} s (--timeout); {self._names(there)} came. Look "
            f"at the host of {ranges(missing)}, and whether it reaches {self.host}"
        )

    def _silent(self, what: str) -> str:
        """Returns who has not answered in a block that is overdue, in words."""
        time.sleep(ANSWER)
        try:
            silent = [rank for rank in range(self._size) if not self._client.has(f"{what}/{rank}", ANSWER)]
            if not silent:
                return (
                    f"the ranks could not be connected within {self._seconds:.0f} s (--timeout), and all of them answer"
                )
            return (
                f"{self._names(silent)} did not connect within {self._seconds:.0f} s (--timeout), and gives no answer: "
                "stopped, ended, or out of reach"
            )
        except StoreUnresponsive as error:
            return self._without_store(error)

    def _names(self, ranks: list[int]) -> str:
        """Returns ranks with host and process, all of which have come, in words."""
        places = {rank: (self._client.get(f"place/{rank}", ANSWER) or b"").decode() for rank in ranks}
        return ", ".join(f"rank {rank} ({place})" for rank, place in places.items())

    @contextlib.contextmanager
    def _store_watched(self) -> Iterator[None]:
        try:
            yield
        except StoreUnresponsive as error:
            raise RanksMissing(f"Rank {self._rank}: {self._without_store(error)}") from error

    def _without_store(self, error: StoreUnresponsive) -> str:
        return f"{self._first} gives no answer, or its torchrun where that has the store: {error}"

    @contextlib.contextmanager
    def _ended_when_stuck(self, reason: Callable[[], str], late: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Ends the process where the block sticks inside of torch, where no error can be raised.

        Args:
            reason: returns why, in words, for standard error.
            late: called in another thread when the block has taken all the time that it has.
        """
        left = threading.Event()

        def watch() -> None:
            if left.wait(self._seconds):
                return
            with contextlib.suppress(StoreUnresponsive):
                late()
            if not left.wait(STUCK):
                text = f"Rank {self._rank}: {reason()}"
                if not left.is_set():
                    print(text, file=sys.stderr, flush=True)
                    os._exit(1)

        threading.Thread(target=watch, name="meeting", daemon=True).start()
        try:
            yield
        finally:
            left.set()
