"""Parameters that never take a step have no state, as in torch: in no state dict, in no checkpoint, in no memory."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from dist_asgd import Checkpointer, ShardedASGD
from tests.support.fsdp1 import build as build_fsdp1
from tests.support.fsdp1 import train as train_fsdp1
from tests.support.layouts import Model, build, named_parameters, options_of, place, whole
from tests.support.memory import reachable
from tests.support.oracle import check_dense_state, same_bits
from tests.support.ranks import run_alone, run_ranks

OPTIONS: dict[str, Any] = {"lr": 0.05, "lambd": 1e-3, "t0": 2, "weight_decay": 0.01}
UNUSED = "blocks.0.norm.bias"


def freeze(model: nn.Module) -> None:
    """The first block, but for its norm; the other parameters lie on both sides of it."""
    for name, param in model.named_parameters():
        param.requires_grad_(not name.startswith(("blocks.0.up", "blocks.0.down")))


def make(layout: str, seed: int = 0, **options: Any) -> tuple[nn.Module, ShardedASGD]:
    plain = Model(seed)
    freeze(plain)
    model = place(layout, plain)
    more = {"find_unused_parameters": True, **OPTIONS, **options}
    return model, ShardedASGD(list(named_parameters(model).items()), **options_of(layout, model), **more)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for name, param in named_parameters(model).items():
            grad = torch.randint(-8, 9, param.shape, generator=generator) / 8
            if param.requires_grad and name != UNUSED:
                if isinstance(param, dist.tensor.DTensor):
                    grad = dist.tensor.distribute_tensor(grad, param.device_mesh, param.placements, src_data_rank=None)
                param.grad = grad
        optimizer.step()
        optimizer.zero_grad()


def reference(steps: int, unfrozen_at: int) -> tuple[Model, torch.optim.ASGD]:
    model = Model()
    freeze(model)
    optimizer = torch.optim.ASGD(model.parameters(), foreach=False, **OPTIONS)
    train(model, optimizer, range(min(steps, unfrozen_at)))
    model.requires_grad_(True)
    train(model, optimizer, range(unfrozen_at, steps))
    return model, optimizer


def check(model: nn.Module, optimizer: ShardedASGD, expected: tuple[Model, torch.optim.ASGD], where: object) -> None:
    """Parameters and state, and which parameters have one: in memory, in both state dicts and by name."""
    twin, oracle = expected
    twins = dict(twin.named_parameters())
    for name, param in named_parameters(model).items():
        assert same_bits(whole(param), twins[name]), (where, name)
        assert (param in optimizer.state) == (twins[name] in oracle.state) == bool(optimizer.state[param]), (
            where,
            name,
        )
    ids = set(oracle.state_dict()["state"])
    assert set(optimizer.state_dict()["state"]) == ids and len(optimizer.state) == len(ids), where
    full = optimizer.full_state_dict()
    if full:
        assert set(full["state"]) == ids, where
        check_dense_state(full, oracle, where)


@pytest.mark.parametrize(("layout", "world_size"), [("zero", 1), ("zero", 3), ("fsdp", 2), ("hsdp", 4)])
def test_state_begins_with_the_first_gradient_as_in_torch(layout: str, world_size: int, tmp_path: Path) -> None:
    """Some are frozen until step 8, one is without a gradient for ever; saved and loaded meanwhile."""

    def ranks(rank: int) -> None:
        before, at_end = reference(6, 8), reference(14, 8)
        model, optimizer = make(layout)
        assert set(optimizer.state) == {p for p in named_parameters(model).values() if p.requires_grad}
        train(model, optimizer, range(6))
        check(model, optimizer, before, "trained")
        with optimizer.averaged_parameters():
            frozen = named_parameters(model)["blocks.0.up.weight"]
            assert same_bits(whole(frozen), before[0].blocks[0].up.weight)
        checkpointer = Checkpointer(tmp_path / "run")
        checkpointer.save(6, {"model": model, "optimizer": optimizer})
        saved = copy.deepcopy(optimizer.state_dict())
        again, loaded = make(layout, seed=9)
        checkpointer.load({"model": again, "optimizer": loaded})
        check(again, loaded, before, "Checkpointer")
        loaded.load_state_dict(saved)
        check(again, loaded, before, "state_dict")
        for one, its in ((model, optimizer), (again, loaded)):
            train(one, its, range(6, 8))
            for param in named_parameters(one).values():
                param.requires_grad_(True)
            train(one, its, range(8, 14))
            check(one, its, at_end, "unfrozen")
        checkpointer.save(14, {"model": again, "optimizer": loaded})
        third, fresh = make(layout, seed=8)
        checkpointer.load({"model": third, "optimizer": fresh})
        check(third, fresh, at_end, "with the state of parameters that are frozen now")
        checkpointer.close()

    run_ranks(world_size, ranks, timeout=90)


def test_a_stock_checkpoint_with_state_of_frozen_parameters_loads_without_it(tmp_path: Path) -> None:
    def ranks(rank: int) -> None:
        model, optimizer = build("zero", **OPTIONS)  # nothing is frozen
        for step in range(6):
            for param in model.parameters():
                param.grad = torch.full_like(param, step / 8)
            optimizer.step()
            optimizer.zero_grad()
        dcp.save({"optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=tmp_path / "all")
        other, fresh = make("zero", seed=9)
        state = {"optimizer": get_optimizer_state_dict(other, fresh)}
        assert set(state["optimizer"]["state"]) == {n for n, p in other.named_parameters() if p.requires_grad}
        assert not any(bucket_step(fresh, param) for param in other.parameters()), "torch has run a fake step"
        dcp.load(state, checkpoint_id=tmp_path / "all")
        set_optimizer_state_dict(other, fresh, state["optimizer"])
        by_name, ours = optimizer.full_state_dict(), fresh.full_state_dict()
        for index, (name, param) in enumerate(other.named_parameters() if rank == 0 else []):
            assert (index in ours["state"]) == param.requires_grad, name
            if param.requires_grad:
                assert same_bits(ours["state"][index]["ax"], by_name["state"][index]["ax"]), name

    run_ranks(2, ranks)


def bucket_step(optimizer: ShardedASGD, param: Tensor) -> int:
    return int(optimizer.state[param].get("step", 0))


def test_frozen_slices_of_fsdp1_have_no_state() -> None:
    """As with ``torch.optim.ASGD``, on ranks too that have nothing of any slice."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    def ranks(rank: int) -> None:
        model, optimizer = build_fsdp1(t0=2)
        for param in model.blocks[0].parameters():
            param.requires_grad_(False)
        train_fsdp1(model, optimizer, range(6))
        named = FullyShardedDataParallel.optim_state_dict(model, optimizer)["state"]
        assert set(named) == {name for name, _ in Model().named_parameters() if not name.startswith("blocks.0")}
        full = optimizer.full_state_dict()
        names = list(dict(Model().named_parameters()))
        assert rank or {names[index] for index in full["state"]} == set(named)

    run_ranks(3, ranks)


class Adapted(nn.Module):
    """A frozen base with a small trained part beside each of its layers, in bf16 or fp32."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.base = nn.ModuleList(nn.Linear(128, 128, bias=False, dtype=dtype) for _ in range(4)).requires_grad_(False)
        self.low = nn.ModuleList(nn.Linear(128, 2, bias=False, dtype=dtype) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for base, low in zip(self.base, self.low, strict=True):
            x = base(x) + low(x).sum(1, keepdim=True)
        return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_rank_holds_state_of_the_trained_parameters_only(world_size: int, dtype: torch.dtype) -> None:
    def ranks(rank: int) -> tuple[int, int]:
        model = Adapted(dtype)
        optimizer = ShardedASGD(model.named_parameters(), lr=0.01, t0=1)
        for _ in range(5):
            model(torch.ones(2, 128, dtype=dtype)).float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        trained = sum(param.numel() for param in model.low.parameters())
        return reachable(optimizer, model), trained

    for held, trained in run_ranks(world_size, ranks) if world_size > 1 else [run_alone(ranks, 0)]:
        per_element = 4 if dtype == torch.float32 else 8  # ax, and masters
        assert held <= per_element * (trained // world_size + 64) + 1024
