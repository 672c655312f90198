"""bf16 and fp16: fp32 masters and averages; torch's own average stands still there."""

from typing import Any

import pytest
import torch

from dist_asgd import ShardedASGD
from tests.support.oracle import Pair, Spec, backward, make_parameters, named, random_gradients, same_bits, wide
from tests.support.ranks import run_alone, run_ranks

LOW = [torch.bfloat16, torch.float16]


def low_specs(dtype: torch.dtype) -> list[Spec]:
    shapes = [Spec((7, 5), dtype), Spec((), dtype), Spec((0,), dtype), Spec((131,), dtype), Spec((1,), dtype)]
    return [*shapes, Spec((4, 6), dtype, "transposed"), Spec((33,)), Spec((65,), dtype)]


@pytest.mark.parametrize(
    ("world_size", "gradients", "dtype"),
    [
        (1, "local", torch.bfloat16),
        (2, "local", torch.float16),
        (3, "local", torch.bfloat16),
        (4, "local", torch.float16),
        (1, "reduced", torch.float16),
        (2, "reduced", torch.bfloat16),
    ],
)
def test_masters_and_averages_equal_an_fp32_run(world_size: int, gradients: str, dtype: torch.dtype) -> None:
    def ranks(rank: int) -> None:
        specs = low_specs(dtype)
        for options in ({"t0": 0, "lambd": 0.01}, {"t0": 3, "weight_decay": 0.1, "maximize": True}, {"t0": 1e6}):
            pair = Pair(make_parameters(specs), lr=0.01, gradients=gradients, bucket_bytes=256, **options)
            for step in range(12):
                pair.backward(random_gradients(specs, world_size, step))
                pair.step()
                pair.zero_grad()
                if step < 6 or step == 11:
                    pair.check((step, options))

    run_ranks(world_size, ranks)


def test_every_dtype_in_one_optimizer() -> None:
    def ranks(rank: int) -> None:
        dtypes = [torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.complex64, torch.complex128]
        specs = [Spec(shape, dtype) for dtype in dtypes for shape in ((5, 3), (67,))]
        pair = Pair(make_parameters(specs), lr=0.05, t0=2, lambd=0.01)
        for step in range(20):
            pair.backward(random_gradients(specs, 3, step))
            pair.step()
            pair.zero_grad()
            pair.check_parameters(step)
        pair.check()

    run_ranks(3, ranks)


@pytest.mark.parametrize(("world_size", "steps"), [(1, 4096), (2, 2048)])
def test_the_bf16_average_follows_a_drift_where_torchs_stands_still(world_size: int, steps: int) -> None:
    """From 1 to 2, in steps below bf16's resolution: the mean is 1.5. torch is shown the same iterates."""

    def ranks(rank: int) -> None:
        p, twin = (torch.nn.Parameter(torch.ones(40, dtype=torch.bfloat16)) for _ in range(2))
        optimizer = ShardedASGD([("w", p)], lr=1 / steps, lambd=0.0, t0=0)
        reference = torch.optim.ASGD([twin], lr=0.0, lambd=0.0, t0=0)
        twin.grad = torch.zeros_like(twin)
        for _ in range(steps):
            p.grad = -torch.ones_like(p)
            optimizer.step()
            with torch.no_grad():
                twin.copy_(p)
            reference.step()
        assert p.min() == p.max() == twin[0] == 2
        assert torch.equal(reference.state[twin]["ax"], torch.ones_like(twin))
        full = optimizer.full_state_dict()
        if rank == 0:
            ax = full["state"][0]["ax"]
            assert ax.dtype == torch.float32 and (ax - 1.5).abs().max() < 1e-3, ax

    run_ranks(world_size, ranks)


def test_small_steps_are_not_lost_in_bf16() -> None:
    def alone(master_weights: bool) -> float:
        p = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
        optimizer = ShardedASGD([p], lr=1e-4, lambd=0.0, master_weights=master_weights)
        for _ in range(1000):
            p.grad = -torch.ones_like(p)
            optimizer.step()
        return p[0].item()

    assert abs(run_alone(alone, True) - 1.1) < 0.01
    assert run_alone(alone, False) == 1.0


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_without_masters_each_step_is_computed_in_fp32_and_rounded_once(world_size: int, dtype: torch.dtype) -> None:
    def ranks(rank: int) -> None:
        specs = low_specs(dtype)
        params = make_parameters(specs)
        optimizer = ShardedASGD(named(params), lr=0.05, t0=1, lambd=0.1, weight_decay=0.1, master_weights=False)
        reference = Pair(make_parameters(specs), lr=0.05, t0=1, lambd=0.1, weight_decay=0.1).oracle
        sums = [torch.zeros(p.shape, dtype=torch.float64) for p in params]
        for step in range(1, 31):
            by_rank = random_gradients(specs, world_size, step)
            backward(params, by_rank[rank])
            optimizer.step()
            optimizer.zero_grad()
            reference.backward(by_rank)
            reference.step()
            reference.zero_grad()
            with torch.no_grad():
                for index, (p, twin) in enumerate(zip(params, reference.params, strict=True)):
                    assert same_bits(p, twin.to(p.dtype)), (index, step)
                    twin.copy_(p)
                    if step >= 3:  # t0 + 2
                        sums[index] += p.double()
        full = optimizer.full_state_dict()
        if rank == 0:
            for index, total in enumerate(sums):
                ax = full["state"][index]["ax"]
                assert ax.dtype == torch.float32 and "master" not in full["state"][index]
                torch.testing.assert_close(ax.double(), total / 28, rtol=1e-2, atol=1e-2)

    run_ranks(world_size, ranks)


def test_the_state_has_a_master_only_where_there_is_one() -> None:
    def ranks(rank: int) -> None:
        specs = [Spec((9,), torch.bfloat16), Spec((9,)), Spec((9,), torch.float16)]
        with_masters = ShardedASGD(named(make_parameters(specs)), lr=0.1)
        without = ShardedASGD(named(make_parameters(specs)), lr=0.1, master_weights=False)
        keys = [set(entry) for entry in with_masters.state_dict()["state"].values()]
        assert [("master" in k) for k in keys] == [True, False, True]
        assert all("master" not in entry for entry in without.state_dict()["state"].values())

    run_ranks(2, ranks)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_averages_dtype_may_be_chosen(dtype: torch.dtype) -> None:
    def ranks(rank: int) -> None:
        specs = [Spec((50,), dtype)]
        (p,) = make_parameters(specs)
        optimizer = ShardedASGD([("w", p)], lr=0.01, t0=0, average_dtype=torch.bfloat16)
        exact = []
        for step in range(12):
            backward([p], random_gradients(specs, 2, step)[rank])
            optimizer.step()
            optimizer.zero_grad()
            exact.append(p.detach().double().clone())
        assert optimizer.state_dict()["state"][0]["ax"].dtype == torch.bfloat16
        full = optimizer.full_state_dict()
        if rank == 0:
            ax = full["state"][0]["ax"]
            assert ax.dtype == torch.bfloat16
            torch.testing.assert_close(ax.double(), torch.stack(exact[1:]).mean(0), rtol=0.03, atol=0.03)

    run_ranks(2, ranks)


def test_a_wider_average_of_fp32_parameters() -> None:
    def alone() -> None:
        (p,) = make_parameters([Spec((50,))])
        optimizer = ShardedASGD([p], lr=0.01, t0=0, average_dtype=torch.float64)
        seen = []
        for step in range(50):
            p.grad = random_gradients([Spec((50,))], 1, step)[0][0]
            optimizer.step()
            seen.append(p.detach().double().clone())
        ax = optimizer.full_state_dict()["state"][0]["ax"]
        assert ax.dtype == torch.float64
        torch.testing.assert_close(ax, torch.stack(seen[1:]).mean(0), rtol=1e-6, atol=1e-7)  # mu is an fp32 number

    run_alone(alone)


# Values written from outside


@pytest.mark.parametrize("how", ["copy_", "fill_", "data.copy_", "mul_", "load_state_dict"])
@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
def test_values_written_to_a_parameter_are_honoured(dtype: torch.dtype, how: str) -> None:
    specs = [Spec((7, 5), dtype), Spec((131,), dtype)]

    def write(module: torch.nn.ParameterList, index: int, step: int) -> None:
        p = module[index]
        values = specs[index].random(torch.Generator().manual_seed(step))
        with torch.no_grad():
            if how == "copy_":
                p.copy_(values)
            elif how == "fill_":
                p.fill_(0.3)
            elif how == "data.copy_":
                p.data.copy_(values)
            elif how == "mul_":
                p.mul_(3)
            else:
                module.load_state_dict({**module.state_dict(), str(index): values})

    def ranks(rank: int) -> None:
        params = torch.nn.ParameterList(make_parameters(specs))
        pair = Pair(list(params), lr=0.01, t0=2)
        for step in range(16):
            if step in (0, 1, 5, 6, 11):  # before the first step, around t0, while averaging
                write(params, step % 2, step)
                written, master = params[step % 2].detach(), pair.oracle.params[step % 2]
                with torch.no_grad():  # a master stays where it still rounds to its parameter
                    master.copy_(torch.where(master.to(dtype) == written, master, wide(written)))
            pair.backward(random_gradients(specs, 2, step))
            pair.step()
            pair.zero_grad()
            pair.check((step, how))

    run_ranks(2, ranks)


def test_one_element_written_moves_only_its_master() -> None:
    def alone() -> None:
        p = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
        optimizer = ShardedASGD([p], lr=1e-3, lambd=0.0)

        def step() -> None:
            p.grad = -torch.ones_like(p)
            optimizer.step()

        step()  # masters 1.001, parameters still 1
        assert p.tolist() == [1, 1, 1, 1]
        with torch.no_grad():
            p[2] = 2.0
        step()
        full: dict[str, Any] = optimizer.full_state_dict()["state"][0]
        expected = torch.tensor([1.002, 1.002, 2.001, 1.002])
        torch.testing.assert_close(full["ax"], expected, rtol=1e-6, atol=1e-6)  # before t0: the master

    run_alone(alone)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_gradients_are_summed_in_fp32(dtype: torch.dtype) -> None:
    """256 + 1 + 1 + 1 in bf16 is 256; in fp32 259."""

    def ranks(rank: int) -> None:
        big = 256.0 if dtype == torch.bfloat16 else 2048.0
        p = torch.nn.Parameter(torch.zeros(64, dtype=dtype))
        optimizer = ShardedASGD([("w", p)], lr=1.0, lambd=0.0)
        backward([p], [torch.full((64,), big if rank == 0 else 1.0, dtype=dtype)])
        optimizer.step()
        full = optimizer.full_state_dict()
        if rank == 0:
            assert torch.equal(full["state"][0]["ax"], torch.full((64,), -(big + 3) / 4))
        assert torch.equal(wide(p.detach()), wide(torch.full((64,), -(big + 3) / 4).to(dtype)))

    run_ranks(4, ranks)
