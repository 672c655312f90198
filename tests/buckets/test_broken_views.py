"""Parameters that no longer lie in their buckets (model.to(), assign=True, p.data = ...): noticed, or taken up."""

import warnings
from typing import Any

import pytest
import torch

from dist_asgd import ShardedASGD
from tests.support.failures import one_message, quick_message
from tests.support.oracle import (
    PLAIN,
    Messenger,
    Pair,
    Spec,
    backward,
    make_parameters,
    random_gradients,
    same_bits,
    tokens_of,
)
from tests.support.ranks import run_ranks


@pytest.mark.parametrize("how", ["double", "bfloat16"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_model_cast_after_the_optimizer_was_built(world_size: int, how: str) -> None:
    def ranks(rank: int) -> str:
        model = Messenger()
        optimizer = ShardedASGD(model.named_parameters(), lr=0.1)
        for step in range(2):
            (model(tokens_of(rank, step)) ** 2).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        getattr(model, how)()
        before = [p.detach().clone() for p in model.parameters()]

        def go() -> None:
            (model(tokens_of(rank, 3)) ** 2).mean().backward()
            optimizer.step()

        text = quick_message(go)
        assert all(map(same_bits, model.parameters(), before))
        return text

    one_message(run_ranks(world_size, ranks), "embedding.weight|layers.", "dtype|float64|bfloat16")


@pytest.mark.parametrize(("world_size", "module_given"), [(1, True), (2, False), (2, True)])
def test_weights_loaded_with_assign(world_size: int, module_given: bool) -> None:
    """assign=True puts new parameters into the model; the optimizer holds the old ones.

    One rank without the module cannot know: its parameters have no gradients, as with torch.
    """

    def ranks(rank: int) -> str:
        model = Messenger()
        optimizer = ShardedASGD(model.named_parameters(), lr=0.1, module=model if module_given else None)
        for step in range(2):
            (model(tokens_of(rank, step)) ** 2).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)

        def go() -> None:
            (model(tokens_of(rank, 3)) ** 2).mean().backward()
            optimizer.step()

        return quick_message(go)

    one_message(run_ranks(world_size, ranks), "embedding.weight|layers.")


@pytest.mark.parametrize("replaced", [["layers.1.scale"], None], ids=["one", "all"])
@pytest.mark.parametrize("options", [{"gradients": "reduced"}, {"find_unused_parameters": True}], ids=str)
@pytest.mark.parametrize("world_size", [1, 2])
def test_weights_that_only_a_warning_can_tell_of(
    world_size: int, options: dict[str, Any], replaced: list[str] | None
) -> None:
    """Without the module, and where parameters may lack a gradient: warned of once, and soon where all lack it."""

    def ranks(rank: int) -> None:
        model = Messenger()
        optimizer = ShardedASGD(model.named_parameters(), lr=0.1, **options)
        warned = []
        for step in range(110):
            if step == 2:
                names = replaced or list(model.state_dict())
                new = {name: value.clone() for name, value in model.state_dict().items() if name in names}
                model.load_state_dict(new, strict=False, assign=True)
            (model(tokens_of(0, step)) ** 2).mean().backward()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                optimizer.step()
            warned += [(step, str(warning.message)) for warning in caught]
            optimizer.zero_grad()
        ((step, text),) = warned
        assert step == (101 if replaced else 4)
        assert (replaced or ["layers.3.shift"])[0] in text and "assign=True" in text

    run_ranks(world_size, ranks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gradients", ["local", "reduced"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_data_replaced_is_noticed_or_taken_up(world_size: int, gradients: str, dtype: torch.dtype) -> None:
    """p.data = other, of the same shape: the new values count (or an error names the parameter)."""

    def ranks(rank: int) -> None:
        specs = [Spec((9, 4), dtype), Spec((50,), dtype)]
        pair = Pair(make_parameters(specs), lr=0.1, t0=2, gradients=gradients)
        for step in range(9):
            if step in (0, 3, 6):
                new = specs[1].random(torch.Generator().manual_seed(step))
                pair.params[1].data = new.clone()
                with torch.no_grad():
                    pair.oracle.params[1].copy_(new)
            pair.backward(random_gradients(specs, world_size, step))
            try:
                pair.step()
            except RuntimeError as error:
                assert "layer1.weight" in str(error)
                return
            pair.zero_grad()
            pair.check(step)

    run_ranks(world_size, ranks)


def test_data_replaced_on_one_rank_only_is_an_error_or_harmless() -> None:
    def ranks(rank: int) -> None:
        pair = Pair(make_parameters(PLAIN), lr=0.1, t0=2)
        pair.train(range(3))
        if rank == 1:
            pair.params[1].data = pair.params[1].data.clone()  # the same values
        pair.train(range(3, 8))

    run_ranks(2, ranks)


@pytest.mark.parametrize("used", [True, False])
@pytest.mark.parametrize("on", [(0, 1), (0,)], ids=["every rank", "one rank"])
def test_data_of_another_shape(on: tuple[int, ...], used: bool) -> None:
    def spoil(rank: int, pair: Pair) -> None:
        grads: list[Any] = list(random_gradients(PLAIN, 2, 77)[rank])
        if rank in on:
            pair.params[3].data = torch.zeros(5)
            grads[3] = torch.ones(5) if used else None
        backward(pair.params, grads)

    def ranks(rank: int) -> str:
        pair = Pair(make_parameters(PLAIN), lr=0.1, t0=1)
        pair.train(range(3))

        def go() -> None:
            spoil(rank, pair)
            pair.optimizer.step()

        return quick_message(go)

    one_message(run_ranks(2, ranks), "layer3.weight", "shape|size")


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_model_moved_to_where_it_is_goes_on(world_size: int) -> None:
    def ranks(rank: int) -> None:
        model = torch.nn.ParameterList(make_parameters(PLAIN))
        pair = Pair(list(model), lr=0.1, t0=1)
        for step in range(6):
            model.to("cpu")
            model.float()
            model.load_state_dict(model.state_dict())
            model.train(step % 2 == 0)
            pair.backward(random_gradients(PLAIN, world_size, step))
            pair.step()
            pair.zero_grad()
            pair.check(step)

    run_ranks(world_size, ranks)


@pytest.mark.parametrize("data", ["flat", "half"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_data_of_another_shape_at_the_same_place(world_size: int, data: str) -> None:
    def ranks(rank: int) -> str:
        p, q = (torch.nn.Parameter(torch.ones(8, 4)) for _ in "pq")
        optimizer = ShardedASGD([("p", p), ("q", q)], lr=1.0, lambd=0)
        (0 * (p.sum() + q.sum())).backward()
        optimizer.step()  # until the first step it would be taken up
        optimizer.zero_grad()
        p.data = p.data.view(-1) if data == "flat" else p.data[:4]
        (p.sum() + q.sum()).backward()
        text = quick_message(optimizer.step, RuntimeError)
        assert (p == 1).all() and (q == 1).all()
        return text

    one_message(run_ranks(world_size, ranks), "'p'", "shape")


@pytest.mark.parametrize("broken_on", [0, 1])
def test_a_group_added_to_a_broken_optimizer_may_be_added_once_it_is_mended(broken_on: int) -> None:
    def ranks(rank: int) -> str:
        pair = Pair(make_parameters(PLAIN), lr=0.1, t0=0)
        group = {"params": [("late", make_parameters([Spec((5,))])[0])]}
        data = pair.params[1].data
        if rank == broken_on:
            pair.params[1].data = data.double()
        text = quick_message(lambda: pair.optimizer.add_param_group(group), ValueError)
        pair.params[1].data = data
        pair.train(range(3))
        pair.optimizer.add_param_group(group)
        assert len(pair.optimizer.param_groups) == 2
        return text

    one_message(run_ranks(2, ranks), "layer1.weight", f"rank {broken_on}")
