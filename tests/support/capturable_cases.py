"""What ``ShardedASGD(capturable=True)`` does, beside torch.optim.ASGD: by Triton's interpreter, or on a GPU.

Each case takes the type of device. kernel_cases.py runs them, in a process where tensors on the CPU stand for a GPU's.
"""

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from dist_asgd import ShardedASGD
from tests.support.ranks import run_ranks

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
SHAPES = [(5,), (2100,), (), (17, 3)]
OPTIONS = {"lr": 0.1, "lambd": 0.01, "t0": 3, "weight_decay": 0.1}
STEPS = 9


def parameters(device, dtype=F32, shapes=SHAPES):
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, dtype=F64, generator=generator) for shape in shapes]
    return [torch.nn.Parameter(value.to(device, dtype)) for value in values]


def give_gradients(step, *models, scale=1.0):
    generator = torch.Generator().manual_seed(step)
    for together in zip(*models, strict=True):
        value = torch.randn(together[0].shape, dtype=F64, generator=generator)
        for param in together:
            param.grad = value.to(param.device, param.dtype) * scale


def pair(device, dtype=F32, lr=0.1, **options):
    """Ours, and torch's with the options of both."""
    ours, theirs = parameters(device, dtype), parameters(device, dtype)
    both = OPTIONS | options
    optimizer = ShardedASGD(ours, **(both | {"lr": lr}), capturable=True)
    twin = torch.optim.ASGD(theirs, **(both | {"lr": float(lr)}), foreach=False)
    return ours, theirs, optimizer, twin


def same(ours, theirs):
    return all(map(torch.equal, ours, theirs))


def check_state(optimizer, twin, theirs):
    state = optimizer.full_state_dict()["state"]
    for index, param in enumerate(theirs):
        for key, expected in twin.state[param].items():
            found = state[index][key]
            assert torch.equal(found, expected.cpu().to(found.dtype)), (index, key, found, expected)


def has_the_bits_of_torch(device):
    for dtype, maximize in ((F32, False), (F64, True), (torch.complex64, False)):
        ours, theirs, optimizer, twin = pair(device, dtype, maximize=maximize)
        for step in range(STEPS):
            give_gradients(step, ours, theirs)
            optimizer.step()
            twin.step()
            assert same(ours, theirs), (dtype, step)
        check_state(optimizer, twin, theirs)
        groups = optimizer.full_state_dict()["param_groups"]
        assert groups[0]["capturable"] is True and groups[0].keys() == twin.state_dict()["param_groups"][0].keys()


def has_the_bits_of_itself_without(device):
    """In low precision, where torch computes otherwise."""
    by_chance = {"master_weights": False, "stochastic_rounding": True}
    for dtype, options in ((BF16, {}), (F16, {}), (BF16, {"master_weights": False}), (BF16, by_chance)):
        models = parameters(device, dtype), parameters(device, dtype)
        optimizers = [
            ShardedASGD(params, **OPTIONS, **options, capturable=capturable)
            for params, capturable in zip(models, (True, False), strict=True)
        ]
        for step in range(STEPS):
            give_gradients(step, *models)
            for optimizer in optimizers:
                optimizer.step()
            assert same(*models), (dtype, options, step)


def follows_the_lr(device):
    """A number, a tensor on the host and one on the device, changed in place as schedulers do."""
    for lr in (0.1, torch.tensor(0.1), torch.tensor(0.1, device=device)):
        ours, theirs, optimizer, twin = pair(device, lr=lr)
        rates = torch.linspace(0.5, 0.1, STEPS).tolist()  # numbers of fp32; the first one is that of the first step
        for step, rate in enumerate(rates):
            for group in optimizer.param_groups:
                group["lr"] = lr.fill_(rate) if isinstance(lr, torch.Tensor) else rate
            twin.param_groups[0]["lr"] = rate
            give_gradients(step, ours, theirs)
            optimizer.step()
            twin.step()
            assert same(ours, theirs), (lr, step)
        assert optimizer.state[ours[0]]["eta"] == twin.state[theirs[0]]["eta"].cpu()


def skips_what_has_no_gradient(device):
    ours, theirs, optimizer, twin = pair(device)
    for step in range(STEPS):
        give_gradients(step, ours, theirs)
        for without in {2: [1], 3: [0, 1], 6: [3]}.get(step, []):
            ours[without].grad = theirs[without].grad = None
        optimizer.step()
        twin.step()
        assert same(ours, theirs), step
    assert [int(twin.state[param]["step"]) for param in theirs] == [8, 7, 9, 8]
    check_state(optimizer, twin, theirs)


def takes_what_gradscaler_knows(device):
    """Unscales in the update, and takes no step, nor counts one, where there is an inf; all of it on the device."""
    for clips in (False, True):
        ours, theirs, optimizer, twin = pair(device)
        scalers = [torch.amp.GradScaler(device, init_scale=16.0, growth_interval=2) for _ in "ab"]
        for step in range(STEPS):
            scale = scalers[0].scale(torch.ones((), device=device)).item()
            scalers[1].scale(torch.ones((), device=device))
            give_gradients(step, ours, theirs, scale=scale)
            if step in (0, 2, 6):
                ours[1].grad[7] = theirs[1].grad[7] = float("inf")
            if clips:
                for scaler, own in zip(scalers, (optimizer, twin), strict=True):
                    scaler.unscale_(own)
                optimizer.clip_grad_norm_(1.0)
                torch.nn.utils.clip_grad_norm_(theirs, 1.0)
            for scaler, own in zip(scalers, (optimizer, twin), strict=True):
                scaler.step(own)
                scaler.update()
            assert same(ours, theirs), (clips, step)
            assert scalers[0].get_scale() == scalers[1].get_scale()
        assert int(twin.state[theirs[0]]["step"]) == STEPS - 3
        check_state(optimizer, twin, theirs)


def loads_and_is_loaded(device):
    """torch's state dicts of either kind, and back; the memory that a captured graph has stays where it is."""
    ours, theirs, optimizer, twin = pair(device, lr=torch.tensor(0.1, device=device))
    lr, average = optimizer.param_groups[0]["lr"], optimizer.state[ours[1]]["ax"]
    for step in range(6):
        give_gradients(step, theirs)
        twin.step()
    for says in (True, False):
        state = twin.state_dict()
        state["param_groups"][0]["capturable"] = says
        with torch.no_grad():
            for own, their in zip(ours, theirs, strict=True):
                own.copy_(their)
        optimizer.load_state_dict(state)
        assert optimizer.param_groups[0]["capturable"] is True
        assert optimizer.param_groups[0]["lr"] is lr and float(lr) == twin.param_groups[0]["lr"]
        assert optimizer.state[ours[1]]["ax"].data_ptr() == average.data_ptr()
        for step in range(6, 9):
            give_gradients(step, ours, theirs)
            optimizer.step()
            twin.step()
        assert same(ours, theirs)
        check_state(optimizer, twin, theirs)
    third = parameters(device)
    other = torch.optim.ASGD(third, foreach=False)
    other.load_state_dict(optimizer.full_state_dict())
    other.param_groups[0]["capturable"] = False
    with torch.no_grad():
        for own, their in zip(third, theirs, strict=True):
            own.copy_(their)
    for optimizer, params in ((other, third), (twin, theirs)):
        give_gradients(9, params)
        optimizer.step()
    assert same(third, theirs)
    assert all(torch.equal(other.state[a]["ax"], twin.state[b]["ax"]) for a, b in zip(third, theirs, strict=True))


def begins_again_with_an_empty_state(device):
    ours, _, optimizer, _ = pair(device)
    for step in range(6):
        give_gradients(step, ours)
        optimizer.step()
    empty = torch.optim.ASGD(parameters(device), **OPTIONS).state_dict()
    optimizer.load_state_dict(empty)
    state = optimizer.state_dict()["state"]
    assert all(torch.equal(state[index]["ax"], param.detach()) for index, param in enumerate(ours))
    assert not any(entry["step"] for entry in state.values())


def swaps_averages_in(device):
    ours, theirs, optimizer, twin = pair(device)
    for step in range(STEPS):
        if step == 4:
            optimizer.start_averaging()
            twin.param_groups[0]["t0"] = 4.0
        give_gradients(step, ours, theirs)
        optimizer.step()
        twin.step()
        averages = theirs if step < 6 else [twin.state[param]["ax"] for param in theirs]
        with optimizer.averaged_parameters():
            assert same(ours, averages), step
        assert same(ours, theirs), step


def forgets_averages(device):
    ours, theirs, optimizer, twin = pair(device)
    for step in range(STEPS):
        if step == 6:
            average = optimizer.state[ours[1]]["ax"]
            optimizer.restart_averaging()
            twin.param_groups[0]["t0"] = 6.0
            state = optimizer.state_dict()["state"]
            assert all(torch.equal(state[index]["ax"], param.detach()) for index, param in enumerate(ours))
            assert (
                all(entry["mu"] == 1 for entry in state.values())
                and average.data_ptr() == optimizer.state[ours[1]]["ax"].data_ptr()
            )
        give_gradients(step, ours, theirs)
        optimizer.step()
        twin.step()
        averages = theirs if step == 6 else [twin.state[param]["ax"] for param in theirs]
        with optimizer.averaged_parameters():
            assert step < 6 or same(ours, averages), step
        assert same(ours, theirs), step


def on_ranks(rank, device):
    """DTensors, one of them on every rank alike: nothing is exchanged in a step."""
    world_size = torch.distributed.get_world_size()
    mesh = init_device_mesh(device, (world_size,))
    theirs = parameters(device, shapes=[(7, 300), (9,)])
    placements = [[Shard(0)], [Replicate()]]
    pairs = list(zip(theirs, placements, strict=True))
    ours = [torch.nn.Parameter(distribute_tensor(p.detach().clone(), mesh, where)) for p, where in pairs]
    optimizer = ShardedASGD(ours, **OPTIONS, capturable=True)
    twin = torch.optim.ASGD(theirs, **OPTIONS, foreach=False)
    for step in range(6):
        give_gradients(step, theirs)
        for own, (their, where) in zip(ours, pairs, strict=True):
            own.grad = distribute_tensor(their.grad, mesh, where)
        optimizer.step()
        twin.step()
        whole = [own.detach().full_tensor() for own in ours]
        assert same(whole, theirs), step
    full = optimizer.full_state_dict()
    for index, param in enumerate(theirs if rank == 0 else []):
        assert torch.equal(full["state"][index]["ax"], twin.state[param]["ax"].cpu())


def works_on_dtensors(device):
    run_ranks(1 if device == "cuda" else 2, on_ranks, device)


CASES = (
    has_the_bits_of_torch,
    has_the_bits_of_itself_without,
    follows_the_lr,
    skips_what_has_no_gradient,
    takes_what_gradscaler_knows,
    loads_and_is_loaded,
    begins_again_with_an_empty_state,
    swaps_averages_in,
    forgets_averages,
    works_on_dtensors,
)
