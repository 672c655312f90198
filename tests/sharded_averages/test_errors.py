"""Bad input to `ShardedAverages`: a named error on every rank, with nothing changed, and no hang."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from dist_asgd import EMA, Checkpointer, ShardedAverages, Uniform
from dist_asgd.checkpoint import CheckpointError
from tests.support.layouts import Model, backward
from tests.support.ranks import run_alone, run_ranks


def error_of(call):
    try:
        call()
    except Exception as error:
        return type(error), str(error)
    return None


def same_error(call):
    """The error of `call`, which every rank must raise alike."""
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, error_of(call))
    assert found[0] is not None and found.count(found[0]) == len(found), found
    return found[0]


def arguments(rank):
    model = Model()
    named = list(model.named_parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    frozen = Model().requires_grad_(False)
    cases = [
        (lambda: ShardedAverages([], EMA(0.9)), ValueError, "no parameter to average"),
        (lambda: ShardedAverages(frozen.named_parameters(), EMA(0.9)), ValueError, "all of params are frozen"),
        (lambda: ShardedAverages(named, None), TypeError, "must be an average"),
        (lambda: ShardedAverages(named, {}), ValueError, "empty mapping"),
        (lambda: ShardedAverages(named, {"progress": Uniform()}), ValueError, "cannot have the name"),
        (lambda: ShardedAverages(named, 0.9), TypeError, "average must be"),
        (lambda: ShardedAverages(model.parameters(), Uniform()), ValueError, "has no name"),
        (lambda: ShardedAverages(named, Uniform(), start=-1), ValueError, "start must be"),
        (lambda: ShardedAverages(named, Uniform(), start=1.5), ValueError, "start must be"),
        (lambda: ShardedAverages(named, Uniform(), start=math.nan), ValueError, "start must be"),
        (lambda: ShardedAverages(named, Uniform(), average_dtype=torch.int8), TypeError, "average_dtype must be"),
        (lambda: ShardedAverages(named, Uniform(), optimizer=model), TypeError, "optimizer must be"),
        (lambda: ShardedAverages(named, Uniform(), verify_every=0), ValueError, "verify_every must be > 0"),
        (lambda: ShardedAverages(named, Uniform(), verify_every=1.5), TypeError, "verify_every must be an int"),
        (lambda: ShardedAverages(named, Uniform(), verify_every=1, shard_replicas=False), ValueError, "verify_every"),
        (lambda: ShardedAverages(named, Uniform(), optimizer=[optimizer] * 2), ValueError, "twice"),
        (lambda: ShardedAverages(named, Uniform(), module=Model()), ValueError, "not the one that module="),
        (lambda: ShardedAverages([("w", torch.zeros(3, dtype=torch.int8))], Uniform()), ValueError, "floating-point"),
        (lambda: ShardedAverages(named, Uniform() if rank else EMA(0.9)), ValueError, "disagree"),
        (lambda: ShardedAverages(named[rank:], Uniform()), ValueError, "disagree"),
    ]
    for call, kind, text in cases:
        found = same_error(call)
        assert found[0] is kind and text in found[1], (found, text)


def test_arguments():
    run_ranks(2, arguments)


def different_parameters(rank):
    params = {"same": nn.Parameter(torch.ones(4)), "other": nn.Parameter(torch.full((3,), float(rank)))}
    kind, text = same_error(lambda: ShardedAverages(params.items(), Uniform()))
    assert kind is RuntimeError and "'other'" in text and "'same'" not in text
    own = ShardedAverages(params.items(), Uniform(), shard_replicas=False)
    own.update()
    with own.averaged_parameters():
        assert params["other"][0] == rank
    with torch.no_grad():
        params["other"].zero_()
    averages = ShardedAverages(params.items(), Uniform())
    with torch.no_grad():
        params["same"].add_(rank)
    averages.update()
    for call in (lambda: swap(averages), averages.full_state_dict, lambda: averages.copy_to(nn.Linear(1, 1))):
        kind, text = same_error(call)
        assert kind is RuntimeError and "'same'" in text
    assert params["same"][0] == 1 + rank


def swap(averages, name=None):
    with averages.averaged_parameters(name):
        pass


def test_parameters_that_ranks_hold_differently():
    run_ranks(2, different_parameters)


def different_updates(rank, folder):
    model = Model()
    averages = ShardedAverages(model.named_parameters(), {"a": Uniform(), "b": EMA(0.5)})
    averages.update()
    kind, text = same_error(lambda: swap(averages, "c"))
    assert kind is ValueError and "no average 'c'" in text
    kind, text = same_error(lambda: swap(averages, "a" if rank else "b"))
    assert kind is ValueError and "disagree" in text
    if rank:
        averages.update()
    kind, text = same_error(lambda: swap(averages))
    assert kind is ValueError and "updates of optimizer 0" in text
    with Checkpointer(folder) as checkpoints:
        kind, text = same_error(lambda: checkpoints.save(1, {"averages": averages}))
    assert kind is CheckpointError and "different steps" in text


def test_ranks_that_update_differently(tmp_path):
    run_ranks(2, different_updates, tmp_path)


def loads(rank, folder):
    model = Model()
    averages = ShardedAverages(model.named_parameters(), {"a": Uniform(), "b": EMA(0.5)})
    averages.update()
    state, before = averages.state_dict(), averages.full_state_dict()
    more = nn.Sequential(Model(), Model(1))
    cases = [
        (ShardedAverages(model.named_parameters(), Uniform()), "build ShardedAverages with those"),
        (
            ShardedAverages(model.named_parameters(), {"a": Uniform(), "c": EMA(0.5)}),
            "build ShardedAverages with those",
        ),
        (ShardedAverages(more.named_parameters(), {"a": Uniform(), "b": EMA(0.5)}), "has no"),
        (ShardedAverages(Model(width=12).named_parameters(), {"a": Uniform(), "b": EMA(0.5)}), "shape"),
    ]
    for other, text in cases:
        kind, found = same_error(lambda other=other: other.load_state_dict(state))
        assert kind is ValueError and text in found, found
        assert other.updates == 0
    for bad in ({}, {"a": {}}, 3):
        kind, _ = same_error(lambda bad=bad: averages.load_state_dict(bad))
        assert kind in (ValueError, TypeError)
    after = averages.full_state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    with Checkpointer(folder) as checkpoints:
        checkpoints.save(1, {"model": model, "averages": averages})
        kind, text = same_error(lambda: checkpoints.load({"model": model}, average="c"))
        assert kind is ValueError and "no average 'c'" in text


def test_loading_other_averages(tmp_path):
    run_ranks(2, loads, tmp_path)


def fsdp2(rank):
    model = fully_shard(Model())
    named = list(model.named_parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    averages = ShardedAverages(named, Uniform(), optimizer=optimizer)
    backward(model, "fsdp", 0)
    optimizer.step()
    kind, text = same_error(lambda: swap(averages))
    assert kind is RuntimeError and "module=" in text and "ShardedAverages" in text


def test_fsdp2_needs_the_module():
    run_ranks(2, fsdp2)


def replaced():
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    averages = ShardedAverages(model.named_parameters(), Uniform(), optimizer=optimizer)
    other = Model()
    optimizer.param_groups[0]["params"][:] = list(other.parameters())
    backward(other, "tp", 0) if dist.is_initialized() else other(torch.ones(1, 7)).sum().backward()
    with pytest.raises(RuntimeError, match="were replaced"):
        optimizer.step()
    with pytest.raises(RuntimeError, match="twice"):
        averages.update()
    by_hand = ShardedAverages(model.named_parameters(), Uniform())
    model.half()
    with pytest.raises(RuntimeError, match=r"has become torch\.float16"):
        by_hand.update()
    assert by_hand.updates == 0


def test_parameters_that_were_replaced():
    run_alone(replaced)
