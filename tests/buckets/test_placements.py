"""DTensors of any shape, dtype, mesh and placements: the bits of torch.optim.ASGD on whole tensors; save and load."""

import functools
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from dist_asgd import ShardedASGD
from dist_asgd.comm.collectives import Collectives, DeviceTransfer
from tests.support import dtensors
from tests.support.layouts import local, whole
from tests.support.oracle import LOW, same_bits, wide
from tests.support.ranks import run_ranks

SHAPES = [(), (1,), (5,), (7, 3), (0, 3), (3, 2, 5), (65, 33)]
DTYPES = [torch.float32, torch.float64, torch.complex64, torch.bfloat16]
OPTIONS: dict[str, Any] = {"lr": 0.05, "lambd": 1e-2, "t0": 3, "weight_decay": 0.1}
STEPS, SAVED = 6, 5


@functools.cache  # each of two dimensions makes process groups
def meshes() -> list[DeviceMesh]:
    size = dist.get_world_size()
    line = init_device_mesh("cpu", (size,))
    if size != 4:
        return [line]
    return [line, init_device_mesh("cpu", (2, 2)), DeviceMesh("cpu", [[0, 2], [1, 3]])]


def placements_of(mesh: DeviceMesh, dims: int) -> list[tuple[Placement, ...]]:
    single: list[Placement] = [Replicate(), *(Shard(dim) for dim in range(min(dims, 2)))]
    return list(itertools.product(single, repeat=mesh.ndim))


def zoo(seed: int) -> dict[str, nn.Parameter]:
    """Parameters under names that tell the whole tensor, each in another placement."""
    params = {}
    generator = torch.Generator().manual_seed(seed)
    arrangements = itertools.cycle(range(10**6))
    for shape in SHAPES:
        for dtype in DTYPES:
            value = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
            mesh_list = meshes()
            turn = next(arrangements) + seed
            mesh = mesh_list[turn % len(mesh_list)]
            choices = placements_of(mesh, len(shape))
            placed = distribute_tensor(value, mesh, choices[turn % len(choices)], src_data_rank=None)
            params[f"{list(shape)} {dtype}"] = nn.Parameter(placed)
    return params


def oracle(params: dict[str, nn.Parameter], values: dict[str, Tensor]) -> tuple[list[nn.Parameter], torch.optim.ASGD]:
    twins = [nn.Parameter(wide(values[name].detach().clone())) for name in params]
    return twins, torch.optim.ASGD(twins, foreach=False, **OPTIONS)


def gradients(params: dict[str, nn.Parameter], step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randint(-8, 9, p.shape, generator=generator).to(p.dtype) / 8 for p in params.values()]


def train(params: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        for param, grad in zip(params.values(), gradients(params, step), strict=True):
            param.grad = dtensors.distribute(grad, param)
        optimizer.step()


def train_twins(
    params: dict[str, nn.Parameter], twins: list[nn.Parameter], optimizer: torch.optim.ASGD, steps: range
) -> None:
    for step in steps:
        for twin, grad in zip(twins, gradients(params, step), strict=True):
            twin.grad = wide(grad)
        optimizer.step()


def check(
    params: dict[str, nn.Parameter], optimizer: ShardedASGD, twins: list[nn.Parameter], expected: torch.optim.ASGD
) -> None:
    full = optimizer.full_state_dict()
    for index, ((name, param), twin) in enumerate(zip(params.items(), twins, strict=True)):
        where = f"{name} {param.placements} on {param.device_mesh.mesh.tolist()}"
        assert same_bits(whole(param), twin.detach().to(param.dtype)), where
        if full:
            assert same_bits(full["state"][index]["ax"], expected.state[twin]["ax"]), where
            assert torch.equal(full["state"][index]["mu"], expected.state[twin]["mu"]), where


@pytest.mark.parametrize(
    ("world_size", "seed", "share", "bucket_bytes", "in_one_pass"),
    [
        (1, 0, True, 200, True),
        (2, 1, True, 1 << 20, False),
        (3, 1, True, 1 << 20, True),
        (4, 0, True, 200, True),
        (4, 1, True, 1 << 20, True),
        (4, 5, False, 200, True),
    ],
)
def test_any_placement(
    world_size: int, seed: int, share: bool, bucket_bytes: int, in_one_pass: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not in_one_pass:
        monkeypatch.setattr("dist_asgd.kernels.dispatch.native_update", lambda *dtypes: None)

    def ranks(rank: int) -> None:
        params = zoo(seed)
        values = {name: whole(param) for name, param in params.items()}
        twins, expected = oracle(params, values)
        optimizer = ShardedASGD(params.items(), shard_replicas=share, bucket_bytes=bucket_bytes, **OPTIONS)
        train(params, optimizer, range(STEPS))
        train_twins(params, twins, expected, range(STEPS))
        check(params, optimizer, twins, expected)
        owned: list[Any] = [None] * world_size
        state = optimizer.state_dict()["state"].values()
        dist.all_gather_object(owned, sum(local(entry["ax"]).numel() for entry in state))
        if share:
            assert sum(owned) == sum(param.numel() for param in params.values())

    run_ranks(world_size, ranks)


@pytest.mark.parametrize(("saved_on", "loaded_on"), [(2, 3), (4, 1), (3, 4)])
def test_any_placement_is_saved_and_loaded_into_any_other(tmp_path: Path, saved_on: int, loaded_on: int) -> None:
    def save(rank: int) -> dict[str, Tensor]:
        params = zoo(0)
        start = {name: whole(param) for name, param in params.items()}
        optimizer = ShardedASGD(params.items(), **OPTIONS)
        train(params, optimizer, range(SAVED))
        dcp.save({"model": params, "optimizer": optimizer.state_dict()}, checkpoint_id=str(tmp_path / "saved"))
        return start

    start = run_ranks(saved_on, save)[0]

    def load(rank: int) -> None:
        params = zoo(3)
        assert any(not same_bits(whole(param), start[name]) for name, param in params.items())
        optimizer = ShardedASGD(params.items(), **OPTIONS)
        state = {"model": params, "optimizer": optimizer.state_dict()}
        dcp.load(state, checkpoint_id=str(tmp_path / "saved"))
        optimizer.load_state_dict(state["optimizer"])
        twins, expected = oracle(params, start)
        train_twins(params, twins, expected, range(SAVED))
        check(params, optimizer, twins, expected)
        train(params, optimizer, range(SAVED, STEPS))
        train_twins(params, twins, expected, range(SAVED, STEPS))
        check(params, optimizer, twins, expected)

    run_ranks(loaded_on, load)


def test_the_oracle_cuts_and_gathers_as_torch_does() -> None:
    """tests/support/dtensors.py, which the tests compare with, against distribute_tensor() and full_tensor()."""

    def ranks(rank: int) -> None:
        for param in zoo(2).values():
            value = torch.full(param.shape, -0.0, dtype=param.dtype)
            theirs = distribute_tensor(value, param.device_mesh, param.placements, src_data_rank=None)
            ours = dtensors.distribute(value, param)
            assert same_bits(ours.to_local(), theirs.to_local()) and ours.placements == theirs.placements
            assert same_bits(dtensors.gather(param), param.full_tensor())
            bits, expected = (x.view(-1).view(torch.uint8) for x in (dtensors.gather(theirs), value))
            assert torch.equal(bits, expected), "the sign of -0 is lost"

    run_ranks(4, ranks)


def test_low_precision_has_masters_that_are_placed_as_the_parameter() -> None:
    def ranks(rank: int) -> None:
        params = zoo(0)
        optimizer = ShardedASGD(params.items(), **OPTIONS)
        train(params, optimizer, range(5))
        for param in params.values():
            state = optimizer.state[param]
            assert ("master" in state) == (param.dtype in LOW)
            if "master" in state and isinstance(state["master"], DTensor):
                assert state["master"].placements == param.placements and state["master"].dtype == torch.float32

    run_ranks(2, ranks)


def test_a_device_is_never_polled_in_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Collectives without gloo's second group stand for NCCL's, by which a stream waits for an all-gather."""

    def ranks(rank: int) -> None:
        on = Collectives.on
        monkeypatch.setattr(Collectives, "on", lambda *args: replace(on(*args), downward=None))
        mesh = init_device_mesh("cpu", (2,))
        whole_values = [torch.full((64,), float(number)) for number in range(5)]
        params = [nn.Parameter(distribute_tensor(value, mesh, [Replicate()])) for value in whole_values]
        optimizer = ShardedASGD(params, lr=0.1, lambd=0, bucket_bytes=64)
        polls, waits = [], []
        monkeypatch.setattr(DeviceTransfer, "completes_within", lambda *args: polls.append(args))
        wait = DeviceTransfer.wait
        monkeypatch.setattr(DeviceTransfer, "wait", lambda transfer: waits.append(transfer) or wait(transfer))
        for param in params:
            param.grad = distribute_tensor(torch.ones(64), mesh, [Replicate()])
        optimizer.step()
        assert not polls and len(waits) == 5
        for number, param in enumerate(params):
            assert torch.equal(param.to_local(), torch.full((64,), float(number)).sub_(0.1))

    run_ranks(2, ranks)
