"""Ranks that keep others waiting: stopped, ended, late or in other calls. Every other rank says which, and where."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, distribute_tensor

import tests.support.ranks
from dist_asgd import Checkpointer, ShardedASGD, load, save
from dist_asgd.checkpoint import CheckpointError
from dist_asgd.checkpoint.storage.posix import LocalStore
from tests.support.oracle import PLAIN, Pair, make_parameters, random_gradients
from tests.support.ranks import RankError, message_of, run_ranks

TIMEOUT = 2.0  # of the process groups whose ranks are stopped, in seconds
LONG = 60.0  # no wait ends by this timeout: what is found before is found by asking
ERRORS = RuntimeError, CheckpointError


def group_of(ranks, seconds):
    return dist.new_group(list(ranks), timeout=timedelta(seconds=seconds))


def timed(call, *kinds):
    """Returns the message of ``call``, and how long it took."""
    start = time.monotonic()
    return message_of(call, *(kinds or ERRORS)), time.monotonic() - start


# Ranks in different calls


def evaluate(optimizer):
    with optimizer.averaged_parameters():
        pass


ALONE = {  # what rank 0 calls by itself while the others take a step, by its name in the message
    "Checkpointer.save()": lambda optimizer, run, url: run.save(1, {"optimizer": optimizer}),
    "Checkpointer.load()": lambda optimizer, run, url: run.load({"optimizer": optimizer}),
    "Checkpointer.wait()": lambda optimizer, run, url: run.wait(),
    "Checkpointer.close()": lambda optimizer, run, url: run.close(),
    "Checkpointer()": lambda optimizer, run, url: Checkpointer(url),
    "dist_asgd.save()": lambda optimizer, run, url: save(url + "/one", {"optimizer": optimizer}),
    "dist_asgd.load()": lambda optimizer, run, url: load(url + "/one", {"optimizer": optimizer}),
    "ShardedASGD.full_state_dict()": lambda optimizer, run, url: optimizer.full_state_dict(),
    "ShardedASGD.averaged_parameters()": lambda optimizer, run, url: evaluate(optimizer),
}


def alone_beside_a_step(rank, url):
    """The calls meet in one exchange, so nobody waits for anything, and all can go on."""
    pair = Pair(make_parameters(PLAIN), lr=0.1, t0=0)
    run = Checkpointer(url)
    texts = []
    for call in ALONE.values():
        pair.backward(random_gradients(PLAIN, 3, 9))
        texts.append(message_of(lambda: pair.optimizer.step() if rank else call(pair.optimizer, run, url), *ERRORS))  # noqa: B023
        pair.zero_grad()
    pair.train(range(3))
    return texts


def test_a_call_of_rank_0_alone_and_the_step_of_the_others_are_both_named(tmp_path):
    everyone = run_ranks(3, alone_beside_a_step, str(tmp_path))
    for name, texts in zip(ALONE, zip(*everyone, strict=True), strict=True):
        for text in texts:
            assert f"rank 0 called {name}" in text and "ranks 1-2 called ShardedASGD.step()" in text, text


def alone_before_a_backward(rank, url):
    """Rank 0 saves after a step, and the reductions of the others' next backward wait for its backward."""
    pair = Pair(make_parameters(PLAIN), lr=0.1, t0=0)
    run = Checkpointer(url)
    pair.train(range(2))
    if rank:
        pair.backward(random_gradients(PLAIN, 2, 9))
    text, seconds = timed(pair.optimizer.step if rank else lambda: run.save(1, {"optimizer": pair.optimizer}))
    assert seconds < LONG / 2, "nobody waits until the timeout of the group"
    if not rank:
        pair.backward(random_gradients(PLAIN, 2, 9))
    pair.zero_grad()
    pair.train(range(3))
    return text


def test_a_save_of_rank_0_alone_is_named_by_ranks_that_have_run_their_next_backward(tmp_path):
    for text in run_ranks(2, alone_before_a_backward, str(tmp_path), timeout=LONG):
        assert "rank 0 called Checkpointer.save(), rank 1 called ShardedASGD.step()" in text


def across_groups(rank, url):
    """The optimizer lives on a group of its own; in the end on ranks 0 and 1 only, while ranks 2 and 3 do nothing."""
    texts, groups = [], [group_of(range(3), LONG), group_of(range(2), LONG)]
    run = Checkpointer(url)
    for ranks, group in zip((range(3), range(2)), groups, strict=True):
        if rank not in ranks:
            continue
        pair = Pair(make_parameters(PLAIN), lr=0.1, t0=0, process_group=group)
        pair.backward(random_gradients(PLAIN, len(ranks), 9))
        texts.append(message_of(lambda: pair.optimizer.step() if rank else run.save(1, {}), *ERRORS))  # noqa: B023
        pair.zero_grad()
        if len(ranks) == 3:
            pair.train(range(3))
            assert run.save(1, {"optimizer": pair.optimizer})
    if rank == 2:  # comes to the exchange that the others have left
        texts.append(message_of(lambda: run.save(2, {}), *ERRORS))
    return texts


def test_calls_on_different_process_groups_meet_and_the_groups_stay_usable(tmp_path):
    (a, b), (c, d), (e, f) = run_ranks(3, across_groups, str(tmp_path), timeout=LONG)
    for text in (a, c, e):
        assert "rank 0 called Checkpointer.save(), ranks 1-2 called ShardedASGD.step()" in text
    for text in (b, d, f):
        assert "rank 0 called Checkpointer.save(), rank 1 called ShardedASGD.step()" in text


def beside_steps_that_send_nothing(rank, url, folder):
    """FSDP2's own collectives keep the others in their next forward; here they wait for rank 0 without one."""
    group = group_of(range(2), LONG)
    model = fully_shard(nn.Linear(4, 4), mesh=DeviceMesh.from_group(group, "cpu"))
    optimizer = ShardedASGD(model.named_parameters(), lr=0.1, process_group=group)
    run = Checkpointer(url, process_group=group)
    for step in range(3):
        model(torch.ones(2, 4)).sum().backward()
        if rank == 0 and step == 2:
            text = message_of(lambda: run.save(1, {"model": model}), CheckpointError)
            (folder / "said").touch()
            return text
        optimizer.step()
        optimizer.zero_grad()
    while not (folder / "said").exists():
        time.sleep(0.1)
    return None


def test_a_save_beside_a_step_that_sends_nothing_is_an_error_where_it_was_called(tmp_path):
    text, _ = run_ranks(2, beside_steps_that_send_nothing, str(tmp_path / "run"), tmp_path, timeout=LONG)
    assert "rank 0 called Checkpointer.save(), rank 1 called ShardedASGD.step()" in text


# Ranks that do not come


def replicated(group):
    mesh = DeviceMesh.from_group(group, "cpu")
    weight = distribute_tensor(torch.ones(30), mesh, [Replicate()]).requires_grad_()
    return stepping([("weight", weight)], group)


def stepping(params, group, **options):
    """Returns a call of step() of an optimizer that has taken one."""
    optimizer = ShardedASGD(params, lr=0.1, t0=0, process_group=group, **options)

    def step():
        for param in optimizer.param_groups[0]["params"]:
            param.grad = torch.ones_like(param)
        optimizer.step()

    step()
    return step


def plain(group, gradients):
    return stepping([("weight", nn.Parameter(torch.ones(30)))], group, gradients=gradients)


def saving(group, url, wait):
    run = Checkpointer(url, process_group=group)
    run.save(1, {"x": torch.ones(3)})
    return lambda: (run.save(2, {"x": torch.ones(3)}, wait=wait), run.wait())


def loading(group, url):
    run = Checkpointer(url, process_group=group)
    run.save(1, {"x": torch.ones(3)})
    return lambda: run.load({"x": torch.ones(3)})


WITHOUT_RANK_1 = {  # returns the call that ranks make while rank 1 is stopped
    "ShardedASGD.step()": lambda group, url: plain(group, "local"),
    "ShardedASGD.step() ": lambda group, url: plain(group, "reduced"),
    "ShardedASGD.step()  ": lambda group, url: replicated(group),
    "Checkpointer.save()": lambda group, url: saving(group, url, wait=True),
    "Checkpointer.load()": lambda group, url: loading(group, url),
    "Checkpointer()": lambda group, url: lambda: Checkpointer(url, process_group=group),
}


def all_at_once(calls):
    """Returns, for each call, the message of its error and how many seconds that took."""
    with ThreadPoolExecutor(len(calls)) as threads:
        return list(threads.map(timed, calls))


def without_rank_1(rank, folder, number):
    """Rank 1 gets a signal while the others are in several calls, each on a process group of its own."""
    (folder / f"pid{rank}").write_text(str(os.getpid()))
    calls = [make(group_of(range(3), TIMEOUT), str(folder / f"{n}")) for n, make in enumerate(WITHOUT_RANK_1.values())]
    dist.barrier()
    if rank == 1:
        os.kill(os.getpid(), number)
        return
    said = all_at_once(calls)
    (folder / f"said{rank}").write_text(json.dumps(said))
    while not all((folder / f"said{other}").exists() for other in (0, 2)):
        time.sleep(0.05)
    if rank == 0 and number == signal.SIGSTOP:
        os.kill(int((folder / "pid1").read_text()), signal.SIGCONT)


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL], ids=["stopped", "killed"])
def test_every_other_rank_names_the_one_that_is_missing_and_its_host(tmp_path, monkeypatch, number):
    monkeypatch.setattr(tests.support.ranks, "GRACE", LONG)
    with pytest.raises(RankError, match="rank 1 failed") if number == signal.SIGKILL else contextlib.nullcontext():
        run_ranks(3, without_rank_1, tmp_path, number, timeout=2 * LONG)
    place = f"rank 1 (process {(tmp_path / 'pid1').read_text()} on host {socket.gethostname()})"
    first, last = (json.loads((tmp_path / f"said{rank}").read_text()) for rank in (0, 2))
    for name, *said in zip(WITHOUT_RANK_1, first, last, strict=True):
        assert said[0][0] == said[1][0]
        for text, seconds in said:
            assert name.strip() in text and place in text and "rank 2" not in text and "rank 0" not in text, text
            assert seconds < LONG, (name, seconds)


def over_tcp(rank, folder):
    """Begins again with a store that rank 0 hosts."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if rank == 0 else None
    port = [store.port if store else 0]
    dist.broadcast_object_list(port)
    store = store or dist.TCPStore("127.0.0.1", port[0], is_master=False, wait_for_workers=False)
    dist.barrier()
    dist.destroy_process_group()
    limit = timedelta(seconds=TIMEOUT)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=3, timeout=limit)


def without_the_store(rank, folder):
    """Rank 0, which hosts the store, is stopped, also while a save is written in the background."""
    (folder / f"pid{rank}").write_text(str(os.getpid()))
    over_tcp(rank, folder)
    write = LocalStore.write

    def write_later(store, path, chunks):
        while not (folder / "stopped").exists():
            time.sleep(0.01)
        return write(store, path, chunks)

    LocalStore.write = write_later
    step = plain(group_of(range(3), TIMEOUT), "local")
    group, run = group_of(range(3), TIMEOUT), Checkpointer(folder / "run")
    run.save(1, {"x": torch.ones(3)}, wait=False)
    dist.barrier()
    if rank == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
        run._background.wait()  # the thread ends, as the others have left
        (folder / "ended").touch()
        return
    while Path(f"/proc/{(folder / 'pid0').read_text()}/stat").read_text().split()[2] != "T":
        time.sleep(0.01)
    (folder / "stopped").touch()
    said = all_at_once([step, run.wait, lambda: Checkpointer(folder / "other", process_group=group)])
    (folder / f"said{rank}").write_text(json.dumps(said))
    while not all((folder / f"said{other}").exists() for other in (1, 2)):
        time.sleep(0.05)
    if rank == 1:
        os.kill(int((folder / "pid0").read_text()), signal.SIGCONT)
    while not (folder / "ended").exists():  # all ranks meet once more, within TIMEOUT
        time.sleep(0.05)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads in /proc whether a process is stopped")
def test_where_the_rank_that_hosts_the_store_is_stopped_the_others_say_so(tmp_path):
    run_ranks(3, without_the_store, tmp_path, timeout=2 * LONG)
    place = f"(process {(tmp_path / 'pid0').read_text()} on host {socket.gethostname()})"
    for rank in (1, 2):
        for text, seconds in json.loads((tmp_path / f"said{rank}").read_text()):
            assert "hosts the key-value store" in text and "does not answer" in text and place in text, text
            assert "rank 1" not in text and "rank 2" not in text, text
            assert seconds < LONG


def test_a_process_that_ends_during_a_request_to_the_store_ends_well() -> None:
    """A thread that comes back from torch's C++ while Python shuts down would abort the process."""
    script = (
        "import time, torch.distributed as dist\n"
        "from datetime import timedelta\n"
        "from dist_asgd.comm.store import StoreClient, StoreUnresponsive\n"
        "class Slow:\n"
        "    def __del__(self, sleep=time.sleep):\n"
        "        sleep(1)\n"
        "client = StoreClient(dist.TCPStore('localhost', 0, 1, True), 0)\n"
        "client.has('x', 10)\n"
        "try:\n"
        "    client._do(lambda store: store.wait(['never'], timedelta(seconds=0.5)), 0.1)\n"
        "except StoreUnresponsive:\n"
        "    slow = Slow()\n"  # deleted while Python shuts down, which so takes a second
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran
