"""One look at all gradients: it sees what asking each of them sees, and holds nothing longer than a step."""

import weakref
from collections.abc import Callable

import pytest
import torch

from dist_asgd import ShardedASGD
from dist_asgd.kernels.scan import LayoutScan
from tests.support.oracle import PLAIN, Pair, make_parameters, random_gradients, same_bits
from tests.support.ranks import run_alone


class Subclass(torch.Tensor):
    pass


def lazily_negated(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.complex64).conj().imag


SHAPES: list[tuple[int, ...]] = [(3,), (4, 2), (1,), (), (1, 5), (0, 3), (6, 6)]
OTHERS = {
    "as expected": (1, lambda: torch.ones(4, 2)),
    "a size of 1 has any stride": (4, lambda: torch.ones(5, 1).t()),
    "none": (1, lambda: None),
    "sparse": (1, lambda: torch.ones(4, 2).to_sparse()),
    "meta": (1, lambda: torch.ones(4, 2, device="meta")),
    "double": (1, lambda: torch.ones(4, 2).double()),
    "int32": (1, lambda: torch.ones(4, 2, dtype=torch.int32)),
    "flat": (1, lambda: torch.ones(8)),
    "as many elements": (1, lambda: torch.ones(2, 4)),
    "transposed": (6, lambda: torch.ones(6, 6).t()),
    "expanded": (6, lambda: torch.ones(1, 6).expand(6, 6)),
    "of a class": (1, lambda: torch.ones(4, 2).as_subclass(Subclass)),
    "negated": (0, lambda: lazily_negated((3,))),
    "one, negated": (2, lambda: lazily_negated((1,))),
    "scalar, negated": (3, lambda: lazily_negated(())),
}


@pytest.mark.parametrize("what", OTHERS)
def test_a_look_sees_what_asking_each_sees(what: str) -> None:
    position, make = OTHERS[what]
    like, strides = torch.zeros(1), [torch.zeros(shape).stride() for shape in SHAPES]
    scan = LayoutScan.of(SHAPES, strides, like)
    if scan._functions is None:
        pytest.skip("NO C COMPILER HERE, or a PyTorch without DLPack's exchange API: only asking each was tested")
    grads = [torch.ones(shape) for shape in SHAPES]
    grads[position] = make()
    for each in (scan, LayoutScan(SHAPES, strides, like, None)):
        found = each.scan(grads)
        if what == "as expected":
            assert found is not None and list(found.addresses) == [grad.data_ptr() for grad in grads]
        elif "any stride" not in what:  # in which asking each may be stricter
            assert found is None


CHANGES: dict[str, Callable[[torch.Tensor], object]] = {
    "transposed": lambda grad: grad.t_(),
    "other memory": lambda grad: setattr(grad, "data", grad.detach() + 1),
    "double": lambda grad: setattr(grad, "data", grad.detach().double()),
    "lazily negated": lambda grad: setattr(grad, "data", lazily_negated((6, 6))),
    "flat": lambda grad: setattr(grad, "data", torch.ones(36)),
    "longer": lambda grad: grad.resize_(7, 6),
    "shorter": lambda grad: grad.resize_(2, 3),
}
REFUSED = ("flat", "longer", "shorter")


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("how", CHANGES)
def test_gradients_changed_in_place_are_taken_as_they_are_or_refused(how: str, fresh: bool) -> None:
    """torch checks a gradient when it is assigned, and not what is done to it later."""

    def alone() -> None:
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(6, 6)) for _ in range(3)]
        twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
        optimizer = ShardedASGD([(f"p{i}", p) for i, p in enumerate(params)], lr=0.1, t0=0)
        oracle = torch.optim.ASGD(twins, lr=0.1, t0=0, foreach=False)
        for step in range(4):
            for p in params:
                if fresh or step == 0:
                    p.grad = torch.randn(6, 6)
            if step == 2:
                CHANGES[how](params[1].grad)
            before = [p.detach().clone() for p in params]
            if step == 2 and how in REFUSED:
                with pytest.raises(RuntimeError, match="'p1'"):
                    optimizer.step()
                assert all(map(same_bits, params, before))
                return
            for p, twin in zip(params, twins, strict=True):
                twin.grad = p.grad.to(torch.float32).clone()
            optimizer.step()
            oracle.step()
            assert all(map(same_bits, params, twins)), step

    run_alone(alone)


def test_gradients_are_held_by_nobody_after_a_step_or_a_clip() -> None:
    def alone() -> None:
        pair = Pair(make_parameters(PLAIN), lr=0.1, t0=0, gradients="reduced")
        for call in (pair.optimizer.step, lambda: pair.optimizer.clip_grad_norm_(1.0)):
            pair.backward(random_gradients(PLAIN, 1, 0))
            grads = [weakref.ref(p.grad) for p in pair.params]
            call()
            pair.optimizer.zero_grad()
            assert not any(grad() is not None for grad in grads)

    run_alone(alone)
