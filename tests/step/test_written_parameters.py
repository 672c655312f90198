"""Parameters that are written on some ranks only: an error on every rank that names them, never a mixture."""

from collections.abc import Callable

import pytest
import torch

from dist_asgd import ShardedASGD
from tests.support.failures import one_message, quick_message
from tests.support.layouts import backward, build, give_gradients, named_parameters, train, whole
from tests.support.oracle import PLAIN, Pair, make_parameters, random_gradients, same_bits
from tests.support.ranks import Sent, run_ranks

CALLS: list[Callable[[ShardedASGD], object]] = [
    lambda optimizer: optimizer.step(),
    lambda optimizer: optimizer.clip_grad_norm_(1.0),
    lambda optimizer: optimizer.averaged_parameters().__enter__(),
    lambda optimizer: optimizer.full_state_dict(),
]


@pytest.mark.parametrize("gradients", ["local", "reduced"])
def test_weights_that_rank_0_alone_loads_before_the_first_step(gradients: str) -> None:
    def ranks(rank: int) -> list[str]:
        texts = []
        for hidden in (False, True):  # whether the writes are such that torch does not count
            pair = Pair(make_parameters(PLAIN), lr=0.1, t0=0, gradients=gradients)
            weights = [torch.full_like(p, 0.25) for p in pair.params]
            if rank == 0:
                for p, w in zip(pair.params, weights, strict=True):
                    (p.data if hidden else p.detach()).copy_(w)
            before = [p.detach().clone() for p in pair.params]
            pair.backward(random_gradients(PLAIN, 3, 0))
            texts += [quick_message(pair.optimizer.step), quick_message(pair.optimizer.step)]
            assert all(map(same_bits, pair.params, before))
            for i, w in enumerate(weights):
                pair.write(i, w)
            pair.step()
            pair.zero_grad()
            pair.check()
            pair.train(range(1, 4))
        return texts

    for texts in zip(*run_ranks(3, ranks), strict=True):
        one_message(list(texts), "ranks 0 and 1 have different values of parameter 'layer4.weight', ", "if rank == 0:")


@pytest.mark.parametrize("gradients", ["local", "reduced"])
def test_weights_that_one_rank_writes_between_steps(gradients: str) -> None:
    def ranks(rank: int) -> list[str]:
        pair = Pair(make_parameters(PLAIN), lr=0.1, t0=0, gradients=gradients, bucket_bytes=2**9)
        pair.train(range(3))
        old = pair.params[1].detach().clone()
        pair.backward(random_gradients(PLAIN, 2, 3))
        texts = []
        for call in CALLS:
            if rank:
                with torch.no_grad():
                    pair.params[1].mul_(2)
            texts.append(quick_message(lambda call=call: call(pair.optimizer)))
            texts.append(quick_message(lambda call=call: call(pair.optimizer)))
            if rank:
                with torch.no_grad():
                    pair.params[1].copy_(old)
        pair.step()
        pair.zero_grad()
        pair.check()
        if rank:
            pair.params[1].data = old + 1  # the memory of a model that was moved or cast on one rank
        texts.append(quick_message(pair.optimizer.full_state_dict))
        pair.write(1, old)
        pair.train(range(4, 6))
        for i in range(len(pair.params)):
            pair.write(i, torch.full_like(pair.params[i], 0.5))
        pair.train(range(6, 8))
        return texts

    for texts in zip(*run_ranks(2, ranks), strict=True):
        one_message(list(texts), "ranks 0 and 1 have different values of parameter 'layer1.weight', and")


def test_loading_comes_before_the_comparison() -> None:
    """A state of the optimizer may be loaded before its model's, by ranks of which one has loaded the model's."""

    def ranks(rank: int) -> None:
        pair = Pair(make_parameters(PLAIN), lr=0.1, t0=0)
        pair.train(range(3))
        weights, state = [p.detach().clone() for p in pair.params], pair.optimizer.state_dict()
        if rank == 0:
            with torch.no_grad():
                pair.params[0].zero_()
        pair.optimizer.load_state_dict(state)
        pair.params[0].detach().copy_(weights[0])
        pair.train(range(3, 6))

    run_ranks(2, ranks)


@pytest.mark.parametrize("share", [True, False])
def test_replicas_of_dtensors(share: bool) -> None:
    """They would mix what they hold, or, where they do not share state, train apart. Other steps compare nothing."""

    def ranks(rank: int) -> list[str]:
        texts = []
        model, optimizer = build("hsdp", lr=0.1, t0=0, shard_replicas=share)
        weight = model.outside.weight
        for start in (0, 2):
            old = weight.detach().clone()
            give_gradients(named_parameters(model), start)
            if rank == 0:
                with torch.no_grad():
                    weight.mul_(2)
            texts.append(quick_message(optimizer.step if share or not start else optimizer.full_state_dict))
            with torch.no_grad():
                weight.copy_(old)
            train(model, optimizer, "hsdp", range(start, start + 2))
        backward(model, "hsdp", 4)
        with Sent() as sent:
            optimizer.step()
        assert len(sent.sizes) == (2 if share else 0), sent.sizes  # the agreement, and one bucket's all-gather
        assert whole(weight).isfinite().all()
        return texts

    for texts in zip(*run_ranks(2, ranks), strict=True):
        one_message(list(texts), "ranks 0 and 1 have different values of parameter 'outside.weight', and")
