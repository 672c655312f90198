"""Ranks that die, fail or dawdle while they save: what is left, and what the others say.

More of the first: python -m benchmarks.kill.
"""

import resource
import signal
import threading
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dist_asgd import Checkpointer
from dist_asgd.checkpoint import CheckpointError
from dist_asgd.checkpoint.saving import rendezvous
from dist_asgd.checkpoint.saving.rendezvous import Rendezvous
from dist_asgd.checkpoint.storage.posix import LocalStore
from dist_asgd.comm.consensus import Agreement
from tests.support.kill import FAULTS, kill_all, local_place, s3_place
from tests.support.ranks import RankError, message_of, run_ranks
from tests.support.stores import *  # noqa: F403 fixtures

BEATS = 0.1, 2.0  # seconds; shorter than a user's, since every death is waited for
ROUNDS = 200


def check(rows, count):
    rows = list(rows)
    wrong = [row for row in rows if any(row[fault] for fault in FAULTS)]
    assert not wrong, "\n".join(map(str, wrong))
    assert len(rows) == count
    assert all(row["loaded"] for row in rows)
    return rows


def test_after_a_kill_the_newest_checkpoint_is_loaded_bit_for_bit(tmp_path):
    rows = check(kill_all(12, 3, lambda: local_place(str(tmp_path / "run")), BEATS), 12)
    assert len({row["phase"] for row in rows}) > 2
    assert {True, False} == {row["survivors"] > 0 for row in rows}


def test_the_same_on_s3(s3_server):
    check(kill_all(4, 5, lambda: s3_place(s3_server.new_url(), s3_server.options), BEATS), 4)


def dying(rank, folder, wait):
    """Rank 1 is killed by the kernel when it has written 100 bytes; the others write down what they hear."""
    rendezvous.HEARTBEAT_SECONDS, rendezvous.DEAD_SECONDS = BEATS
    checkpointer = Checkpointer(folder / "run")
    checkpointer.save(1, {"x": torch.ones(1000, 1000)})
    if rank == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))

    def save():
        checkpointer.save(2, {"x": torch.ones(1000, 1000)}, wait=wait)
        checkpointer.wait()

    (folder / f"{rank}").write_text(f"{message_of(save, CheckpointError)}\n{checkpointer.steps()}")


@pytest.mark.parametrize("wait", [True, False], ids=["waiting", "in the background"])
def test_the_others_hear_who_died(tmp_path, wait):
    with pytest.raises(RankError):
        run_ranks(3, dying, tmp_path, wait)
    for rank in (0, 2):
        text = (tmp_path / f"{rank}").read_text()
        assert "rank 1 (process " in text and "has given no sign of life" in text
        assert text.endswith("\n[1]")


def busy(rank, folder):
    """Saves in the background, one after the other, under the collectives of a training."""
    model = nn.Linear(40, 40)
    trained = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with Checkpointer(folder / "run", keep_last=2) as checkpointer:
        for step in range(30):
            checkpointer.save(step, {"model": model, "optimizer": optimizer}, wait=False)
            saved_weight = model.weight.detach().clone()
            for _ in range(3):
                trained(torch.ones(4, 40)).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
    fresh = nn.Linear(40, 40)
    with Checkpointer(folder / "run") as checkpointer:
        assert checkpointer.load({"model": fresh}) == 29
        assert checkpointer.steps() == [28, 29]
    assert torch.equal(fresh.weight, saved_weight)


def test_thirty_saves_in_the_background_under_collectives(tmp_path):
    run_ranks(2, busy, tmp_path)
    assert not [path for path in Path(tmp_path).rglob("*") if path.name.endswith(".part")]


def training_first(rank, folder):
    """No byte is written before the training has gone on."""
    may_write, write = threading.Event(), LocalStore.write

    def write_later(store, path, chunks):
        may_write.wait()
        return write(store, path, chunks)

    LocalStore.write = write_later
    x = torch.ones(3, 3)
    with Checkpointer(folder / "run") as checkpointer:
        checkpointer.save(1, {"x": x}, wait=False)
        for _ in range(5):
            dist.all_reduce(x)
        assert checkpointer.steps() == []
        may_write.set()
        checkpointer.wait()
        assert checkpointer.load({"x": x}) == 1
    assert x.eq(1).all()


def test_a_save_in_the_background_waits_for_staging_only(tmp_path):
    run_ranks(2, training_first, tmp_path, timeout=20)


def over_tcp(rank):
    """Begins again with a store as torchrun has it; those of the harness are files."""
    store = dist.TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False) if rank == 0 else None
    port = [store and store.port]
    dist.broadcast_object_list(port)
    store = store or dist.TCPStore("127.0.0.1", port[0], 2)
    dist.destroy_process_group()
    limit = timedelta(seconds=10)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=limit)
    store.set_timeout(limit)


def leaving(rank):
    """A rank looks for signs of life of another one all the time, also in the moment when that leaves."""
    over_tcp(rank)
    rendezvous.HEARTBEAT_SECONDS = rendezvous.POLL_SECONDS = 0.0001
    agreement = Agreement(dist.group.WORLD, "a test")
    for number in range(ROUNDS):
        with Rendezvous(agreement, f"{number}") as meeting:
            meeting.submit(b"")
            if rank == 0:
                meeting.collect()
                meeting.announce("done")
            assert rank == 0 or meeting.wait_for_outcome() == "done"


def test_nobody_waits_for_a_rank_that_has_left(tmp_path):
    run_ranks(2, leaving, timeout=30)


def waiting_in_the_store(rank, folder):
    """The training has the connection to the store for itself meanwhile."""
    over_tcp(rank)
    training = dist.distributed_c10d._get_default_store()
    with Checkpointer(folder / "run") as checkpointer:
        thread = threading.Thread(target=training.wait, args=(["later"],))
        thread.start()
        checkpointer.save(1, {"x": torch.ones(3)})
        assert thread.is_alive()
        dist.barrier()
        training.clone().set("later", "now")
        thread.join()


def test_a_training_that_waits_in_the_store_delays_no_save(tmp_path):
    run_ranks(2, waiting_in_the_store, tmp_path, timeout=30)
