"""Gradients and parameters that travel in another dtype, and bf16 parameters that are rounded by chance."""

import math

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor

from dist_asgd import ShardedASGD
from dist_asgd.asgd.rounding import Rounding, round_stochastically
from dist_asgd.kernels import packing
from dist_asgd.kernels.tensor_list import Gradients, TensorList
from tests.support.oracle import Spec, backward, make_parameters, named, random_gradients
from tests.support.ranks import run_alone, run_ranks

SPECS = (Spec((7, 5)), Spec(()), Spec((64,)), Spec((5, 3, 2, 4), layout="channels_last"), Spec((257,)), Spec((9, 3)))
WIRES = (torch.bfloat16, torch.float16)
OPTIONS = {"lr": 0.05, "t0": 4, "weight_decay": 0.01}


class Masters:
    """The oracle: torch.optim.ASGD on fp32 masters of parameters that all ranks have as roundings of them."""

    def __init__(self, params: list[torch.nn.Parameter], wire: torch.dtype) -> None:
        self.wire, self.masters = wire, [torch.nn.Parameter(p.detach().clone()) for p in params]
        self.optimizer = torch.optim.ASGD(self.masters, foreach=False, **OPTIONS)

    def step(self, grads: list[list[torch.Tensor]]) -> None:
        """One list of gradients for each rank: each sent as `wire`, summed in fp32, in rank order."""
        for index, master in enumerate(self.masters):
            total = grads[0][index].to(self.wire).float()
            for own in grads[1:]:
                total = total + own[index].to(self.wire).float()
            master.grad = total / len(grads)
        self.optimizer.step()

    def check(self, params: list[torch.nn.Parameter]) -> None:
        for p, master in zip(params, self.masters, strict=True):
            assert torch.equal(p, master.to(self.wire).to(p.dtype))


@pytest.mark.parametrize("wire", WIRES, ids=str)
@pytest.mark.parametrize(("world_size", "overlap"), [(2, False), (2, True), (3, False), (4, True)])
def test_parameters_are_the_roundings_of_fp32_masters(world_size: int, overlap: bool, wire: torch.dtype) -> None:
    def ranks(rank: int) -> None:
        model = torch.nn.ParameterList(make_parameters(SPECS))
        params = list(model)
        oracle = Masters(params, wire)
        module = model if overlap else None
        optimizer = ShardedASGD(named(params), wire_dtype=wire, bucket_bytes=512, module=module, **OPTIONS)
        for step in range(25):
            grads = random_gradients(SPECS, world_size, step)
            backward(params, grads[rank])
            optimizer.step()
            optimizer.zero_grad()
            optimizer.synchronize()
            oracle.step(grads)
            oracle.check(params)
            if step == 12:  # what is written to a parameter is what training goes on from
                for p, master in zip(params[:2], oracle.masters[:2], strict=True):
                    with torch.no_grad():
                        p.mul_(1.2345)
                        master.copy_(p)
        state = optimizer.full_state_dict()
        for index in range(len(params)) if rank == 0 else []:
            expected = oracle.optimizer.state[oracle.masters[index]]
            assert torch.equal(state["state"][index]["ax"], expected["ax"])
        before = [p.detach().clone() for p in params]
        with optimizer.averaged_parameters():  # which travel in their own dtype
            for p, master in zip(params, oracle.masters, strict=True):
                assert torch.equal(p, oracle.optimizer.state[master]["ax"])
        assert all(map(torch.equal, params, before))

    run_ranks(world_size, ranks)


def test_one_call_packs_the_gradients_of_a_bucket_where_a_kernel_does(monkeypatch: pytest.MonkeyPatch) -> None:
    def ranks(rank: int) -> None:
        packed = []

        def pack(parts: TensorList, grads: Gradients, out: torch.Tensor) -> None:  # as the kernel of a GPU
            packed.append(len(out))
            for start, grad, address in zip(parts.starts, *grads, strict=True):
                if address:
                    out[start : start + grad.numel()] = grad.reshape(-1)

        monkeypatch.setitem(packing.FORMS, "cpu", lambda *kind: pack)
        params = list(make_parameters(SPECS))
        oracle = Masters(params, torch.bfloat16)
        optimizer = ShardedASGD(named(params), wire_dtype=torch.bfloat16, bucket_bytes=512, **OPTIONS)
        for step in range(3):
            grads = random_gradients(SPECS, 2, step)
            backward(params, grads[rank])
            optimizer.step()
            optimizer.zero_grad()
            oracle.step(grads)
            oracle.check(params)
        assert packed == 3 * [len(bucket.buffer) for bucket in optimizer._all_buckets()]

    run_ranks(2, ranks)


def test_a_frozen_parameter_becomes_what_the_others_received() -> None:
    """It lies in a bucket that travels: all ranks must have the same, and its master keeps what was lost.

    One that was frozen before lies in another, which does not travel.
    """

    def ranks(rank: int) -> None:
        params = make_parameters([Spec((40,))] * 4)
        values, apart = params[1].detach().clone(), params[3].detach().clone()
        params[3].requires_grad_(False)
        optimizer = ShardedASGD(named(params), wire_dtype=torch.bfloat16, **OPTIONS)
        params[1].requires_grad_(False)
        for step in range(3):
            backward(params, random_gradients([Spec((40,))] * 4, 2, step)[rank])
            optimizer.step()
            optimizer.zero_grad()
        assert torch.equal(params[1], values.bfloat16().float()) and torch.equal(params[3], apart)
        params[1].requires_grad_(True)
        backward(params, [torch.zeros(40)] * 4)
        optimizer.step()
        h = OPTIONS["lr"]
        expected = values * (1 - 1e-4 * h) - h * 0.01 * values
        torch.testing.assert_close(params[1].float(), expected.bfloat16().float())
        everyone = [torch.empty(40) for _ in range(2)]
        dist.all_gather(everyone, params[1].detach())
        assert torch.equal(*everyone)

    run_ranks(2, ranks)


def test_checkpoints_keep_the_masters(tmp_path) -> None:
    import torch.distributed.checkpoint as dcp

    def run(rank: int, world_size: int, steps: range, load: bool, save: bool) -> list[torch.Tensor]:
        params = make_parameters(SPECS, seed=1 if load else 0)
        optimizer = ShardedASGD(named(params), wire_dtype=torch.bfloat16, **OPTIONS)
        weights = dict(named(params))
        if load:
            state = {"model": weights, "optimizer": optimizer.state_dict()}
            dcp.load(state, checkpoint_id=str(tmp_path / "saved"))
            optimizer.load_state_dict(state["optimizer"])
        for step in steps:
            grads = random_gradients(SPECS, 2, step)
            own = grads[rank] if world_size == 2 else None
            mean = [(a.bfloat16().float() + b.bfloat16().float()) / 2 for a, b in zip(*grads, strict=True)]
            # On three ranks, each brings the same: what two ranks would have reduced, exact in bf16 or not.
            backward(params, own if own is not None else [g.bfloat16().float() for g in mean])
            optimizer.step()
            optimizer.zero_grad()
        if save:
            dcp.save({"model": weights, "optimizer": optimizer.state_dict()}, checkpoint_id=str(tmp_path / "saved"))
        return [p.detach().clone() for p in params]

    whole = run_ranks(2, run, 2, range(10), False, False)[0]
    run_ranks(2, run, 2, range(6), False, True)
    resumed = run_ranks(2, run, 2, range(6, 10), True, False)[0]
    assert all(map(torch.equal, whole, resumed))
    run_ranks(3, run, 3, range(6, 10), True, False)  # other bits, as the gradients are rounded once more


def test_replicas_of_a_dtensor_get_the_roundings_of_masters_too() -> None:
    """Their gradients are not ours to send, so they are not rounded."""

    def ranks(rank: int) -> None:
        mesh = init_device_mesh("cpu", (2,))
        plain = make_parameters(SPECS)
        twins = [torch.nn.Parameter(p.detach().clone()) for p in plain]
        params = [torch.nn.Parameter(distribute_tensor(p.detach(), mesh, [Replicate()])) for p in plain]
        optimizer = ShardedASGD(named(params), wire_dtype=torch.bfloat16, bucket_bytes=512, **OPTIONS)
        oracle = torch.optim.ASGD(twins, foreach=False, **OPTIONS)
        for step in range(12):
            for p, twin, grad in zip(params, twins, random_gradients(SPECS, 1, step)[0], strict=True):
                p.grad, twin.grad = distribute_tensor(grad, mesh, [Replicate()]), grad
            optimizer.step()
            oracle.step()
            for p, twin in zip(params, twins, strict=True):
                assert torch.equal(p.to_local(), twin.bfloat16().float())
        with optimizer.averaged_parameters():
            for p, twin in zip(params, twins, strict=True):
                assert torch.equal(p.to_local(), oracle.state[twin]["ax"])

    run_ranks(2, ranks)


def test_one_rank_sends_nothing_and_rounds_nothing() -> None:
    def alone() -> None:
        params = make_parameters(SPECS)
        twins = make_parameters(SPECS)
        optimizer = ShardedASGD(named(params), wire_dtype=torch.bfloat16, **OPTIONS)
        oracle = torch.optim.ASGD(twins, foreach=False, **OPTIONS)
        for step in range(8):
            grads = random_gradients(SPECS, 1, step)[0]
            for one in (params, twins):
                backward(one, grads)
            for one in (optimizer, oracle):
                one.step()
                one.zero_grad()
        assert all(map(torch.equal, params, twins))
        assert "master" not in optimizer.state[params[0]]

    run_alone(alone)


def test_a_wider_wire_only_carries_gradients() -> None:
    def ranks(rank: int) -> None:
        specs = [Spec((33,), torch.bfloat16), Spec((4, 4))]
        pairs = [make_parameters(specs) for _ in range(2)]
        for params, wire in zip(pairs, (None, torch.float64), strict=True):
            optimizer = ShardedASGD(named(params), wire_dtype=wire, **OPTIONS)
            for step in range(8):
                backward(params, random_gradients(specs, 2, step)[rank])
                optimizer.step()
                optimizer.zero_grad()
        assert all(map(torch.equal, *pairs))

    run_ranks(2, ranks)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"wire_dtype": torch.int32}, TypeError, "wire_dtype must be a floating-point torch.dtype or None"),
        ({"wire_dtype": torch.float8_e4m3fn}, TypeError, "wire_dtype must be torch.bfloat16"),
        ({"wire_dtype": torch.bfloat16, "master_weights": False}, ValueError, "takes masters"),
        ({"stochastic_rounding": True}, ValueError, "pass master_weights=False"),
        ({"stochastic_rounding": 1, "master_weights": False}, TypeError, "must be True or False"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, object], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        ShardedASGD(make_parameters(SPECS), **options)


# Stochastic rounding


def test_chances_are_those_of_the_fraction_that_is_cut_off() -> None:
    count, step = 200_000, 2.0**-7  # of bf16 between 1 and 2
    for fraction in (0.0, 0.1, 0.5, 0.93):
        values = torch.full((count,), 1 + fraction * step)
        for seed in (1, 2**31, 123456789):
            rounded = round_stochastically(values, seed, first=7).float()
            assert set(rounded.tolist()) <= {1.0, 1 + step}
            share = (rounded > 1).float().mean().item()
            assert abs(share - fraction) <= 5 * math.sqrt(fraction * (1 - fraction) / count) + 2**-16
    signs = round_stochastically(-torch.full((count,), 1 + 0.25 * step), 3, 0).float()
    assert abs(signs.mean().item() + 1 + 0.25 * step) < 1e-4


def test_choices_belong_to_elements_and_infinite_values_stay() -> None:
    values = torch.randn(1000)
    whole = round_stochastically(values, 5, 100)
    assert torch.equal(whole[300:], round_stochastically(values[300:], 5, 400))
    assert not torch.equal(whole, round_stochastically(values, 6, 100))
    odd = torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0, 1e-45])
    assert torch.equal(round_stochastically(odd[:2], 1, 0).float(), odd[:2])
    assert round_stochastically(odd, 1, 0)[2].isnan() and not round_stochastically(odd[3:5], 1, 0).any()
    assert not Rounding(torch.bfloat16).at(3, 4).first


@pytest.mark.parametrize("world_size", [1, 3])
def test_small_steps_add_up(world_size: int) -> None:
    """500 steps of 4e-4 from 1 to 0.8, each a tenth of what bf16 can tell apart there."""

    def train(stochastic: bool) -> tuple[torch.Tensor, torch.Tensor]:
        param = torch.nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
        options = {"lr": 4e-4, "lambd": 0.0, "t0": 0, "master_weights": False}
        optimizer = ShardedASGD([("p", param)], stochastic_rounding=stochastic, **options)
        for _ in range(500):
            backward([param], [torch.ones(4096, dtype=torch.bfloat16)])
            optimizer.step()
            optimizer.zero_grad()
        with optimizer.averaged_parameters():
            average = param.detach().float()
        return param.detach().float(), average

    def ranks(rank: int) -> torch.Tensor:
        stuck, _ = train(stochastic=False)
        assert (stuck == 1).all(), "rounding to the nearest loses every step"
        moved, average = train(stochastic=True)
        # Of one element: a random walk of steps of 2^-8 (standard deviation below 500 ** 0.5 * 2^-8 / 3).
        assert abs(moved.mean().item() - 0.8) < 0.004
        assert abs(average.mean().item() - 0.9) < 0.004
        return moved

    each = run_ranks(world_size, ranks)
    assert all(torch.equal(each[0], other) for other in each)
    assert torch.equal(each[0], run_alone(lambda: train(stochastic=True)[0])), "the same on any number of ranks"
