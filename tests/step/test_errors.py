"""A step that cannot be made: every rank says why within seconds, parameter, rank, remedy, and nothing has changed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dist_asgd import ShardedASGD
from tests.support.failures import failing_step, one_message, quick_message, unchanged
from tests.support.oracle import (
    PLAIN,
    Pair,
    Spec,
    backward,
    make_parameters,
    named,
    random_gradients,
    reduce_in_rank_order,
    same_bits,
)
from tests.support.ranks import run_ranks

NAN = float("nan")

# A step that cannot be made


def gradients_but(rank: int, pair: Pair, missing: dict[int, tuple[int, ...]]) -> None:
    """A backward pass in which some ranks have no gradient for some parameters."""
    grads = list(random_gradients(PLAIN, pair.world_size, 77)[rank])
    for index in missing.get(rank, ()):
        grads[index] = None
    backward(pair.params, grads)


@pytest.mark.parametrize("gradients", ["local", "reduced"])
@pytest.mark.parametrize(
    ("missing", "name", "rank"),
    [
        ({1: (2,)}, "layer2.weight", "rank 1"),
        ({0: (4,)}, "layer4.weight", "rank 0"),
        ({2: (0, 1, 2, 3, 4)}, "layer", "rank 2"),
        ({0: (3,), 1: (2,)}, "layer2.weight|layer3.weight", "rank 0|rank 1"),
    ],
    ids=str,
)
def test_a_gradient_missing_on_some_ranks(
    missing: dict[int, tuple[int, ...]], name: str, rank: str, gradients: str
) -> None:
    texts = failing_step(3, lambda r, pair: gradients_but(r, pair, missing), gradients=gradients)
    one_message(texts, name, rank, *(["find_unused_parameters=True"] if gradients == "local" else []))


def test_a_gradient_missing_on_all_ranks() -> None:
    texts = failing_step(2, lambda r, pair: gradients_but(r, pair, {0: (1,), 1: (1,)}))
    one_message(texts, "layer1.weight", "find_unused_parameters=True")


def test_no_gradient_at_all_on_any_rank() -> None:
    one_message(failing_step(2, lambda r, pair: None), "layer", "find_unused_parameters=True")


def test_a_gradient_dropped_by_hand_on_one_rank() -> None:
    def spoil(rank: int, pair: Pair) -> None:
        gradients_but(rank, pair, {})
        if rank == 1:
            pair.params[3].grad = None

    one_message(failing_step(2, spoil), "layer3.weight", "rank 1")


@pytest.mark.parametrize("find_unused", [False, True])
@pytest.mark.parametrize("by", ["optimizer", "model"])
def test_gradients_of_different_backwards_are_not_added_up(by: str, find_unused: bool) -> None:
    """Rank 1 leaves a batch out; then all drop their gradients and run the next one."""

    def spoil(rank: int, pair: Pair) -> None:
        if rank == 0:
            gradients_but(rank, pair, {})
        pair.drop_gradients(by)
        gradients_but(rank, pair, {})

    one_message(failing_step(2, spoil, find_unused_parameters=find_unused), "different backwards", "zero_grad()")


def test_gradients_dropped_by_one_rank_between_backwards_are_not_added_up() -> None:
    def spoil(rank: int, pair: Pair) -> None:
        gradients_but(rank, pair, {})
        if rank == 0:
            pair.drop_gradients("optimizer")
        gradients_but(rank, pair, {})

    one_message(failing_step(2, spoil), "only some did", "zero_grad()")


@pytest.mark.parametrize("to", ["another", "None"])
def test_a_reduced_gradient_replaced_on_one_rank_only(to: str) -> None:
    """All ran as many backwards: the message must not say otherwise only."""

    def spoil(rank: int, pair: Pair) -> None:
        gradients_but(rank, pair, {})
        if rank == 0:
            pair.params[3].grad = torch.ones_like(pair.params[3]) if to == "another" else None

    texts = failing_step(2, spoil, find_unused_parameters=True)
    one_message(texts, "p.grad", "only some did")


@pytest.mark.parametrize("find_unused", [False, True])
def test_a_reduced_gradient_put_back_after_it_was_dropped(find_unused: bool) -> None:
    """It is a stand-in: its values went when it was dropped."""

    def spoil(rank: int, pair: Pair) -> None:
        gradients_but(rank, pair, {})
        stashed = [p.grad for p in pair.params]
        pair.optimizer.zero_grad()
        for p, grad in zip(pair.params, stashed, strict=True):
            p.grad = grad

    one_message(failing_step(2, spoil, find_unused_parameters=find_unused), "layer", "gradient")


@pytest.mark.parametrize("buckets", [256, 25 * 2**20])
def test_a_gradient_missing_under_accumulation(buckets: int) -> None:
    def spoil(rank: int, pair: Pair) -> None:
        with pair.optimizer.no_sync():
            gradients_but(rank, pair, {1: (2,)})
        gradients_but(rank, pair, {1: (2,)})

    texts = failing_step(2, spoil, bucket_bytes=buckets)
    one_message(texts, "layer2.weight", "rank 1", "find_unused_parameters=True")


def test_a_rank_without_any_gradient_under_accumulation() -> None:
    def spoil(rank: int, pair: Pair) -> None:
        for _ in range(2):
            gradients_but(rank, pair, {1: (0, 1, 2, 3, 4)})

    one_message(failing_step(2, spoil), "layer", "rank 1", "find_unused_parameters=True")


class Interrupting(float):
    """Number during whose check Ctrl-C comes."""

    def __float__(self) -> float:
        raise KeyboardInterrupt


@pytest.mark.parametrize("call", ["step", "clip_grad_norm_"])
def test_an_interrupt_of_one_rank_among_the_checks_of_all(call: str) -> None:
    """It stays an interrupt on its rank, and is an error on the others, which would wait for that rank otherwise."""

    def ranks(rank: int) -> str:
        pair = Pair(make_parameters(PLAIN), lr=0.1, t0=1)
        pair.train(range(4))
        gradients_but(rank, pair, {})
        if rank == 1:
            pair.optimizer.param_groups[0]["lr"] = Interrupting(0.1)
        kind = KeyboardInterrupt if rank == 1 else RuntimeError
        before = [p.detach().clone() for p in pair.params]
        text = quick_message(lambda: pair.optimizer.step() if call == "step" else CALLS[call](pair), kind)
        assert all(map(same_bits, pair.params, before))
        pair.optimizer.param_groups[0]["lr"] = 0.1
        pair.optimizer.zero_grad()
        pair.train(range(10, 13))
        return text

    texts = run_ranks(3, ranks)
    assert texts[0] == texts[2] and "rank 1" in texts[0] and "interrupt" in texts[0].lower(), texts


def test_a_frozen_parameter_on_one_rank_only() -> None:
    def spoil(rank: int, pair: Pair) -> None:
        if rank == 1:
            pair.params[2].requires_grad_(False)
        gradients_but(rank, pair, {})

    def repair(rank: int, pair: Pair) -> None:
        pair.params[2].requires_grad_(True)

    one_message(failing_step(2, spoil, repair), "layer2.weight", "rank 1")


@pytest.mark.parametrize("option", ["lr", "lambd", "alpha", "t0", "weight_decay", "maximize"])
@pytest.mark.parametrize("gradients", ["local", "reduced"])
def test_ranks_that_disagree_about_a_hyperparameter_later(option: str, gradients: str) -> None:
    def spoil(rank: int, pair: Pair) -> None:
        gradients_but(rank, pair, {})
        if rank == 1:
            pair.optimizer.param_groups[0][option] = True if option == "maximize" else 0.5

    def repair(rank: int, pair: Pair) -> None:
        pair.optimizer.param_groups[0][option] = pair.oracle.optimizer.param_groups[0][option]

    one_message(failing_step(2, spoil, repair, gradients=gradients), option, "rank 1")


@pytest.mark.parametrize(
    ("option", "value"), [("lr", NAN), ("lr", -1.0), ("t0", "x"), ("lambd", -1.0), ("weight_decay", NAN)]
)
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_hyperparameter_made_bad_later(world_size: int, option: str, value: Any) -> None:
    def spoil(rank: int, pair: Pair) -> None:
        gradients_but(rank, pair, {})
        pair.optimizer.param_groups[0][option] = value

    def repair(rank: int, pair: Pair) -> None:
        pair.optimizer.param_groups[0][option] = pair.oracle.optimizer.param_groups[0][option]

    one_message(failing_step(world_size, spoil, repair), option, str(value))


def test_a_closure_that_fails_is_the_users_error() -> None:
    def ranks(rank: int) -> None:
        pair = Pair(make_parameters(PLAIN), lr=0.1, t0=0)
        with pytest.raises(KeyError):
            pair.optimizer.step(lambda: {}["loss"])
        pair.train(range(4))

    run_ranks(2, ranks)


@pytest.mark.parametrize("buckets", [64, 25 * 2**20])
def test_a_frozen_parameter_with_a_gradient_on_one_rank_only(buckets: int) -> None:
    """As after the error of a missing gradient, by one who freezes the parameter and steps again."""

    def spoil(rank: int, pair: Pair) -> None:
        pair.params[2].requires_grad_(False)
        gradients_but(rank, pair, {0: (2,), 1: (2,)})
        if rank == 0:
            pair.params[2].grad = torch.ones_like(pair.params[2])

    def repair(rank: int, pair: Pair) -> None:
        pair.params[2].requires_grad_(True)

    one_message(failing_step(2, spoil, repair, bucket_bytes=buckets), "layer2.weight", "rank 0", "frozen")


def test_param_groups_taken_away() -> None:
    def ranks(rank: int) -> str:
        pair = Pair([{"params": make_parameters(PLAIN[:2])}, {"params": make_parameters(PLAIN[2:])}], lr=0.1, t0=0)
        removed = pair.optimizer.param_groups.pop()
        backward(pair.params, random_gradients(PLAIN, 2, 0)[rank])
        text = unchanged(pair, pair.optimizer.step)
        pair.optimizer.param_groups.append(removed)
        pair.optimizer.zero_grad()
        pair.train(range(3))
        return text

    one_message(run_ranks(2, ranks), "param_groups", "2")


EDITS: dict[str, Callable[[list[dict[str, Any]]], Any]] = {
    "reversed": lambda groups: groups.reverse(),
    "one taken out": lambda groups: groups[1]["params"].pop(1),
    "one replaced": lambda groups: groups[1]["params"].__setitem__(1, make_parameters([Spec((3,))])[0]),
    "one appended": lambda groups: groups[0]["params"].append(make_parameters([Spec((3,))])[0]),
    "one moved": lambda groups: groups[0]["params"].append(groups[1]["params"].pop()),
}
CALLS: dict[str, Callable[[Pair], Any]] = {
    "step": lambda pair: pair.optimizer.step(),
    "clip_grad_norm_": lambda pair: pair.optimizer.clip_grad_norm_(1.0),
    "averaged_parameters": lambda pair: pair.optimizer.averaged_parameters().__enter__(),
    "state_dict": lambda pair: pair.optimizer.state_dict(),
    "full_state_dict": lambda pair: pair.optimizer.full_state_dict(),
    "load_state_dict": lambda pair: pair.optimizer.load_state_dict(pair.state),  # type: ignore[attr-defined]
}


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("edit", EDITS)
def test_param_groups_edited_by_hand(edit: str, world_size: int) -> None:
    """torch would train what they list; here a parameter's place in a bucket is settled when it is added."""

    def ranks(rank: int) -> list[str]:
        pair = Pair([{"params": make_parameters(PLAIN[:2])}, {"params": make_parameters(PLAIN[2:])}], lr=0.1, t0=0)
        pair.train(range(3))
        pair.state = pair.optimizer.state_dict()  # type: ignore[attr-defined]
        groups = pair.optimizer.param_groups
        kept, lists = list(groups), [list(group["params"]) for group in groups]
        backward(pair.params, random_gradients(PLAIN, world_size, 5)[rank])
        EDITS[edit](groups)
        texts = [unchanged(pair, lambda call=call: call(pair)) for call in CALLS.values()]
        groups[:] = kept
        for group, params in zip(groups, lists, strict=True):
            group["params"][:] = params
        pair.optimizer.zero_grad()
        pair.train(range(6, 9))
        return texts

    for texts in zip(*run_ranks(world_size, ranks), strict=True):
        one_message(list(texts), "param_groups[", "add_param_group()")


def test_an_option_missing_from_a_group() -> None:
    def spoil(rank: int, pair: Pair) -> None:
        gradients_but(rank, pair, {})
        del pair.optimizer.param_groups[0]["alpha"]

    def repair(rank: int, pair: Pair) -> None:
        pair.optimizer.param_groups[0]["alpha"] = 0.75

    one_message(failing_step(2, spoil, repair), "alpha", "param_group")


# Gradients that cannot be used


@pytest.mark.parametrize("how", ["backward", "by hand"])
@pytest.mark.parametrize(("world_size", "where"), [(1, (0,)), (2, (0, 1)), (2, (1,))])
def test_sparse_gradients(world_size: int, where: tuple[int, ...], how: str) -> None:
    def ranks(rank: int) -> str:
        table = torch.nn.Embedding(11, 5, sparse=rank in where)
        dense = make_parameters(PLAIN[:2])
        optimizer = ShardedASGD([*named(dense), ("table.weight", table.weight)], lr=0.1)
        before = [p.detach().clone() for p in (*dense, table.weight)]

        def go() -> None:
            if how == "backward":
                loss = table(torch.tensor([1, 2])).sum() + sum((p * 2).sum() for p in dense)
                loss.backward()
            else:
                backward(dense, [torch.ones_like(p) for p in dense])
                g = torch.ones(11, 5)
                table.weight.grad = g.to_sparse(1) if rank in where else g
            optimizer.step()

        text = quick_message(go, RuntimeError, ValueError)
        assert all(map(same_bits, (*dense, table.weight), before))
        optimizer.zero_grad()
        backward([*dense, table.weight], [torch.ones_like(p) for p in (*dense, table.weight)])
        optimizer.step()
        assert not same_bits(dense[0], before[0])
        return text

    one_message(run_ranks(world_size, ranks), "sparse", "table.weight", *([] if 0 in where else ["rank 1"]))


def bad_gradient(p: torch.nn.Parameter, how: str) -> None:
    """torch guards p.grad = ..., but not these ways round it."""
    p.grad = torch.ones_like(p)
    if how == "shape":
        p.grad.data = torch.ones(p.numel() + 1)
    elif how == "as many elements":
        p.grad.data = torch.ones(p.numel(), 1)


@pytest.mark.parametrize("gradients", ["local", "reduced"])
@pytest.mark.parametrize("how", ["shape", "as many elements"])
@pytest.mark.parametrize(("world_size", "where"), [(1, (0,)), (2, (0, 1)), (2, (1,))])
def test_a_gradient_of_another_shape(world_size: int, where: tuple[int, ...], how: str, gradients: str) -> None:
    def spoil(rank: int, pair: Pair) -> None:
        for index, p in enumerate(pair.params):
            bad_gradient(p, how if rank in where and index == 3 else "fine")

    texts = failing_step(world_size, spoil, gradients=gradients)
    one_message(texts, "layer3.weight", "shape|size", *([] if 0 in where else ["rank 1"]))


@pytest.mark.parametrize("gradients", ["local", "reduced"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_gradient_of_another_dtype_is_converted(world_size: int, gradients: str) -> None:
    """As torch's ASGD takes one; also where only one rank has it."""

    def ranks(rank: int) -> None:
        specs = [Spec((9, 4)), Spec((50,), torch.bfloat16), Spec((7,), torch.float64)]
        pair = Pair(make_parameters(specs), lr=0.1, t0=1, gradients=gradients)
        for step in range(8):
            by_rank = random_gradients(specs, world_size, step, exact=True)  # the same value in every dtype
            pair.oracle.backward(by_rank)
            mean = [reduce_in_rank_order(grads) for grads in zip(*by_rank, strict=True)]
            for index, p in enumerate(pair.params):
                own = by_rank[rank][index] if gradients == "local" else mean[index]
                p.grad = own.to(p.dtype)
                if step % 4 == index and rank == world_size - 1:
                    p.grad.data = own.double() if index < 2 else own.float()
            pair.step()
            pair.zero_grad()
            pair.check(step)

    run_ranks(world_size, ranks)


@pytest.mark.parametrize("where", [(0,), (0, 1)])
def test_a_sparse_gradient_on_top_of_a_reduced_one(where: tuple[int, ...]) -> None:
    def spoil(rank: int, pair: Pair) -> None:
        gradients_but(rank, pair, {})
        grads: list[Any] = list(random_gradients(PLAIN, 2, 77)[rank])
        if rank not in where:
            return backward(pair.params, grads)
        rows = torch.nn.functional.embedding(torch.tensor([1]), pair.params[0], sparse=True)
        torch.autograd.backward([rows.sum(), *((p * g).sum() for p, g in zip(pair.params[1:], grads[1:], strict=True))])

    one_message(failing_step(2, spoil), "layer0.weight", "sparse", "rank 0")
