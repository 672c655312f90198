"""The update in one pass on a real GPU: the bits of torch's CUDA operators, one launch, no synchronisation."""

import random
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.profiler import ProfilerActivity, profile

from dist_asgd import ShardedASGD
from tests.support import kernel_cases
from tests.support.oracle import same_bits
from tests.support.ranks import run_alone, run_ranks

pytestmark = pytest.mark.gpu

OPTIONS: dict[str, Any] = {"lr": 0.1, "t0": 5, "lambd": 0.01, "weight_decay": 0.1}
STEPS = 30


@pytest.fixture(autouse=True, scope="module")
def _gpu() -> None:
    if not run_alone(torch.cuda.is_available):  # in a child: CUDA does not survive a fork
        pytest.skip("there is no CUDA GPU")


def parameters(count: int, dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    sizes = random.Random(0)
    return [torch.nn.Parameter(torch.randn(sizes.randint(1, 5000), dtype=dtype, device="cuda")) for _ in range(count)]


def give_gradients(*models: list[torch.nn.Parameter]) -> None:
    for first, *others in zip(*models, strict=True):
        first.grad = torch.randn_like(first)
        for other in others:
            other.grad = first.grad.clone()


def on_gpu(case: Any) -> None:
    kernel_cases.DEVICE = "cuda"
    function, *arguments = case
    function(*arguments)


@pytest.mark.parametrize("name", kernel_cases.INTERPRETED)
def test_the_kernel_has_the_bits_of_the_eager_rule(name: str) -> None:
    run_alone(on_gpu, kernel_cases.INTERPRETED[name], timeout=300)


def beside_torch(dtype: torch.dtype, maximize: bool) -> None:
    ours, theirs = parameters(300, dtype), parameters(300, dtype)
    optimizer = ShardedASGD(ours, maximize=maximize, **OPTIONS)
    twin = torch.optim.ASGD(theirs, foreach=False, maximize=maximize, **OPTIONS)
    for step in range(STEPS):
        give_gradients(ours, theirs)
        optimizer.step()
        twin.step()
        assert all(map(same_bits, ours, theirs)), f"step {step}"
    state = optimizer.full_state_dict()["state"]
    for index, p in enumerate(theirs):
        assert same_bits(state[index]["ax"].cpu(), twin.state[p]["ax"].cpu())


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_bits_of_torch_over_a_run(dtype: torch.dtype, maximize: bool) -> None:
    run_alone(beside_torch, dtype, maximize, timeout=300)


def launches(count: int, capturable: bool) -> int:
    params = parameters(count)
    optimizer = ShardedASGD(params, bucket_bytes=2**30, capturable=capturable, **OPTIONS)
    for _ in range(3):
        give_gradients(params)
        optimizer.step()
    give_gradients(params)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        optimizer.step()
        torch.cuda.synchronize()
    on_device = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    names = [event.name for event in on_device if not event.name.startswith(("Memcpy", "Memset"))]
    assert [name for name in names if "update_kernel" in name or "advance_kernel" in name] == names
    return len(names)


@pytest.mark.parametrize(("capturable", "expected"), [(False, 1), (True, 2)])
def test_one_launch_whatever_the_number_of_parameters(capturable: bool, expected: int) -> None:
    """Another for scalars on the device."""
    assert [run_alone(launches, count, capturable, timeout=300) for count in (1, 10, 1000)] == [expected] * 3


def never_waits(capturable: bool) -> None:
    params = parameters(300)
    lr = torch.tensor(0.1, device="cuda") if capturable else 0.1
    optimizer = ShardedASGD(params, lr=lr, t0=5, capturable=capturable)
    scaler = torch.amp.GradScaler("cuda", growth_interval=2, enabled=capturable)
    for step in range(12):
        scaler.scale(torch.ones((), device="cuda"))
        give_gradients(params)
        torch.cuda.set_sync_debug_mode("error" if step > 1 else "default")  # the first steps make tables and compile
        scaler.step(optimizer)
        scaler.update()
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("capturable", [False, True])
def test_a_step_never_waits_for_the_device(capturable: bool) -> None:
    """With scalars on the device, GradScaler does not either."""
    run_alone(never_waits, capturable, timeout=300)


def dtensors_beside_torch(rank: int) -> None:
    mesh = init_device_mesh("cuda", (1,))
    theirs = [torch.nn.Parameter(torch.randn(rows, 7, device="cuda")) for rows in range(1, 200)]
    ours = [torch.nn.Parameter(distribute_tensor(p.detach().clone(), mesh, [Shard(0)])) for p in theirs]
    optimizer, twin = ShardedASGD(ours, **OPTIONS), torch.optim.ASGD(theirs, foreach=False, **OPTIONS)
    for step in range(STEPS):
        for own, their in zip(ours, theirs, strict=True):
            their.grad = torch.randn_like(their)
            own.grad = DTensor.from_local(their.grad.clone(), mesh, [Shard(0)], run_check=False)
        optimizer.step()
        twin.step()
        assert all(same_bits(own.to_local(), their) for own, their in zip(ours, theirs, strict=True)), f"step {step}"


def test_dtensors() -> None:
    run_ranks(1, dtensors_beside_torch, timeout=300)
