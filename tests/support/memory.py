"""Memory of a training process: reachable bytes are exact, resident bytes are the kernel's."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import types
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from dist_asgd import ShardedASGD
from tests.support import contestants

ITERATIONS = 3  # the peaks are the highest of these


MIB = 2**20


def measure(build: contestants.Build, parameters: float, width: int = contestants.WIDTH) -> dict[str, int]:
    """This rank's figures in bytes, for the training of a model of ``parameters`` that ``build`` makes.

    ``before_t0``, ``averaging``: reachable from the optimizer between two iterations. ``gradients``: reachable from it
    after backward, beyond that. ``rest``: resident between two iterations, parameters included, beyond a process that
    has trained and communicated but holds nothing. ``backward_peak`` and ``step_peak``: the highest growth above that.
    """
    map_large_blocks()
    gc.collect()
    gc.freeze()  # what was imported need not be looked through each time
    batch = contestants.make_batch(dist.get_rank(), width, rows=1)  # one: activations would count as well
    _touch_everything(build, contestants.make_model(parameters, width), batch)
    empty = resident()
    before = _reachable_when_trained(build, contestants.make_model(parameters, width), batch)
    model = contestants.make_model(parameters, width)
    count = sum(p.numel() for p in model.parameters())
    model, optimizer = build(model, 0.0)
    for _ in range(3):  # averaging starts with the second step
        contestants.iterate(model, optimizer, batch)
    _settle(optimizer)
    at_rest = reachable(optimizer, model)
    result = {"parameters": count, "before_t0": before, "averaging": at_rest}
    rest, peaks = resident() - empty, []
    for _ in range(ITERATIONS):
        peaks.append(_peaks(model, optimizer, batch))
        result["gradients"] = peaks[-1].pop("held") - at_rest
    result |= {key: max(one[key] for one in peaks) for key in peaks[0]}
    return result | {"rest": rest, "peak": rest + max(result["backward_peak"], result["step_peak"])}


def measure_swap(
    build: contestants.Build,
    parameters: float,
    width: int = contestants.WIDTH,
    *,
    averaged: bool = False,
    beside: bool = False,
) -> dict[str, int]:
    """What it takes to have the average in the model, in bytes of this rank.

    ``whole``, ``parameters``: of the model, and of the rank's part of it. ``average``: held all the time for it, by the
    optimizer; if ``averaged``, by ``AveragedModel``; if ``beside``, by ``ShardedAverages``. ``swap_peak``: the highest
    growth of resident memory while it is swapped in and out; without a forward.
    """
    map_large_blocks()
    batch = contestants.make_batch(dist.get_rank(), width, rows=1)
    model = contestants.make_model(parameters, width)
    whole = contestants.parameter_bytes(model)
    model, optimizer = build(model, 0.0)
    averages = contestants.averages_beside(model, optimizer) if beside else None
    for _ in range(3):  # averaging starts with the second step
        contestants.iterate(model, optimizer, batch)
    copied = AveragedModel(model.module) if averaged else None
    for _ in range(2):  # the first time, gloo allocates what it keeps
        _settle(optimizer)
        start = reset_peak()
        dist.barrier()
        if copied is None:
            with swapped(optimizer) if averages is None else averages.averaged_parameters():
                pass
        peak = peak_resident() - start
    own = sum(_local(param).nbytes for param in model.parameters())
    held = reachable(optimizer, model)
    if averages is not None:
        held = reachable([averages, optimizer], model) - held
    return {
        "whole": whole,
        "parameters": own,
        "average": contestants.parameter_bytes(copied) if copied else held,
        "swap_peak": peak,
    }


@contextlib.contextmanager
def swapped(optimizer: Optimizer) -> Iterator[None]:
    """The average in the parameters: by ours, or as one does it by hand with torch.optim.ASGD."""
    if isinstance(optimizer, ShardedASGD):
        with optimizer.averaged_parameters():
            yield
        return
    params = [param for group in optimizer.param_groups for param in group["params"]]
    with torch.no_grad():
        kept = [param.detach().clone() for param in params]
        for param in params:
            param.copy_(optimizer.state[param]["ax"])
        yield
        for param, own in zip(params, kept, strict=True):
            param.copy_(own)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, dist.tensor.DTensor) else tensor


def _touch_everything(build: contestants.Build, model: nn.Module, batch: Tensor) -> None:
    """Make torch, gloo and the contestant load and allocate what they keep for good: code, scratch memory."""
    contestants.backward(model, batch)
    model, optimizer = build(contestants.make_model(0, batch.shape[1]), 0.0)  # one block
    for _ in range(3):
        contestants.iterate(model, optimizer, batch)
    _settle(optimizer)


def _reachable_when_trained(build: contestants.Build, model: nn.Module, batch: Tensor) -> int:
    """What is reachable after two iterations, long before averaging starts."""
    model, optimizer = build(model, 1e6)
    for _ in range(2):
        contestants.iterate(model, optimizer, batch)
    _settle(optimizer)
    return reachable(optimizer, model)


def _peaks(model: nn.Module, optimizer: Optimizer, batch: Tensor) -> dict[str, int]:
    """One iteration: the growth of resident memory during backward and during step, and what is reachable between."""
    start = reset_peak()
    dist.barrier()
    contestants.backward(model, batch)
    backward_peak = peak_resident() - start
    held = reachable(optimizer, model)
    reset_peak()
    optimizer.step()
    _settle(optimizer)
    step_peak = peak_resident() - start
    optimizer.zero_grad()
    return {"backward_peak": backward_peak, "step_peak": step_peak, "held": held}


def _settle(optimizer: Optimizer) -> None:
    """Waits until nothing is under way on any rank: what communicates holds memory."""
    if isinstance(optimizer, ShardedASGD):
        optimizer.synchronize()
    dist.barrier()


def map_large_blocks() -> None:
    """Have glibc's malloc map blocks above 64 KiB one by one, so that freeing one makes resident memory smaller."""
    threshold = -3  # M_MMAP_THRESHOLD; setting it also stops glibc from moving it
    ctypes.CDLL(None).mallopt(threshold, 64 * 1024)


def resident() -> int:
    """Resident memory of this process now, in bytes, with what nobody uses given back first."""
    while gc.collect():  # what one round frees can make more garbage
        pass
    ctypes.CDLL(None).malloc_trim(0)
    return _status("VmRSS")


def reset_peak() -> int:
    """Start ``peak_resident`` anew, and return what is resident now."""
    now = resident()
    Path("/proc/self/clear_refs").write_text("5")
    return now


def peak_resident() -> int:
    """The highest resident memory since ``reset_peak``, in bytes."""
    return _status("VmHWM")


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


def reachable(optimizer: object, model: nn.Module) -> int:
    """Bytes of the different storages reachable from ``optimizer``, without those that hold the model's parameters.

    Gradients count, and whatever else hangs on a parameter or in a closure; the modules themselves are not entered.
    """
    parameters = {storage[0] for p in model.parameters() for storage in _storages(p.detach())}
    found = {storage for tensor in _tensors(optimizer) for storage in _storages(tensor)}
    return sum(size for address, size in found if address not in parameters)


def _storages(tensor: Tensor) -> Iterator[tuple[int, int]]:  # (address, bytes)
    if isinstance(tensor, dist.tensor.DTensor):
        tensor = tensor._local_tensor
    if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return  # a wrapper without a storage: its tensors are attributes, and found as those
    storage = tensor.untyped_storage()
    if storage.nbytes() and tensor.device.type != "meta":
        yield storage.data_ptr(), storage.nbytes()


def _tensors(root: object) -> Iterator[Tensor]:
    """Every tensor reachable from ``root``."""
    seen, waiting = set[int](), [root]
    keep = []  # keeps temporary objects alive, so that no id is used twice
    while waiting:
        one = waiting.pop()
        if id(one) in seen or isinstance(one, (type, types.ModuleType, types.FrameType, nn.Module)):
            continue
        seen.add(id(one))
        keep.append(one)
        if isinstance(one, Tensor):
            yield one
            waiting += [one.__dict__, one.grad if one.is_leaf else None]
        elif isinstance(one, types.FunctionType):  # not its __globals__, which are everybody's
            waiting += [one.__closure__, one.__defaults__, one.__kwdefaults__, one.__dict__]
        else:
            waiting += gc.get_referents(one)
