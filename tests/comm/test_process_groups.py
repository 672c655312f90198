"""Process groups that optimizers and checkpointers share: how many there are, who gets which, and when they end."""

import gc
import os
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor

from dist_asgd import Checkpointer, NonMonotonicTrigger, ShardedASGD, load, save
from dist_asgd.checkpoint.errors import CheckpointError
from dist_asgd.comm.process_groups import SharedGroups
from tests.support.oracle import PLAIN, Pair, backward, make_parameters, random_gradients
from tests.support.ranks import message_of, run_ranks

SPECS = PLAIN[:2]


def descriptors_and_threads():
    gc.collect()
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


def step(pair, seed):
    pair.backward(random_gradients(SPECS, dist.get_world_size(), seed))
    pair.step()
    pair.zero_grad()


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts in /proc")
def test_a_sweep_of_200_optimizers_stays_flat(tmp_path):
    def ranks(rank):
        mesh, counts = init_device_mesh("cpu", (2,)), []
        for number in range(200):
            pair = Pair(make_parameters(SPECS, number), lr=0.1, t0=0)
            step(pair, number)
            if number % 3 == 0:
                pair.backward(random_gradients(SPECS, 2, number))  # whose reductions nobody waits for
            if number % 100 == 0:
                pair.check(number)
                NonMonotonicTrigger(3)
                shared = distribute_tensor(torch.ones(3), mesh, [Replicate()]).requires_grad_()
                ShardedASGD([("shared", shared)], lr=0.1)
                for name in ("run", "alone"):
                    state, url = {"optimizer": pair.optimizer}, tmp_path / f"{name} {number}"
                    if name == "alone":
                        save(url, state)
                        load(url, state)
                        continue
                    with Checkpointer(url) as checkpointer:
                        checkpointer.save(1, state)
                    del checkpointer
                del state, shared
            del pair
            if number in (1, 199):
                counts.append(descriptors_and_threads())
        assert counts[0] == counts[1]

    run_ranks(2, ranks)


def test_three_optimizers_alive_at_once_and_later_ones():
    """Ranks come to their gradients in different orders, and lose their optimizers at different times."""

    def ranks(rank):
        if rank == 1:
            gc.disable()
        for number in range(4):
            pairs = [Pair(make_parameters(SPECS, 3 * number + which), lr=0.1, t0=0) for which in range(3)]
            for seed in range(3):
                each = [random_gradients(SPECS, 3, 100 * number + 10 * seed + which) for which in range(3)]
                for pair, by_rank in zip(pairs, each, strict=True):
                    pair.oracle.backward(by_rank)
                order = [(which + rank) % 3 for which in range(3)]
                backward([p for i in order for p in pairs[i].params], [g for i in order for g in each[i][rank]])
                for pair in pairs:
                    pair.step()
                    pair.zero_grad()
                    pair.check((number, seed))
            pairs[number % 3].optimizer.itself = pairs[number % 3].optimizer  # only the garbage collector frees it

    run_ranks(3, ranks)


def test_groups_in_which_a_reduction_of_one_rank_waits_are_not_handed_on():
    def ranks(rank):
        pair = Pair(make_parameters(SPECS), lr=0.1, t0=0)
        step(pair, 0)
        if rank == 1:
            backward(pair.params, random_gradients(SPECS, 2, 1)[1])
        del pair
        later = Pair(make_parameters(SPECS), lr=0.1, t0=0)
        for seed in range(3):
            step(later, seed)
        later.check()

    run_ranks(2, ranks)


def test_calls_of_different_objects_meet_in_an_error():
    def ranks(rank):
        first, second = (Pair(make_parameters(SPECS, seed), lr=0.1, t0=0) for seed in range(2))
        checkpointer = Checkpointer("memory://run")
        step(first, 0)
        for call in (
            lambda: checkpointer.save(1, {}) if rank == 0 else first.step(),
            lambda: (first if rank == 0 else second).optimizer.full_state_dict(),
            lambda: ShardedASGD(make_parameters(SPECS)) if rank == 0 else first.step(),
        ):
            text = message_of(call, RuntimeError, CheckpointError)
            assert "rank 0 called " in text and "rank 1 called " in text and "every rank must make the same" in text
        checkpointer.close()  # the others go on in the groups that it shared with them
        for pair in (first, second, Pair(make_parameters(SPECS, 5), lr=0.1, t0=0)):
            step(pair, 1)
            pair.check()

    run_ranks(2, ranks)


def test_groups_end_with_the_users_group(tmp_path):
    def ranks(rank):
        held = []
        for number in range(2):
            group = dist.new_group([0, 1])
            pair = Pair(make_parameters(SPECS), lr=0.1, t0=0, process_group=group)
            step(pair, number)
            pair.check()
            del pair, group
            dist.destroy_process_group()
            held.append(descriptors_and_threads())
            store = dist.FileStore(str(tmp_path / str(number)), 2)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
        assert held[0] == held[1]
        Pair(make_parameters(SPECS), lr=0.1, t0=0)

    run_ranks(2, ranks)


def test_a_timeout_ends_the_groups_and_not_the_training():
    def ranks(rank):
        group = dist.new_group([0, 1], timeout=timedelta(seconds=1))
        pair = Pair(make_parameters(SPECS), lr=0.1, t0=0, process_group=group)
        time.sleep(1.5 * rank)
        message_of(pair.optimizer.full_state_dict, RuntimeError)
        dist.barrier()
        again = Pair(make_parameters(SPECS), lr=0.1, t0=0, process_group=group)
        step(again, 0)
        again.check()

    run_ranks(2, ranks)


def test_a_group_of_some_ranks_is_not_split_from_the_group_of_all():
    """NCCL would split where a device is bound, and wait for rank 2, which makes no group."""

    def ranks(rank):
        world, device = dist.group.WORLD, torch.device("cuda", 0)
        some = dist.new_group([0, 1])
        world.bound_device_id = device  # as init_process_group(device_id=...) does
        if rank < 2:
            host = SharedGroups.of(some, "a test").host
            assert host.bound_device_id is None  # torch hands the device on to each group that it may split off
            dist.all_reduce(torch.ones(1), group=host)
        assert world.bound_device_id == device
        world.bound_device_id = None  # barriers would be on that device

    run_ranks(3, ranks)


def test_the_error_of_a_gloo_that_finds_no_interface_says_how_to_name_one():
    def ranks(rank):
        os.environ["GLOO_SOCKET_IFNAME"] = "absent0"
        text = message_of(lambda: SharedGroups.of(dist.group.WORLD, "a test"), RuntimeError)
        assert "absent0" in text and "set the environment variable GLOO_SOCKET_IFNAME on every rank" in text

    run_ranks(2, ranks)
