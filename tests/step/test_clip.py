"""clip_grad_norm_: the norm and the gradients of torch.nn.utils.clip_grad_norm_ over the whole model."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from dist_asgd import ShardedASGD
from tests.support.failures import one_message, quick_message
from tests.support.oracle import MIXED, PLAIN, Pair, Spec, backward, make_parameters, named, random_gradients, same_bits
from tests.support.ranks import message_of, run_ranks, same_everywhere

NAN = float("nan")
NORMS = (2.0, 1.0, 3.0, float("inf"), "inf", 2, 0.5, torch.tensor(2.0))


@pytest.mark.parametrize(
    ("world_size", "gradients"),
    [(1, "local"), (2, "local"), (3, "local"), (4, "local"), (1, "reduced"), (2, "reduced")],
)
def test_clip_grad_norm_equals_torchs(world_size: int, gradients: str) -> None:
    def clip(pair: Pair, max_norm: float, norm_type: Any, where: object) -> None:
        total = pair.optimizer.clip_grad_norm_(max_norm, norm_type)
        for p, g in zip(pair.oracle.params, pair.oracle.reduced, strict=True):
            p.grad = g
        some = [p for p in pair.oracle.params if p.numel()]  # torch cannot take the maximum of an empty gradient
        expected = torch.nn.utils.clip_grad_norm_(some, max_norm, norm_type)
        assert isinstance(total, torch.Tensor) and total.shape == ()
        torch.testing.assert_close(
            total.double(), expected.double(), rtol=1e-5, atol=1e-7, msg=lambda m: f"{where}: {m}"
        )
        assert not dist.is_initialized() or same_everywhere(total), where

    def ranks(rank: int) -> None:
        for specs in (PLAIN, [Spec((2,))], [*MIXED, Spec((90,))]):
            for norm_type in NORMS if world_size == 3 else NORMS[:4]:
                pair = Pair(make_parameters(specs), lr=0.1, t0=1, gradients=gradients, bucket_bytes=512)
                for step, max_norm in enumerate([0.5, 1e6, 0.01]):
                    pair.backward(random_gradients(specs, world_size, step))
                    clip(pair, max_norm, norm_type, (norm_type, max_norm))
                    pair.step()
                    pair.zero_grad()
                pair.optimizer.synchronize()
                for p, twin in zip(pair.params, pair.oracle.params, strict=True):
                    torch.testing.assert_close(p.detach(), twin.detach(), rtol=1e-5, atol=1e-6)

    run_ranks(world_size, ranks)


def test_clip_after_accumulation_twice_and_without_any_gradient() -> None:
    def ranks(rank: int) -> None:
        params = make_parameters(PLAIN)
        optimizer = ShardedASGD(named(params), lr=0.1, find_unused_parameters=True)
        assert optimizer.clip_grad_norm_(1.0).item() == 0
        for _ in range(2):
            with optimizer.no_sync():
                backward(params, [torch.full(s.shape, 3.0) for s in PLAIN])
        number = sum(p.numel() for p in params)
        total = optimizer.clip_grad_norm_(1.0)  # also takes up what no_sync() left
        torch.testing.assert_close(total, torch.tensor(6.0 * number**0.5))
        torch.testing.assert_close(optimizer.clip_grad_norm_(1.0), torch.tensor(1.0))
        before = [p.detach().clone() for p in params]
        optimizer.step()
        moved = torch.cat([(p.detach() - b * (1 - 1e-4 * 0.1)).flatten() for p, b in zip(params, before, strict=True)])
        torch.testing.assert_close(moved, torch.full((number,), -0.1 / number**0.5), rtol=1e-2, atol=1e-6)

    run_ranks(2, ranks)


def test_clip_counts_only_parameters_with_a_gradient() -> None:
    def ranks(rank: int) -> None:
        params = make_parameters(PLAIN)
        params[1].requires_grad_(False)
        optimizer = ShardedASGD(named(params), lr=0.1)
        ones = [torch.ones(s.shape) for s in PLAIN]
        backward(params, ones)
        expected = sum(p.numel() for p in params if p.requires_grad)
        assert optimizer.clip_grad_norm_(1e9, 1.0).item() == expected

    run_ranks(2, ranks)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_clip_of_a_bad_gradient_is_as_bad_as_torchs(bad: float) -> None:
    def ranks(rank: int) -> None:
        for norm_type in (2.0, float("inf")):
            pair = Pair(make_parameters(PLAIN), lr=0.1)
            grads = random_gradients(PLAIN, 2, 0)
            grads[1][3][200] = bad  # type: ignore[index]
            pair.backward(grads)
            total = pair.optimizer.clip_grad_norm_(1.0, norm_type)
            for p, g in zip(pair.oracle.params, pair.oracle.reduced, strict=True):
                p.grad = g
            assert same_bits(total, torch.nn.utils.clip_grad_norm_(pair.oracle.params, 1.0, norm_type))
            pair.step()
            for p, twin in zip(pair.params, pair.oracle.params, strict=True):
                assert torch.equal(p.isnan(), twin.isnan())

    run_ranks(2, ranks)


@pytest.mark.parametrize("norm_type", [2.0, 3.0, float("inf")])
def test_clipping_has_the_same_bits_for_any_bucket_size(norm_type: float) -> None:
    def train(rank: int, bucket_bytes: int) -> list[torch.Tensor]:
        params = make_parameters(PLAIN)
        optimizer = ShardedASGD(params, lr=0.1, t0=2, bucket_bytes=bucket_bytes)
        for step in range(10):
            backward(params, random_gradients(PLAIN, 3, step)[rank])
            assert optimizer.clip_grad_norm_(1.0, norm_type) > 1
            optimizer.step()
            optimizer.zero_grad()
        return [p.detach() for p in params]

    def ranks(rank: int) -> None:
        small, large = train(rank, 64), train(rank, 2**22)
        assert all(map(same_bits, small, large))

    run_ranks(3, ranks)


def test_clipping_where_there_is_nothing_to_clip() -> None:
    def ranks(rank: int) -> None:
        for params in ([torch.nn.Parameter(torch.zeros(0))], [{"params": []}]):
            optimizer = ShardedASGD(params, lr=0.1, find_unused_parameters=True)
            assert optimizer.clip_grad_norm_(1.0).item() == 0

    run_ranks(2, ranks)


@pytest.mark.parametrize(
    ("max_norm", "norm_type"),
    [
        (NAN, 2.0),
        (-1.0, 2.0),
        ("x", 2.0),
        (1.0, 0.0),
        (1.0, -1.0),
        (1.0, NAN),
        (1.0, "fro"),
        (None, 2.0),
        (torch.ones(2), 2.0),
    ],
)
def test_clip_grad_norm_of_nonsense(max_norm: Any, norm_type: Any) -> None:
    def ranks(rank: int) -> None:
        pair = Pair(make_parameters(PLAIN), lr=0.1, t0=0)
        pair.backward(random_gradients(PLAIN, 2, 0))
        message_of(lambda: pair.optimizer.clip_grad_norm_(max_norm, norm_type), ValueError, TypeError)
        pair.step()
        pair.check()

    run_ranks(2, ranks)


@pytest.mark.parametrize(("max_norm", "norm_type", "said"), [("x", 2.0, "max_norm"), (1.0, -1.0, "norm_type")])
def test_clip_grad_norm_of_nonsense_on_one_rank_only(max_norm: Any, norm_type: Any, said: str) -> None:
    def ranks(rank: int) -> str:
        pair = Pair(make_parameters(PLAIN), lr=0.1, t0=0)
        pair.backward(random_gradients(PLAIN, 2, 0))
        arguments = (max_norm, norm_type) if rank == 1 else (1.0, 2.0)
        text = quick_message(lambda: pair.optimizer.clip_grad_norm_(*arguments))
        pair.step()
        pair.check()
        return text

    one_message(run_ranks(2, ranks), said, "rank 1")


def test_clipping_to_another_norm_on_each_rank() -> None:
    def ranks(rank: int) -> str:
        pair = Pair(make_parameters(PLAIN), lr=0.1, t0=0)
        pair.backward(random_gradients(PLAIN, 2, 0))
        text = quick_message(lambda: pair.optimizer.clip_grad_norm_(1.0 + rank), RuntimeError)
        pair.step()
        pair.check()
        return text

    one_message(run_ranks(2, ranks), "max_norm=1.0", "max_norm=2.0", "rank 1")
