"""Gradients in parts: elementwise operators act on the parts, norms span the ranks, the rest raises."""

import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dist_asgd import ShardedASGD
from tests.support.failures import one_message, quick_message
from tests.support.oracle import PLAIN, Pair, Spec, backward, make_parameters, named, random_gradients, same_bits
from tests.support.ranks import message_of, run_ranks, same_everywhere

ODD = (
    Spec((5, 3, 2, 4), layout="channels_last"),
    Spec(()),
    Spec((9,), torch.bfloat16),
    Spec((300,)),
    Spec((0,)),
    Spec((6, 9), layout="transposed"),
    Spec((31,), torch.float64),
)
Change = Callable[[Sequence[torch.nn.Parameter]], Any]


def scaled(params: Sequence[Any]) -> None:
    """By tokens: the mean over ranks becomes the mean over tokens."""
    for p in params:
        p.grad.mul_(2 / 7)


def divided_into_another(params: Sequence[Any]) -> None:
    for p in params:
        p.grad = p.grad / torch.tensor(3.0)


def scaled_together(params: Sequence[Any]) -> None:
    torch._foreach_mul_([p.grad for p in params], torch.tensor(0.3))
    torch._foreach_div_([p.grad for p in params], 7.0)


def clipped_by_value(params: Sequence[Any]) -> None:
    torch.nn.utils.clip_grad_value_(params, 0.05)


def joined_with_a_whole_tensor(params: Sequence[Any]) -> None:
    for p in params:
        whole = torch.arange(float(p.numel())).reshape(p.shape).to(p.dtype)
        p.grad.add_(whole, alpha=0.125).masked_fill_(p.grad > 2, 0.25)


def chosen(params: Sequence[Any]) -> None:
    """Right after a backward, when the condition has no values yet."""
    for p in params:
        p.grad = torch.where(p.grad > 0.125, p.grad, torch.zeros((), dtype=p.dtype))


def mended(params: Sequence[Any]) -> None:
    for p in params:
        p.grad.nan_to_num_().neg_().clamp_(-0.1, 0.2).add_(0.25)
        kept = p.grad.clone()
        p.grad.zero_()
        p.grad.copy_(kept)


CHANGES: tuple[Change, ...] = (
    scaled,
    divided_into_another,
    scaled_together,
    clipped_by_value,
    joined_with_a_whole_tensor,
    chosen,
    mended,
)


def change_both(pair: Pair, change: Change) -> None:
    change(pair.params)
    oracle = pair.oracle
    for p, grad in zip(oracle.params, oracle.reduced, strict=True):
        p.grad = grad
    change(oracle.params)
    oracle.reduced = [p.grad for p in oracle.params]


def test_elementwise_changes_have_the_bits_of_torch() -> None:
    """The changes come right after a backward, when reductions are under way, and before another one."""

    def ranks(rank: int) -> None:
        for specs in (PLAIN, ODD):
            pair = Pair(make_parameters(specs), lr=0.1, t0=1, bucket_bytes=512)
            for step in range(2 * len(CHANGES)):
                change = CHANGES[step % len(CHANGES)]
                pair.backward(random_gradients(specs, 2, step))
                change_both(pair, change)
                if change not in (divided_into_another, chosen) and step % 2:
                    pair.backward(random_gradients(specs, 2, step + 50))
                    change_both(pair, scaled)
                pair.step()
                pair.zero_grad()
                pair.check((change.__name__, step))

    run_ranks(2, ranks)


def test_numbers_of_whole_gradients() -> None:
    questions: tuple[Callable[[Any], torch.Tensor], ...] = (
        lambda g: g.norm(),
        lambda g: torch.linalg.vector_norm(g, 1.0),
        lambda g: torch.linalg.vector_norm(g, 0),
        lambda g: torch.isfinite(g).all(),
        lambda g: g.isnan().any(),
        lambda g: g.sum(),
        lambda g: (g * 2).norm(),
        lambda g: torch._foreach_norm([g])[0],
        lambda g: g.isnan().max(),
        lambda g: (g == g).min(),
        lambda g: (g.nan_to_num() * 8).int().max(),
        lambda g: (g.nan_to_num() * 8).long().min(),
        lambda g: torch.linalg.vector_norm(g, -torch.inf),
        lambda g: torch.linalg.vector_norm(g, -1.5),
    )

    def ranks(rank: int) -> None:
        pair = Pair(make_parameters(ODD), lr=0.1, bucket_bytes=512)
        grads = random_gradients(ODD, 2, 3)
        for of_rank in grads:
            of_rank[3][-1] = torch.nan
        pair.backward(grads)
        for p, whole in zip(pair.params, pair.oracle.reduced, strict=True):
            assert p.grad is not None and whole is not None
            for ask in questions if whole.numel() else questions[:8]:  # torch takes no maximum of nothing
                answer = ask(p.grad)
                assert type(answer) is torch.Tensor and answer.shape == () and same_everywhere(answer.nan_to_num(7))
                torch.testing.assert_close(answer, ask(whole), equal_nan=True)
            if whole.numel():
                assert same_bits(p.grad.abs().max(), whole.abs().max())
                assert same_bits(p.grad.min(), whole.min())

    run_ranks(2, ranks)


def test_torchs_clipping_by_norm_counts_all_ranks() -> None:
    def ranks(rank: int) -> None:
        pair = Pair(make_parameters(PLAIN), lr=0.1, t0=1)
        for step in range(3):
            pair.backward(random_gradients(PLAIN, 2, step))
            change_both(pair, lambda params: torch.nn.utils.clip_grad_norm_(params, 0.5))
            pair.step()
            pair.zero_grad()
        for p, twin in zip(pair.params, pair.oracle.params, strict=True):
            torch.testing.assert_close(p.detach(), twin.detach(), rtol=1e-5, atol=1e-6)

    run_ranks(2, ranks)


def test_a_change_waits_for_no_rank_and_a_norm_of_one_rank_is_an_error_on_all() -> None:
    def ranks(rank: int) -> tuple[str, str]:
        params = make_parameters(PLAIN)
        optimizer = ShardedASGD(named(params), lr=0.1, find_unused_parameters=True)
        if rank == 0:
            backward(params, random_gradients(PLAIN, 2, 0)[0])
            for p in params:
                p.grad.mul_(2)  # type: ignore[union-attr]
        first = quick_message(optimizer.step, ValueError)  # rank 1 joins here, and has not doubled its part
        optimizer.zero_grad()
        backward(params, random_gradients(PLAIN, 2, 1)[rank])
        return first, quick_message((lambda: params[3].grad.norm()) if rank else optimizer.step, RuntimeError)  # type: ignore[union-attr]

    changes, meetings = zip(*run_ranks(2, ranks), strict=True)
    one_message(list(changes), "change 1 of reduced gradients", "mul_(2) on 'layer")
    one_message(list(meetings), "vector_norm of the gradient of 'layer3.weight'", "step()")


def by_own_tokens(params: Sequence[Any], rank: int) -> None:
    for p in params:
        p.grad.mul_(1 / (rank + 3))


def assigned(params: Sequence[Any], rank: int) -> None:
    for p in params:
        p.grad = p.grad * 2.0 / torch.tensor(rank + 3.0)


def one_rank_only(params: Sequence[Any], rank: int) -> None:
    if rank:
        torch.nn.utils.clip_grad_value_(params, 0.05)


def zeroed_later(params: Sequence[Any], rank: int) -> None:
    params[0].grad.mul_(2)
    if rank:
        params[0].grad.zero_()


def test_ranks_that_change_gradients_differently_are_told() -> None:
    """Each rank changes its own part, so that the parameters would become a mixture of both."""

    def ranks(rank: int) -> list[str]:
        texts = []
        pair = Pair(make_parameters(PLAIN), lr=0.1, t0=1)
        for change in (by_own_tokens, assigned, one_rank_only, zeroed_later):
            backward(pair.params, random_gradients(PLAIN, 2, 0)[rank])
            change(pair.params, rank)
            before = [p.detach().clone() for p in pair.params]
            texts.append(quick_message(pair.optimizer.step, ValueError))
            assert all(map(same_bits, pair.params, before))
            pair.optimizer.zero_grad()
        pair.train(range(4))
        return texts

    for texts in zip(*run_ranks(2, ranks), strict=True):
        one_message(list(texts), "of reduced gradients", "rank 0", "rank 1")


def test_gradients_that_were_dropped_or_are_not_reduced_are_refused() -> None:
    def ranks(rank: int) -> None:
        params = make_parameters(PLAIN)
        optimizer = ShardedASGD(named(params), lr=0.1)
        backward(params, random_gradients(PLAIN, 2, 0)[rank])
        stale = params[0].grad * 2  # type: ignore[operator]
        optimizer.zero_grad()
        backward(params, random_gradients(PLAIN, 2, 1)[rank])
        params[0].grad = stale
        assert "layer0.weight" in quick_message(optimizer.step, RuntimeError)
        optimizer.zero_grad()
        backward(params, random_gradients(PLAIN, 2, 2)[rank])
        with optimizer.no_sync():
            backward(params, random_gradients(PLAIN, 2, 3)[rank])
        assert "no_sync()" in quick_message(lambda: params[0].grad.clamp_(0, 1), RuntimeError)  # type: ignore[union-attr]
        for p in params:
            p.grad.mul_(0.5)  # type: ignore[union-attr]
        optimizer.step()

    run_ranks(2, ranks)


def test_errors_are_raised_at_once_and_on_every_rank() -> None:
    """Neither when a reduction is complete, which may be in another call, nor on the rank alone that finds them."""

    def ranks(rank: int) -> list[str]:
        params = make_parameters(PLAIN)
        optimizer = ShardedASGD(named(params), lr=0.1)
        grads = random_gradients(PLAIN, 2, 0)[rank]
        backward(params, grads)
        grad = params[0].grad
        assert grad is not None
        messages = [message_of(grad.clamp_), message_of(lambda: grad.mul_(1j)), message_of(lambda: pickle.dumps(grad))]
        made = grad * 2
        optimizer.zero_grad()
        backward(params, grads)
        messages += [message_of(call) for call in (made.norm, lambda: made.mul_(2), lambda: grad.add_(made))]
        if rank == 0:
            with optimizer.no_sync():
                backward(params, grads)
        messages.append(quick_message(grad.norm))
        return messages

    first, second = run_ranks(2, ranks)
    assert first == second
    clamped, cast, pickled, *dropped, unreduced = first
    assert "clamp" in clamped and "ComplexFloat" in cast and "needs a whole gradient" in pickled
    assert all("was dropped by zero_grad()" in message for message in dropped) and "rank 0" in unreduced


@pytest.mark.parametrize(
    "drops", [lambda o: o.zero_grad(), lambda o: setattr(o.param_groups[0]["params"][0], "grad", None)]
)
def test_a_gradient_that_was_kept_does_not_become_the_next_one(drops: Callable[[ShardedASGD], Any]) -> None:
    """As in torch, where it would keep its values; here it has none any more, and says so."""

    def ranks(rank: int) -> None:
        pair = Pair(make_parameters(PLAIN), lr=0.1, t0=1)
        pair.backward(random_gradients(PLAIN, 2, 0))
        kept = pair.params[0].grad
        assert kept is not None
        kept.mul_(2)  # may still wait for the reduction when the gradient is dropped
        drops(pair.optimizer)
        pair.zero_grad()
        pair.backward(random_gradients(PLAIN, 2, 1))
        grad = pair.params[0].grad
        assert grad is not None
        for use in (kept.norm, lambda: kept.mul_(2), lambda: grad.add_(kept)):
            assert "was dropped by zero_grad()" in message_of(use)
        kept.zero_()
        pair.step()
        pair.zero_grad()
        pair.check("after all")

    run_ranks(2, ranks)


def test_what_needs_the_whole_gradient_still_raises() -> None:
    def ranks(rank: int) -> None:
        params = make_parameters(PLAIN)
        optimizer = ShardedASGD(named(params), lr=0.1)
        backward(params, random_gradients(PLAIN, 2, 0)[rank])
        grad: Any = params[0].grad
        other: Any = params[1].grad
        for wrong in (
            lambda: grad.sum(0),
            lambda: grad @ grad.T,
            lambda: grad[0],
            lambda: grad + other.sum(0, keepdim=True),
            lambda: torch.zeros(7, 5).add_(grad),
            lambda: torch.add(grad, 1, out=torch.zeros(7, 5)),
            lambda: grad + torch.ones(3, 7, 5),
            lambda: grad.bernoulli_(),
            lambda: dist.all_reduce(grad),
        ):
            assert "a whole gradient" in quick_message(wrong, RuntimeError)
        optimizer.step()

    run_ranks(2, ranks)


def test_parameters_set_to_pieces_are_named() -> None:
    def ranks(rank: int) -> str:
        params = make_parameters(PLAIN)
        optimizer = ShardedASGD(named(params), lr=0.1)
        backward(params, random_gradients(PLAIN, 2, 0)[rank])
        params[3].data = params[3].data - 0.1 * params[3].grad  # type: ignore[operator]
        assert params[3].isnan().all()
        return quick_message(optimizer.step, RuntimeError)

    one_message(run_ranks(2, ranks), "layer3.weight", "p.grad")
