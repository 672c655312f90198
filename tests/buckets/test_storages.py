"""Every parameter has a storage of its own over its bucket's memory: who saves or compares by storage loses nothing."""

import copy
import gc
import io
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_model, save_model
from torch import nn

from dist_asgd import ShardedASGD
from tests.support.failures import quick_message
from tests.support.oracle import MIXED, Messenger, Pair, backward, make_parameters, named, random_gradients, same_bits
from tests.support.ranks import run_alone, run_ranks


def bytes_of(save: Callable[[Any], None]) -> int:
    file = io.BytesIO()
    save(file)
    return len(file.getvalue())


def model_and_optimizer() -> tuple[nn.Sequential, ShardedASGD]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(1000, 16), nn.Linear(16, 16), nn.Linear(16, 1000, bias=False))
    model[2].weight = model[0].weight  # tied
    optimizer = ShardedASGD(model.named_parameters(), lr=0.1, t0=0)
    for step in range(3):
        model(torch.arange(step, step + 5)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


@pytest.mark.parametrize("world_size", [1, 2])
def test_whoever_saves_by_storage_keeps_every_parameter(world_size: int, tmp_path: Path) -> None:
    def saved(model: nn.Module, rank: int) -> None:
        values = {name: value.clone() for name, value in model.state_dict().items()}
        save_model(model, str(tmp_path / f"{rank}.safetensors"))
        fresh = model_and_optimizer()[0] if world_size == 1 else copy.deepcopy(model)
        for p in fresh.parameters():
            nn.init.zeros_(p)
        load_model(fresh, tmp_path / f"{rank}.safetensors")
        assert all(same_bits(value, values[name]) for name, value in fresh.state_dict().items())
        head = bytes_of(lambda file: torch.save(model[1].state_dict(), file))
        assert 16 * 17 * 4 < head < 16 * 17 * 4 + 3000
        whole = bytes_of(lambda file: torch.save(model, file))
        assert whole < (1000 * 16 + 16 * 17) * 4 + 10_000  # the tied weight once

    def ranks(rank: int) -> None:
        model, optimizer = model_and_optimizer()
        saved(model, rank)
        with optimizer.averaged_parameters():
            saved(model, rank)
        load_model(model, tmp_path / f"{rank}.safetensors")  # the averages, in place
        model(torch.arange(5)).square().mean().backward()
        optimizer.step()

    run_ranks(world_size, ranks)


def test_storages_have_the_memory_of_the_parameter_whatever_its_layout() -> None:
    def ranks(rank: int) -> None:
        pair = Pair(make_parameters(MIXED), lr=0.1, t0=1)
        for step in range(3):
            pair.backward(random_gradients(MIXED, 2, step))
            pair.step()
            pair.zero_grad()
            pair.check(step)
        for p in pair.params:
            storage = p.untyped_storage()
            assert storage.nbytes() == p.numel() * p.element_size() and p.storage_offset() == 0
            assert not p.numel() or storage.data_ptr() == p.data_ptr()
            assert p.stride() == torch.empty_like(p).stride()

    run_ranks(2, ranks)


def test_a_parameter_keeps_the_memory_of_its_bucket() -> None:
    """The memory lives as long as a parameter or the optimizer does, and no longer."""

    def alone() -> None:
        params = make_parameters(MIXED)
        optimizer = ShardedASGD(named(params), lr=0.1)
        bucket = weakref.ref(next(one for one in gc.get_objects() if type(one).__name__ == "FlatBucket"))
        before = [p.detach().clone() for p in params]
        del optimizer
        gc.collect()
        assert bucket() is None
        noise = [torch.full((997,), 7.0) for _ in range(200)]
        assert all(map(same_bits, params, before)) and noise

    run_alone(alone)


@pytest.mark.parametrize("move", [nn.Module.share_memory, lambda model: model.embedding.weight.share_memory_()])
def test_parameters_moved_to_shared_memory_are_refused(move: Callable[[nn.Module], Any]) -> None:
    """A step would move them back, away from the processes that they are shared with."""

    def alone() -> str:
        model = Messenger()
        optimizer = ShardedASGD(model.named_parameters(), lr=0.1)
        move(model)
        before = [p.detach().clone() for p in model.parameters()]
        (model(torch.arange(4)) ** 2).mean().backward()
        text = quick_message(optimizer.step, RuntimeError)
        assert all(map(same_bits, model.parameters(), before))
        return text

    text = run_alone(alone)
    assert "shared memory" in text and ("embedding.weight" in text or "layers." in text)


def test_averages_sent_to_another_process_stay_there() -> None:
    def alone() -> None:
        model, optimizer = model_and_optimizer()
        before = [p.detach().clone() for p in model.parameters()]
        with optimizer.averaged_parameters():
            averages = [p.detach().clone() for p in model.parameters()]
            model.share_memory()  # as sending it does
            sent = [p.data for p in model.parameters()]
        assert all(map(same_bits, sent, averages)) and all(map(same_bits, model.parameters(), before))
        assert not any(map(same_bits, before, averages))
        model(torch.arange(5)).square().mean().backward()
        optimizer.step()

    run_alone(alone)


def test_a_write_through_either_name_is_the_parameters() -> None:
    """Versions of the parameter and of the bucket are counted apart, so autograd sees both kinds of writes."""

    def alone() -> None:
        (p,) = make_parameters(MIXED[:1])
        optimizer = ShardedASGD([("p", p)], lr=0.5, lambd=0)
        old = (p * p).sum()  # saves p for its backward
        backward([p], [torch.ones_like(p)])
        expected = p.detach() - 0.5
        optimizer.step()
        assert same_bits(p, expected)
        assert "modified by an inplace operation" in quick_message(old.backward, RuntimeError)
        with torch.no_grad():
            p.fill_(3)
        optimizer.zero_grad()
        backward([p], [torch.ones_like(p)])
        optimizer.step()
        assert (p == 2.5).all()

    run_alone(alone)
