"""No call on a tensor that stands for a piece ends a process: each works, or raises an error."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_asgd import ShardedASGD
from tests.support.oracle import Spec, backward, make_parameters, named, random_gradients
from tests.support.ranks import run_ranks

SHAPE = (8, 3)


def plain() -> Tensor:
    return torch.ones(SHAPE)


def parameter_with(name: str, value: Tensor) -> Tensor:
    p = torch.nn.Parameter(plain())
    setattr(p, name, value)
    return p


CALLS: dict[str, Callable[[Any], Any]] = {
    "untyped_storage": lambda x: x.untyped_storage().tolist(),
    "storage": lambda x: x.storage(),
    "set_ from storage": lambda x: plain().set_(x.untyped_storage(), 0, SHAPE, (3, 1)).sum(),
    "set_": lambda x: plain().set_(x).sum(),
    "x.set_": lambda x: x.set_(plain()),
    "x.data": lambda x: setattr(x, "data", plain()),
    "share_memory_": lambda x: x.share_memory_(),
    "numpy": lambda x: x.numpy(),
    "asarray": lambda x: x.__array__(),
    "tolist": lambda x: x.tolist(),
    "from_dlpack": lambda x: torch.from_dlpack(x),
    "dlpack": lambda x: x.__dlpack__(),
    "apply_": lambda x: x.apply_(float),
    "map_": lambda x: plain().map_(x, max),
    "view": lambda x: x.view(-1),
    "item of": lambda x: x[0],
    "into": lambda x: x.__setitem__(0, 1.0),
    "copied into a plain one": lambda x: plain().copy_(x),
    "out=": lambda x: torch.add(plain(), 1, out=x),
    "resize_": lambda x: x.resize_(100),
    "cat": lambda x: torch.cat([x, x]),
    "linear": lambda x: torch.nn.functional.linear(torch.ones(2, 3), x),
    "a step of torch's": lambda x: torch.optim.SGD([parameter_with("grad", x)], lr=0.1, fused=True).step(),
}
HARMLESS: dict[str, Callable[[Any], Any]] = {
    "repr": repr,
    "cpu": lambda x: x.cpu(),
    "detach": lambda x: x.detach(),
    "clone": lambda x: x.clone(),
    "copy": copy.copy,
    "to": lambda x: x.to(torch.float64),
}


@pytest.mark.parametrize("of", ["state", "gradient"])
def test_calls_on_pieces_work_or_raise(of: str) -> None:
    def ranks(rank: int) -> None:
        specs = [Spec(SHAPE), Spec((20,))]
        params = make_parameters(specs)
        optimizer = ShardedASGD(named(params), lr=0.1, t0=0)
        for step in range(3):
            backward(params, random_gradients(specs, 2, step)[rank])
            if step < 2:
                optimizer.step()
                optimizer.zero_grad()
        piece: Any = optimizer.state_dict()["state"][0]["ax"] if of == "state" else params[0].grad
        for name, call in CALLS.items():
            try:
                call(piece)
            except Exception as error:
                of_storage = of == "gradient" and "storage" in name  # its storage is on the meta device
                assert of_storage or "whole" in str(error), f"{name}: {error}"
            else:
                raise AssertionError(f"{name} did not raise")
        assert of == "gradient" or piece.data_ptr() == 0, "DCP's stager asks whether there is memory"
        for call in HARMLESS.values():
            repr(call(piece))
        assert piece.shape == SHAPE and piece.device == torch.device("cpu") and piece.dtype == torch.float32

    run_ranks(2, ranks)


def test_setting_a_parameter_to_its_average_raises() -> None:
    """As AWD-LSTM does for an evaluation: averaged_parameters() is the way."""

    def ranks(rank: int) -> None:
        specs = [Spec(SHAPE)]
        (p,) = make_parameters(specs)
        optimizer = ShardedASGD([("p", p)], lr=0.1, t0=0)
        backward([p], [plain()])
        optimizer.step()
        before = p.detach().clone()
        average: Any = optimizer.state[p]["ax"]
        with pytest.raises((RuntimeError, NotImplementedError)):
            p.data = average.clone()
        assert torch.equal(p, before)
        with pytest.raises((RuntimeError, NotImplementedError)):
            torch.nn.Linear(3, 8, bias=False).load_state_dict({"weight": average})
        with pytest.raises((RuntimeError, NotImplementedError)):  # asks no subclass of Tensor
            torch.from_dlpack(torch.utils.dlpack.to_dlpack(average)).sum()
        torch.save(p, io.BytesIO())
        step: Any = optimizer.state[p]["step"]
        for share in (step.share_memory_, lambda: torch.utils.dlpack.to_dlpack(step)):
            with pytest.raises((BufferError, RuntimeError)):
                share()
        with pytest.raises(RuntimeError):
            torch.nn.Parameter(torch.zeros(())).data = step
        assert step.device == torch.device("cpu") and float(step) == 1

    run_ranks(2, ranks)
