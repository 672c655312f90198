"""FullyShardedDataParallel(use_orig_params=True): parameters that are slices, recognised by PyTorch's mark on them."""

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
)

from dist_asgd import ShardedASGD
from tests.support.failures import one_message, quick_message
from tests.support.fsdp1 import CONFIGS, OPTIONS, backward, build, train, wrap
from tests.support.layouts import Model, batch
from tests.support.oracle import check_dense_state, same_bits
from tests.support.ranks import run_ranks


def build_torch(strategy: str = "FULL_SHARD") -> tuple[FullyShardedDataParallel, torch.optim.ASGD]:
    model = wrap(Model(), strategy)
    return model, torch.optim.ASGD(model.parameters(), foreach=False, **OPTIONS)


def states(
    model: nn.Module, optimizer: torch.optim.Optimizer, kind: str = "full"
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with FullyShardedDataParallel.state_dict_type(model, *CONFIGS[kind]):
        return model.state_dict(), FullyShardedDataParallel.optim_state_dict(model, optimizer)


def check_same(
    ours: tuple[dict[str, Tensor], dict[str, Any]], theirs: tuple[dict[str, Tensor], dict[str, Any]]
) -> None:
    assert all(same_bits(ours[0][name], value) for name, value in theirs[0].items())
    assert ours[1]["state"].keys() == theirs[1]["state"].keys()
    for name, entry in theirs[1]["state"].items():
        for key, value in entry.items():
            assert same_bits(ours[1]["state"][name][key], value), (name, key)


@pytest.mark.parametrize(
    ("gradients", "world_size", "strategy"),
    [
        ("sharded", 1, "FULL_SHARD"),
        ("sharded", 2, "SHARD_GRAD_OP"),
        ("sharded", 3, "FULL_SHARD"),
        ("sharded", 4, "SHARD_GRAD_OP"),
        ("local", 2, "FULL_SHARD"),
        ("local", 3, "SHARD_GRAD_OP"),
    ],
)
def test_training_and_optim_state_dict_have_the_bits_of_torch(gradients: str, world_size: int, strategy: str) -> None:
    """On 4 ranks, some have nothing of most parameters."""

    def ranks(rank: int) -> int:
        model, optimizer = build(strategy, gradients=gradients)
        twin, oracle = build_torch(strategy)
        train(model, optimizer, range(12))
        train(twin, oracle, range(12))
        check_same(states(model, optimizer), states(twin, oracle))
        with torch.no_grad():
            model(batch(0)[0])  # leaves the parameters of the outermost module whole
        full, expected = optimizer.full_state_dict(), states(twin, oracle)[1]["state"]
        assert bool(full) == (rank == 0)
        for index, name in enumerate(dict(Model().named_parameters()) if full else []):
            assert same_bits(full["state"][index]["ax"], expected[name]["ax"]), name
        return sum(state["ax"].numel() for state in optimizer.state.values())

    owned = run_ranks(world_size, ranks)
    assert sum(owned) == sum(p.numel() for p in Model().parameters())
    assert max(owned) - min(owned) <= 3 * 8, "FSDP aligns and pads the parameters of each of the three modules"


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("world_size", [2, 3])
def test_optim_state_dict_round_trips(world_size: int, kind: str) -> None:
    def ranks(rank: int) -> None:
        model, optimizer = build()
        train(model, optimizer, range(8))
        weights, state = states(model, optimizer, kind)
        fresh, loaded = build(seed=99)
        with FullyShardedDataParallel.state_dict_type(fresh, *CONFIGS[kind]):
            fresh.load_state_dict(weights)
            loaded.load_state_dict(FullyShardedDataParallel.optim_state_dict_to_load(fresh, loaded, state))
        train(fresh, loaded, range(8, 14))
        twin, oracle = build_torch()
        train(twin, oracle, range(14))
        check_same(states(fresh, loaded), states(twin, oracle))

    run_ranks(world_size, ranks)


def test_state_moves_between_fsdp1_and_one_process() -> None:
    def ranks(rank: int) -> None:
        model, optimizer = build()
        train(model, optimizer, range(8))
        wanted = StateDictOptions(full_state_dict=True)
        weights = get_model_state_dict(model, options=wanted)
        state = get_optimizer_state_dict(model, optimizer, options=wanted)
        dense = Model(99)
        dense.load_state_dict(weights)
        one = torch.optim.ASGD(dense.named_parameters(), foreach=False, **OPTIONS)
        set_optimizer_state_dict(dense, one, state, options=wanted)
        full = optimizer.full_state_dict()
        if rank == 0:
            check_dense_state(full, one)
        fresh, loaded = build(seed=98)
        set_model_state_dict(fresh, weights, options=wanted)
        set_optimizer_state_dict(fresh, loaded, get_optimizer_state_dict(dense, one, options=wanted), options=wanted)
        train(fresh, loaded, range(8, 12))
        train(model, optimizer, range(8, 12))
        check_same(states(fresh, loaded), states(model, optimizer))

    run_ranks(2, ranks)


def in_two_groups(model: nn.Module) -> list[dict[str, Any]]:
    *most, last = model.named_parameters()
    return [{"params": most}, {"params": [last], "lr": 0.03}]


def test_a_fresh_run_resumes_before_its_first_forward() -> None:
    """From every form of the state, also on ranks that have nothing of the second group."""

    def ranks(rank: int) -> None:
        twin, model, alone = wrap(Model()), wrap(Model()), Model()
        oracle = torch.optim.ASGD(in_two_groups(twin), foreach=False, **OPTIONS)
        torchs = torch.optim.ASGD(in_two_groups(alone), foreach=False, **OPTIONS)
        optimizer = ShardedASGD(in_two_groups(model), module=model, **OPTIONS)
        train(model, optimizer, range(8))
        train(twin, oracle, range(8))
        full: list[Any] = [optimizer.full_state_dict()]
        dist.broadcast_object_list(full, src=0)
        torchs.load_state_dict(copy.deepcopy(full[0]))
        weights, named = states(model, optimizer)
        at_save = states(twin, oracle)
        for group in oracle.param_groups:
            group["t0"] = 8.0
        train(twin, oracle, range(8, 14))
        for form, saved in {"dense": full[0], "torch's": torchs.state_dict(), "ours": optimizer.state_dict()}.items():
            resume(weights, saved, at_save, states(twin, oracle), form)
        resume(weights, named, at_save, states(twin, oracle), "optim_state_dict")

    run_ranks(3, ranks)


def resume(weights: Any, saved: Any, at_save: Any, at_end: Any, form: str) -> None:
    alone = Model()
    alone.load_state_dict(weights)
    model = wrap(alone)
    optimizer = ShardedASGD(in_two_groups(model), module=model, **OPTIONS)
    assert not any(entry["step"] for entry in optimizer.state_dict()["state"].values())
    assert not optimizer.full_state_dict().get("state")
    if form == "optim_state_dict":
        saved = FullyShardedDataParallel.optim_state_dict_to_load(model, optimizer, saved)
    optimizer.load_state_dict(saved)
    with optimizer.averaged_parameters():
        pass
    check_same(states(model, optimizer), at_save)
    optimizer.start_averaging()
    assert [group["t0"] for group in optimizer.param_groups] == [8.0, 8.0], form
    train(model, optimizer, range(8, 14))
    optimizer.clip_grad_norm_(1e9)  # compares what steps the ranks have taken
    check_same(states(model, optimizer), at_end)


def test_whole_state_of_other_memory_orders_is_cut_as_fsdp1_cuts_the_parameter() -> None:
    def ranks(rank: int) -> None:
        plain = nn.Conv2d(3, 2, 3).to(memory_format=torch.channels_last)
        model = FullyShardedDataParallel(plain, use_orig_params=True, device_id=torch.device("cpu"))
        optimizer = ShardedASGD(model.named_parameters(), module=model, lr=0.1, t0=0)
        for _ in range(4):
            model(torch.randn(2, 3, 4, 4)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        full: list[Any] = [optimizer.full_state_dict()]
        dist.broadcast_object_list(full, src=0)
        before = copy.deepcopy(optimizer.state_dict())
        optimizer.load_state_dict(full[0])
        for index, entry in optimizer.state_dict()["state"].items():
            assert same_bits(entry["ax"], before["state"][index]["ax"]), index

    run_ranks(2, ranks)


def test_slices_named_in_another_order_are_refused() -> None:
    def ranks(rank: int) -> str:
        model, optimizer = build()
        train(model, optimizer, range(2))
        other = wrap(Model())
        reordered = ShardedASGD(list(other.named_parameters())[::-1], module=other, **OPTIONS)
        return quick_message(lambda: reordered.load_state_dict(optimizer.state_dict()))

    one_message(run_ranks(2, ranks), "another order", "param_names")


def test_averaging_starts_at_the_steps_of_parameters_that_other_ranks_have() -> None:
    """An empty slice counts every step, also those without a gradient of its parameter."""

    def ranks(rank: int) -> None:
        plain = wrap(Model())
        *most, last = plain.named_parameters()
        optimizer = ShardedASGD([{"params": most}, {"params": [last]}], module=plain, **OPTIONS)
        for step in range(6):
            backward(plain, step)
            if step % 2:
                last[1].grad = None
            optimizer.step()
            optimizer.zero_grad()
        optimizer.start_averaging()
        assert [group["t0"] for group in optimizer.param_groups] == [6.0, 3.0]
        with optimizer.averaged_parameters():
            pass

    run_ranks(3, ranks)


def test_whole_state_without_module_says_what_to_pass() -> None:
    def ranks(rank: int) -> str:
        model, optimizer = build()
        train(model, optimizer, range(2))
        saved: list[Any] = [optimizer.full_state_dict()]
        dist.broadcast_object_list(saved, src=0)
        _, other = build(module=None)
        return quick_message(lambda: other.load_state_dict(saved[0]))

    one_message(run_ranks(2, ranks), "module=")


def test_clipping_counts_each_element_once() -> None:
    def ranks(rank: int) -> None:
        model, optimizer = build()
        twin, _ = build_torch()
        train(model, optimizer, range(2))
        twin.load_state_dict(model.state_dict())
        backward(model, 5)
        backward(twin, 5)
        expected = twin.clip_grad_norm_(0.1)
        assert torch.allclose(optimizer.clip_grad_norm_(0.1), expected, rtol=1e-6)
        for param, other in zip(model.parameters(), twin.parameters(), strict=True):
            assert param.grad is None or torch.allclose(param.grad, other.grad, rtol=1e-5)

    run_ranks(3, ranks)


@pytest.mark.parametrize("strategy", ["FULL_SHARD", "SHARD_GRAD_OP"])
def test_forward_computes_with_averages_inside_the_block_and_with_the_parameters_after_it(strategy: str) -> None:
    @torch.no_grad()
    def evaluate(model: nn.Module) -> Tensor:
        return model(batch(99)[0])

    def ranks(rank: int) -> None:
        model, optimizer = build(strategy)
        train(model, optimizer, range(10))
        averages: list[Any] = [optimizer.full_state_dict()]
        dist.broadcast_object_list(averages, src=0)
        expected = Model()
        names = list(dict(expected.named_parameters()))
        expected.load_state_dict({name: averages[0]["state"][i]["ax"] for i, name in enumerate(names)})
        before = evaluate(model)
        with optimizer.averaged_parameters():
            inside = evaluate(model)
        assert torch.equal(inside, evaluate(expected)) and not torch.equal(inside, before)
        assert torch.equal(evaluate(model), before)
        train(model, optimizer, range(10, 14))
        twin, oracle = build_torch(strategy)
        train(twin, oracle, range(14))
        check_same(states(model, optimizer), states(twin, oracle))

    run_ranks(2, ranks)


def test_accumulation_and_no_sync() -> None:
    def ranks(rank: int) -> None:
        model, optimizer = build()
        twin, oracle = build_torch()
        for step in range(8):
            with optimizer.no_sync():
                backward(model, 100 + step)
            with twin.no_sync():
                backward(twin, 100 + step)
            train(model, optimizer, range(step, step + 1))
            train(twin, oracle, range(step, step + 1))
        check_same(states(model, optimizer), states(twin, oracle))

    run_ranks(2, ranks)


def test_ignored_modules_and_frozen_slices_beside_others() -> None:
    """What FSDP leaves alone is reduced here; empty slices have no say in which parameters take the step."""

    def ranks(rank: int) -> None:
        plain = Model()
        plain.inside.requires_grad_(False)
        options = {"use_orig_params": True, "device_id": torch.device("cpu")}
        model = FullyShardedDataParallel(plain, ignored_modules=[plain.outside], **options)
        optimizer = ShardedASGD(model.named_parameters(), find_unused_parameters=True, module=model, **OPTIONS)
        twin = Model()
        twin.inside.requires_grad_(False)
        oracle = torch.optim.ASGD([p for p in twin.parameters() if p.requires_grad], foreach=False, **OPTIONS)
        for step in range(8):
            backward(model, step)
            optimizer.step()
            optimizer.zero_grad()
            x, y = batch(step)
            (twin(x) - y).square().mean().backward()
            oracle.step()
            oracle.zero_grad()
        optimizer.synchronize()
        with FullyShardedDataParallel.summon_full_params(model):
            for param, other in zip(model.parameters(), twin.parameters(), strict=True):
                assert torch.allclose(param, other, atol=1e-6)

    run_ranks(2, ranks)


def test_slices_of_the_user_that_happen_to_be_equal() -> None:
    def ranks(rank: int) -> float:
        param = nn.Parameter(torch.ones(4))
        optimizer = ShardedASGD([param], gradients="sharded", lr=0.5, lambd=0)
        param.grad = torch.ones(4)
        norm = optimizer.clip_grad_norm_(1e9).item()
        optimizer.step()
        assert torch.equal(param, torch.full((4,), 0.5))
        return norm

    assert run_ranks(2, ranks) == [pytest.approx(8**0.5)] * 2


# What users get wrong


def test_without_module_averages_and_full_state_dicts_say_what_to_do() -> None:
    def ranks(rank: int) -> tuple[str, str]:
        model, optimizer = build(module=None)
        train(model, optimizer, range(8))

        def swap() -> None:
            with optimizer.averaged_parameters():
                pass

        return quick_message(swap), quick_message(optimizer.full_state_dict)

    for texts in zip(*run_ranks(2, ranks), strict=True):
        one_message(list(texts), "module=")


@pytest.mark.parametrize(("strategy", "advice"), [("NO_SHARD", "DistributedDataParallel")])
def test_slices_that_are_none(strategy: str, advice: str) -> None:
    def ranks(rank: int) -> str:
        model, optimizer = build(strategy)
        return quick_message(lambda: train(model, optimizer, range(1)))

    one_message(run_ranks(2, ranks), "same gradient", advice, "HYBRID_SHARD")


def test_parameters_that_are_whole_when_the_state_is_asked_for() -> None:
    def ranks(rank: int) -> str:
        model, optimizer = build(module=None)
        train(model, optimizer, range(8))
        with FullyShardedDataParallel.summon_full_params(model):
            return quick_message(optimizer.state_dict)

    assert all("summon_full_params" in text for text in run_ranks(2, ranks))
