"""The update in one pass on a real GPU: the bits of torch's CUDA operators, one launch, no synchronisation, graphs."""

import random
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.profiler import ProfilerActivity, profile

import kernel_cases
from dist_asgd import ShardedASGD
from dist_asgd.kernels import triton_update
from dist_asgd.parts import Gradients, Parts
from dist_asgd.rule import DeviceScalars, Hyperparameters, first_scalars
from oracle import same_bits
from ranks import run_alone, run_ranks

pytestmark = pytest.mark.gpu

OPTIONS: dict[str, Any] = {"lr": 0.1, "t0": 5, "lambd": 0.01, "weight_decay": 0.1}
STEPS = 30


@pytest.fixture(autouse=True)
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


def launches(count: int) -> int:
    params = parameters(count)
    optimizer = ShardedASGD(params, bucket_bytes=2**30, **OPTIONS)
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
    assert [name for name in names if "update_kernel" in name] == names
    return len(names)


def test_one_launch_whatever_the_number_of_parameters() -> None:
    assert [run_alone(launches, count, timeout=300) for count in (1, 10, 1000)] == [1, 1, 1]


def never_waits() -> None:
    params = parameters(300)
    optimizer = ShardedASGD(params, lr=0.1, t0=5)
    for step in range(12):
        give_gradients(params)
        torch.cuda.set_sync_debug_mode("error" if step > 1 else "default")  # the first steps make tables and compile
        optimizer.step()
        torch.cuda.set_sync_debug_mode("default")


def test_a_step_never_waits_for_the_device() -> None:
    run_alone(never_waits, timeout=300)


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


def train(layout: str, captured: bool) -> tuple[torch.Tensor, ...]:
    """11 steps whose scalars lie on the device: eager ones, or one and then replays of one that is captured."""
    h = Hyperparameters(lr=0.1, lambd=0.01, alpha=0.75, t0=4.0, weight_decay=0.1, maximize=False)
    case = kernel_cases.Case(kernel_cases.DTYPES["float32"], layout)
    own, average, _ = case.tensors()
    parts = Parts.of([own[a:b] for a, b in case.spans], [a for a, _ in case.spans])
    grads = [case.grad[a:b] for a, b in case.spans]
    scalars = DeviceScalars.of(first_scalars(h), torch.device("cuda"))
    update, graph = triton_update(torch.float32, torch.float32, torch.float32), torch.cuda.CUDAGraph()

    def step() -> None:
        update(parts, Gradients.of(grads), average, None, h, scalars, case.rounding)
        scalars.advance_(h)

    step()
    torch.cuda.synchronize()
    if captured:
        with torch.cuda.graph(graph):
            step()
    for _ in range(10):
        if captured:
            graph.replay()
        else:
            step()
    torch.cuda.synchronize()
    return own, average, scalars.eta, scalars.mu


def replays(layout: str) -> None:
    kernel_cases.DEVICE = "cuda"
    assert all(map(same_bits, train(layout, captured=False), train(layout, captured=True)))


@pytest.mark.parametrize("layout", ["one", "many"])
def test_a_captured_graph_replays_what_eager_steps_do(layout: str) -> None:
    run_alone(replays, layout, timeout=300)
