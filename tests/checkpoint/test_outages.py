"""Stores that do not answer, as ranks see it: an outage ends no save, and a store that is gone is an error on all."""

import signal
import time

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from dist_asgd import Checkpointer
from dist_asgd.checkpoint import CheckpointError, PerRank
from dist_asgd.checkpoint.storage import retry
from dist_asgd.cli import urls
from dist_asgd.cli.main import main
from tests.support.failures import one_message
from tests.support.outages import train_through_outage
from tests.support.ranks import message_of, run_ranks
from tests.support.stores import proxied, s3_server, sftp_server  # noqa: F401


def values(rank):
    return {"x": PerRank(torch.full((1000,), float(rank)))}


@pytest.mark.parametrize("wait", [True, False])
def test_an_outage_ends_no_save(request, monkeypatch, wait):
    monkeypatch.setattr(retry, "FIRST_PAUSE", 0.05)
    server = request.getfixturevalue("s3_server")
    with proxied(server) as (proxy, options):

        def ranks(rank):
            with Checkpointer(url, options, retry_timeout=50) as checkpointer:
                checkpointer.save(1, values(rank), wait=wait)
                checkpointer.wait()
                state = values(-1)
                assert checkpointer.load(state) == 1
                return state["x"].value[0].item()

        url = server.new_url()
        proxy.go_down(refuse=10)
        assert run_ranks(2, ranks) == [0.0, 1.0]
        assert proxy.refuse == 0


def test_training_goes_on_while_the_store_of_a_save_in_the_background_is_stopped(request):
    server = request.getfixturevalue("s3_server")
    arguments = (server.new_url(), server, 0.5, False, 60.0, 1024, 0.01)
    for found in run_ranks(2, train_through_outage, *arguments, timeout=120):
        assert found["during"][0] > 0 and found["save"] == found["next"] == ""
        assert found["newest"] == 2 and found["equal"]


@pytest.mark.parametrize("store", ["s3", "sftp"])
def test_a_store_that_is_gone_is_an_error_on_every_rank(request, monkeypatch, capsys, store):
    """It is not a run without checkpoints, from which a training would start anew."""
    server = request.getfixturevalue(f"{store}_server")
    with proxied(server) as (_, options):
        pass  # nobody listens there any more
    url = server.new_url()

    def ranks(rank):
        checkpointer = Checkpointer(url, options, retry_timeout=0.05)
        calls = [lambda: checkpointer.load(values(rank)), lambda: checkpointer.save(1, values(rank))]
        together = [message_of(call, CheckpointError) for call in calls]
        return together, [message_of(call, OSError) for call in (checkpointer.steps, checkpointer.latest)]

    found = run_ranks(2, ranks)
    for texts in zip(*(together for together, _ in found), strict=True):
        one_message(list(texts), f"could not list {url}: ", "tries in")
    assert all(f"could not list {url}: " in text for _, alone in found for text in alone)
    monkeypatch.setattr(urls, "RETRY_TIMEOUT", 0.05)
    arguments = [f"--storage-option={name}={value}" for name, value in options.items()]
    assert main(["ls", url, *arguments]) == 1
    assert f"could not list {url}: " in capsys.readouterr().err


class Unwritable(MemoryFileSystem):
    """Lists what is there, and has an outage for all who write."""

    protocol = "unwritable"
    interrupts = False  # whether the process is interrupted a moment after it has failed to write

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("unwritable://", "memory://"))

    def open(self, *args, **kwargs):
        if self.interrupts:
            signal.setitimer(signal.ITIMER_REAL, 0.2)
        raise ConnectionError("an outage")


def test_ranks_in_an_outage_hear_of_one_that_is_interrupted():
    fsspec.register_implementation("unwritable", Unwritable, clobber=True)

    def ranks(rank):
        checkpointer = Checkpointer("unwritable://run")
        begun = time.monotonic()
        if rank == 1:
            signal.signal(signal.SIGALRM, signal.default_int_handler)
            Unwritable.interrupts = True
        kind = KeyboardInterrupt if rank == 1 else CheckpointError
        text = message_of(lambda: checkpointer.save(1, values(rank)), kind)
        assert time.monotonic() - begun < retry.RETRY_TIMEOUT / 4
        return text

    texts = run_ranks(3, ranks)
    one_message([texts[0], texts[2]], "rank 1: KeyboardInterrupt")
