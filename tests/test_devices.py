"""The same bits as torch on the device that the parameters are on; over NCCL where there are two GPUs."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from dist_asgd import ShardedASGD
from tests.support.oracle import PLAIN, make_parameters, random_gradients, reduce_in_rank_order, same_bits
from tests.support.ranks import run_alone, run_ranks

OPTIONS = {"lr": 0.1, "t0": 5, "lambd": 0.01, "weight_decay": 0.1}
STEPS = 30
gpu = pytest.mark.gpu


def require_gpus(count: int) -> None:
    found = int(run_alone(torch.cuda.device_count))  # in a child: CUDA does not survive a fork
    if found < count:
        pytest.skip(f"it needs {count} CUDA GPUs, there are {found}")


def train_beside_torch(rank: int, world_size: int, device: str, dtype: torch.dtype, **options: Any) -> None:
    where = torch.device(device, rank) if device == "cuda" else torch.device(device)
    params, twins = ([torch.nn.Parameter(p.detach().to(where, dtype)) for p in make_parameters(PLAIN)] for _ in "ab")
    ours = ShardedASGD(params, bucket_bytes=1024, **OPTIONS, **options)
    theirs = torch.optim.ASGD(twins, foreach=False, **OPTIONS)
    for step in range(STEPS):
        by_rank = [[g.to(where, dtype) for g in grads] for grads in random_gradients(PLAIN, world_size, step)]
        torch.autograd.backward([(p * g).sum() for p, g in zip(params, by_rank[rank], strict=True)])
        for twin, *grads in zip(twins, *by_rank, strict=True):
            twin.grad = reduce_in_rank_order(grads)
        for optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad()
        assert all(map(same_bits, params, twins)), f"step {step}"
    full = ours.full_state_dict()
    for index, twin in enumerate(twins if rank == 0 else []):
        assert same_bits(full["state"][index]["ax"], theirs.state[twin]["ax"].cpu())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
def test_one_process(device: str, dtype: torch.dtype) -> None:
    require_gpus(1 if device == "cuda" else 0)
    run_alone(train_beside_torch, 0, 1, device, dtype)


@pytest.mark.parametrize(("device", "backend"), [("cpu", "gloo"), pytest.param("cuda", "nccl", marks=gpu)])
def test_two_ranks_over_a_backend(device: str, backend: str) -> None:
    """A sum of two gradients has the same bits in either order, so NCCL's has those of the oracle."""
    require_gpus(2 if device == "cuda" else 0)

    def ranks(rank: int) -> None:
        if device == "cuda":
            torch.cuda.set_device(rank)
        group = dist.new_group([0, 1], backend=backend)
        train_beside_torch(rank, 2, device, torch.float32, process_group=group)

    run_ranks(2, ranks, timeout=120)
