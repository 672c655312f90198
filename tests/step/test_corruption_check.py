"""Flipped bits: `verify_every` names rank and parameter on every rank, and takes nothing else for a flipped bit."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_asgd import EMA, ShardedASGD, ShardedAverages
from tests.support.failures import one_message, quick_message
from tests.support.layouts import Model, backward, build, named_parameters, place, train, whole
from tests.support.oracle import PLAIN, Pair, Spec, make_parameters, random_gradients
from tests.support.ranks import Sent, run_ranks

LAYOUTS = [("zero", {}), ("ddp", {}), ("hsdp", {}), ("hsdp", {"shard_replicas": False}), ("tp", {})]
AVERAGED = {"lr": 0.1, "t0": 0}


def flip(tensor: Tensor, element: int = -1, bit: int = 0) -> None:
    """Flip one bit, in a way that torch does not count as a write."""
    words = tensor.data.view(-1).view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])
    words[element] ^= 1 << bit


@pytest.mark.parametrize("gradients", ["local", "reduced"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_odd_one_of_three_ranks_is_named(gradients: str, dtype: torch.dtype) -> None:
    """Whether it owns the element or not. After the flip is undone, training goes on with the right bits."""

    def ranks(rank: int) -> list[str]:
        specs = [Spec(spec.shape, dtype) for spec in PLAIN]
        pair = Pair(make_parameters(specs), gradients=gradients, verify_every=1, **AVERAGED)
        pair.train(range(2))
        pair.backward(random_gradients(specs, 3, 2))
        texts = []
        for culprit in range(3):
            for index in (1, 4):
                if rank == culprit:
                    flip(pair.params[index], bit=index)
                texts.append(quick_message(pair.optimizer.step))
                if rank == culprit:
                    flip(pair.params[index], bit=index)
        pair.step()
        pair.zero_grad()
        pair.train(range(3, 5))
        return texts

    for number, texts in enumerate(zip(*run_ranks(3, ranks), strict=True)):
        culprit, index = divmod(number, 2)
        others = ("1-2", "0, 2", "0-1")[culprit]
        what = f"step() number 3 of this optimizer has found |parameter 'layer{[1, 4][index]}.weight' differs: "
        one_message(list(texts), *what.split("|"), f"rank {culprit} (process ", f") is not like ranks {others}. ")


def test_what_each_replica_updates_for_itself_is_compared_within_k_steps() -> None:
    """Parameter, average and master; of two replicas both are named. Only every third step exchanges anything."""

    def ranks(rank: int) -> tuple[list[str], list[int]]:
        options: dict[str, Any] = {"shard_replicas": False, "verify_every": 3, **AVERAGED}
        model = place("hsdp", Model().bfloat16())
        optimizer = ShardedASGD(list(model.named_parameters()), module=model, **options)
        weight = model.outside.weight
        taken, texts, exchanges = 0, [], []
        for what in ("parameter", "ax", "master"):
            # Damage is done after the third step since the check, and found by the one that follows.
            for _ in range(3):
                _give_gradients(model, taken)
                with Sent() as sent:
                    optimizer.step()
                exchanges.append(len(sent.sizes))
                taken += 1
            state = optimizer.state[weight]
            damaged = {
                "parameter": weight.to_local(),
                "ax": state["ax"].to_local(),
                "master": state["master"].to_local(),
            }
            if rank == 2 and damaged[what].numel():
                flip(damaged[what], bit=3)
            texts.append(quick_message(optimizer.step))
            if rank == 2 and damaged[what].numel():
                flip(damaged[what], bit=3)
        return texts, exchanges

    found = run_ranks(4, ranks)
    for number, what in enumerate(("parameter", "ax of parameter", "master of parameter")):
        texts = [of_rank[number] for of_rank, _ in found]
        one_message(texts, f"{what} 'outside.weight' differs: rank 0 (process ", "), rank 2 (process ")
    for _, exchanges in found:
        assert not any(n for step, n in enumerate(exchanges) if step % 3), exchanges
        assert all(exchanges[::3])


def _give_gradients(model: nn.Module, step: int) -> None:
    for param in model.parameters():
        param.grad = torch.full_like(param, 1 / (step + 2))


def test_averages_beside_an_optimizer_whose_copies_come_apart() -> None:
    """Each rank's AdamW updates a copy of its own, so a flipped bit stays, and is found by the second update."""

    def ranks(rank: int) -> list[str]:
        model = place("ddp", Model())
        params = named_parameters(model)
        optimizer = torch.optim.AdamW(params.values())
        averages = ShardedAverages(params.items(), EMA(0.9), optimizer=optimizer, verify_every=2)
        train(model, optimizer, "ddp", range(3))
        assert averages.updates == 3
        if rank == 1:
            flip(params["outside.bias"], bit=20)
        train(model, optimizer, "ddp", range(3, 4))
        backward(model, "ddp", 4)
        text = quick_message(optimizer.step)
        assert averages.updates == 4
        return [text, quick_message(lambda: ShardedAverages(params.items(), EMA(0.9), verify_every=rank + 1))]

    for texts in zip(*run_ranks(3, ranks), strict=True):
        found = "update number 5 of these averages has found |'outside.bias'|rank 1 (process |) is not like ranks 0, 2."
        one_message(list(texts), *(found.split("|") if "update number" in texts[0] else ["ranks disagree on"]))


@pytest.mark.parametrize(("layout", "options"), LAYOUTS, ids=str)
def test_what_users_may_do_is_no_flipped_bit(layout: str, options: dict[str, Any]) -> None:
    """Nothing that is equal on all ranks raises, and training has the bits of a run without checks."""

    def ranks(rank: int) -> None:
        models = [run(layout, {**options, "verify_every": k}) for k in (1, None)]
        for checked, unchecked in zip(*(named_parameters(model).values() for model in models), strict=True):
            assert torch.equal(whole(checked), whole(unchecked))

    def run(layout: str, options: dict[str, Any]) -> nn.Module:
        model, optimizer = build(layout, **options, **AVERAGED)
        params = list(named_parameters(model).values())
        train(model, optimizer, layout, range(2))
        saved = optimizer.state_dict()
        if dist.get_rank() == 0:
            assert "ax" in optimizer.state[params[0]]  # looking makes averages and masters current on this rank
        with optimizer.averaged_parameters():
            assert whole(params[0]).isfinite().all()
        for param in params:
            param.data.mul_(0.5)  # not counted by torch
        train(model, optimizer, layout, range(2, 4))
        with torch.no_grad():
            params[-1].clamp_(-0.1, 0.1)
        train(model, optimizer, layout, range(4, 5))
        optimizer.load_state_dict(saved)
        optimizer.restart_averaging()
        train(model, optimizer, layout, range(5, 8))
        return model

    run_ranks(2, ranks)
