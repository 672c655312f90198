"""An optimizer that was built before its model was moved, cast, wrapped or sharded equals one that was built after."""

import copy
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from dist_asgd import ShardedASGD
from tests.support.failures import one_message, quick_message
from tests.support.layouts import Model, batch, data_rank, local, named_parameters, place, whole
from tests.support.ranks import run_alone, run_ranks


@dataclass(frozen=True)
class Change:
    """What happens to a model after its optimizer was built."""

    apply: Callable[[nn.Module], nn.Module]  # returns the module to call
    layout: str = "zero"  # which ranks read which data
    gradients: str = "local"
    given: bool = False  # whether the optimizer is given the model
    replaces_groups: bool = False  # whether the new parameters are put into the param groups


def overwritten(model: nn.Module) -> nn.Module:
    """Cast with new Parameters in the place of the former ones."""
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        return model.double()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


def partly_cast(model: nn.Module) -> nn.Module:
    """Blocks in another dtype than the rest, so that hooks of some parameters still find their buckets."""
    model.blocks[0].double()
    model.blocks[0].register_forward_pre_hook(lambda _, args: (args[0].double(),))
    model.blocks[0].register_forward_hook(lambda _, args, y: y.to(model.outside.weight.dtype))
    return model


def under(layout: str) -> Callable[[nn.Module], nn.Module]:
    return lambda model: place(layout, model)


def fsdp1(model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # FSDP1 warns that it is superseded
        return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))


CHANGES = {
    "bf16": Change(lambda model: model.to(torch.bfloat16)),
    "bf16, model given": Change(lambda model: model.to(torch.bfloat16), given=True),
    "float64": Change(lambda model: model.to(torch.float64)),
    "a part": Change(partly_cast),
    "new parameters": Change(overwritten, given=True),
    "new parameters in the groups": Change(overwritten, replaces_groups=True),
    "ddp": Change(under("ddp"), "ddp", "reduced"),
    "ddp and bf16": Change(lambda model: place("ddp", model.bfloat16()), "ddp", "reduced"),
    "fsdp": Change(under("fsdp"), "fsdp", given=True),
    "fsdp, by groups": Change(under("fsdp"), "fsdp", replaces_groups=True),
    "bf16, then fsdp": Change(lambda model: place("fsdp", model.bfloat16()), "fsdp", given=True),
    "hsdp": Change(under("hsdp"), "hsdp", "reduced", given=True),
    "fsdp1": Change(fsdp1, "fsdp", given=True),
    "tp": Change(under("tp"), "tp", "reduced", given=True),
    "tp, by groups": Change(under("tp"), "tp", "reduced", replaces_groups=True),
}


def optimizer_of(model: nn.Module, change: Change, late: bool) -> ShardedASGD:
    """Builds an optimizer of all but the last layer; ``late`` adds that as a group."""
    named = list(named_parameters(model).items())
    first, last = [pair for pair in named if "outside" not in pair[0]], [pair for pair in named if "outside" in pair[0]]
    if not late:
        first, last = named, []
    optimizer = ShardedASGD(
        first, lr=0.1, t0=1, lambd=0.01, gradients=change.gradients, module=model if change.given else None
    )
    if last:
        optimizer.add_param_group({"params": last, "lr": 0.05})
    return optimizer


def replace_groups(optimizer: ShardedASGD, model: nn.Module) -> None:
    """What Accelerate does under FSDP2."""
    params = named_parameters(model)
    for group in optimizer.param_groups:
        group["params"] = [params[name] for name in group["param_names"]]


def run(model: nn.Module, optimizer: ShardedASGD, layout: str, scheduler: Any) -> list[torch.Tensor]:
    fsdp1 = isinstance(model, FullyShardedDataParallel)  # its full_state_dict() needs the wrapped model
    dtype = next(iter(named_parameters(model).values())).dtype
    for step in range(3):
        x, y = batch(step, *(data_rank(layout) if dist.is_initialized() else ()))
        (model(x.to(dtype)) - y.to(dtype)).square().mean().backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    optimizer.synchronize()
    state = optimizer.state_dict() if fsdp1 else optimizer.full_state_dict()
    values = [value for entry in state["state"].values() for value in entry.values()] if state else []
    return [*map(whole, model.parameters()), *map(local, values)]


def trained(change: Change, before: bool, state: Any = None, groups: int = 1) -> list[torch.Tensor]:
    """Parameters and state after a run in which the optimizer is built before the change, or after it."""
    model = called = Model()
    if not before:
        called = change.apply(model)
    optimizer = optimizer_of(model, change, late=groups > 1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 / (1 + n))
    if state is not None:
        optimizer.load_state_dict(copy.deepcopy(state))
    if before:
        called = change.apply(model)
        if change.replaces_groups:
            replace_groups(optimizer, model)
    return run(called, optimizer, change.layout, scheduler)


def saved_state(groups: int) -> dict[str, Any]:
    """The state of torch.optim.ASGD after some steps, with an average."""
    model = Model(seed=1)
    params = list(model.parameters())
    cut = len(params) - 2 if groups > 1 else len(params)
    lists = [params[:cut], params[cut:]][:groups]
    optimizer = torch.optim.ASGD([{"params": some} for some in lists], lr=0.1, t0=1, lambd=0.01)
    for step in range(4):
        x, y = batch(step)
        (model(x) - y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer.state_dict()


def require_same(change: Change, **kwargs: Any) -> None:
    ours, oracle = (trained(change, before, **kwargs) for before in (True, False))
    assert len(ours) == len(oracle)
    assert all(map(torch.equal, ours, oracle)), (change, kwargs.keys())


@pytest.mark.parametrize("names", [list(CHANGES)[:6], list(CHANGES)[6:]], ids=["casts", "layouts"])
def test_built_before_or_after_is_the_same(names: list[str]) -> None:
    def ranks(rank: int) -> None:
        for name in names:
            require_same(CHANGES[name], groups=2)

    run_ranks(2, ranks)


@pytest.mark.parametrize("world_size", [1, 2])
def test_state_that_was_loaded_before_the_change(world_size: int) -> None:
    def ranks(rank: int = 0) -> None:
        casts = ["float64", "a part", "new parameters in the groups"]
        for name in casts if world_size == 1 else ["bf16", "ddp", "hsdp", "tp"]:
            require_same(CHANGES[name], state=saved_state(2), groups=2)

    run_alone(ranks) if world_size == 1 else run_ranks(2, ranks)


def test_sharding_of_both_kinds() -> None:
    def ranks(rank: int) -> None:
        change = Change(under("fsdp+tp"), "fsdp+tp", "reduced", given=True)
        require_same(change, state=saved_state(1))

    run_ranks(4, ranks)


@pytest.mark.parametrize("gradients", ["local", "reduced"])
def test_a_process_group_that_is_initialized_later(gradients: str) -> None:
    folder = tempfile.mkdtemp()

    def ranks(rank: int) -> None:
        change = Change(under("ddp") if gradients == "reduced" else lambda model: model, "ddp", gradients)
        for number, kwargs in enumerate(({}, {"state": saved_state(1)})):
            oracle = trained(change, False, **kwargs)
            dist.destroy_process_group()

            def start(model: nn.Module, number: int = number) -> nn.Module:
                dist.init_process_group("gloo", f"file://{folder}/{number}", rank=rank, world_size=2)
                return change.apply(model)

            ours = trained(Change(start, "ddp", gradients), True, **kwargs)
            assert all(map(torch.equal, ours, oracle)), kwargs.keys()

    run_ranks(2, ranks)


def test_ranks_that_began_with_other_weights_are_told() -> None:
    """Their gradients are of different models, so copying rank 0's weights now would hide it."""
    folder = tempfile.mkdtemp()

    def ranks(rank: int) -> str:
        dist.destroy_process_group()
        model = Model(seed=rank)
        optimizer = ShardedASGD(model.named_parameters(), lr=0.1)
        dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
        x, y = batch(0)
        (model(x) - y).square().mean().backward()
        return quick_message(optimizer.step)

    one_message(run_ranks(2, ranks), "inside.weight", "rank 0", "rank 1", "gradients")


def test_what_accelerate_does_with_a_new_optimizer() -> None:
    """It takes the state dict and loads it again, between the change of the model and the first step."""

    def ranks(rank: int) -> None:
        for name, cuts in (("bf16", 25 * 2**20), ("float64", 512), ("fsdp", 512)):
            results = []
            for before in (True, False):
                model, change = Model(), CHANGES[name]
                called = model if before else change.apply(model)
                optimizer = ShardedASGD(model.named_parameters(), lr=0.1, t0=1, bucket_bytes=cuts, module=model)
                called = change.apply(model) if before else called
                optimizer.load_state_dict(optimizer.state_dict())
                assert optimizer.param_groups[0]["params"] == list(named_parameters(model).values())
                scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 / (1 + n))
                results.append(run(called, optimizer, change.layout, scheduler))
            assert all(map(torch.equal, *results)), name

    run_ranks(2, ranks)


@pytest.mark.parametrize("call", ["step", "clip", "full_state_dict", "restart", "swap", "add"])
def test_any_collective_call_takes_a_change_up(call: str) -> None:
    def ranks(rank: int) -> None:
        model = Model()
        named = list(model.named_parameters())
        optimizer = ShardedASGD(named[:-1], lr=0.1, find_unused_parameters=True)
        model.double()
        if call == "step":
            optimizer.step()
        elif call == "clip":
            optimizer.clip_grad_norm_(1.0)
        elif call == "full_state_dict":
            optimizer.full_state_dict()
        elif call == "restart":
            optimizer.restart_averaging()
        elif call == "swap":
            with optimizer.averaged_parameters():
                pass
        else:
            optimizer.add_param_group({"params": named[-1:]})
        assert optimizer.state[named[0][1]]["ax"].dtype == torch.float64
        assert all(param.dtype == torch.float64 for param in model.parameters())

    run_ranks(2, ranks)


def test_changes_that_cannot_be_taken_up() -> None:
    """Gradients that were reduced into the former buckets, and what comes after the first step."""

    def ranks(rank: int) -> str:
        model = Model()
        optimizer = ShardedASGD(model.named_parameters(), lr=0.1)
        x, y = batch(rank)
        (model(x) - y).square().mean().backward()
        model.inside.weight.data = torch.ones(10, 7, dtype=torch.float64)
        text = quick_message(optimizer.step, RuntimeError)
        assert "inside." in text and "zero_grad()" in text and "reduced before" in text
        optimizer.zero_grad()
        model.double()
        run(model, optimizer, "zero", torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1.0))
        model.float()
        return quick_message(optimizer.step, RuntimeError)

    one_message(run_ranks(2, ranks), "has become", "build it again")
