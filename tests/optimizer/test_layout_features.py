"""What a training loop does besides stepping means the same under every layout."""

import contextlib
import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from dist_asgd import ShardedASGD
from tests.support import dtensors
from tests.support.failures import quick_message
from tests.support.layouts import (
    FSDP2,
    WORLD_SIZES,
    Model,
    backward,
    batch,
    build,
    data_rank,
    give_gradients,
    mesh_of,
    named_parameters,
    options_of,
    place,
    tensor_parallel,
    train,
    whole,
)
from tests.support.oracle import same_bits, wide
from tests.support.ranks import Sent, run_ranks

OPTIONS: dict[str, Any] = {"lr": 0.05, "lambd": 1e-3, "t0": 5}
LAYOUTS = [(layout, sizes[-1]) for layout, sizes in WORLD_SIZES.items()]
each_layout = pytest.mark.parametrize(("layout", "world_size"), LAYOUTS)


def locals_of(model: nn.Module | ShardedASGD) -> list[Tensor]:
    """What this rank has of the parameters; of a model only while FSDP has no whole copies in their place."""
    optimizer = isinstance(model, ShardedASGD)
    params = model.param_groups[0]["params"] if optimizer else named_parameters(model).values()
    return [(p.to_local() if isinstance(p, DTensor) else p).detach().clone() for p in params]


def all_same(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(map(same_bits, some, others))


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-6) -> bool:
    # Gradients are sums of numbers around 1: in a bias that is all but 0, their rounding shows without end.
    size = max(float(expected.norm()), 1e-2 * expected.numel() ** 0.5)
    return bool((found - expected).norm() <= tolerance * size)


# FSDP2's policies: equal to torch.optim.ASGD under the same policy, bit for bit


def policies() -> dict[str, dict[str, Any]]:
    return {
        "reshard": {"reshard_after_forward": True},
        "no reshard": {"reshard_after_forward": False},
        "mixed precision": {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32)},
        "bf16 reduction": {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16)},
        "cpu offload": {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
        "other dims": {"shard_placement_fn": lambda p: Shard(1) if p.ndim > 1 and p.shape[1] % 2 == 0 else Shard(0)},
    }


@pytest.mark.parametrize(
    ("layout", "policy"),
    [*(("fsdp", policy) for policy in policies()), ("hsdp", "mixed precision")],
)
def test_fsdp2_policies(policy: str, layout: str) -> None:
    def ranks(rank: int) -> None:
        model, twin = (place(layout, Model(), **policies()[policy]) for _ in range(2))
        optimizer = ShardedASGD(model.named_parameters(), module=model, **OPTIONS)
        oracle = torch.optim.ASGD(twin.parameters(), foreach=False, **OPTIONS)
        for step in range(8):  # averaging has begun
            train(model, optimizer, layout, range(step, step + 1))
            train(twin, oracle, layout, range(step, step + 1))
            assert all_same(locals_of(model), locals_of(twin)), step
        full = optimizer.full_state_dict()
        for index, param in enumerate(twin.parameters()):
            expected = whole(oracle.state[param]["ax"])
            assert not full or same_bits(full["state"][index]["ax"], expected), index

    run_ranks(2, ranks)


def test_what_fsdp2_offloads_has_no_hook_for_which_it_would_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """While the optimizer is built, the mesh says that it is of GPUs. A hook would change the class of gradients."""

    def ranks(rank: int) -> None:
        model = place("fsdp", Model(), offload_policy=CPUOffloadPolicy(pin_memory=False))
        with monkeypatch.context() as patch:
            patch.setattr(DeviceMesh, "device_type", "cuda")
            optimizer = ShardedASGD(model.named_parameters(), module=model, **OPTIONS)
        backward(model, "fsdp", 0)
        assert {type(param.grad) for param in model.parameters()} == {DTensor}
        optimizer.step()

    run_ranks(2, ranks)


@pytest.mark.parametrize("layout", ["fsdp", "hsdp", "tp"])
def test_bf16_parameters_have_masters_and_an_average_that_is_right(layout: str) -> None:
    def ranks(rank: int) -> None:
        model = place(layout, Model().to(torch.bfloat16))
        optimizer = ShardedASGD(model.named_parameters(), **options_of(layout, model), **OPTIONS)
        oracle_model = Model().to(torch.bfloat16).float()
        oracle = torch.optim.ASGD(oracle_model.parameters(), foreach=False, **OPTIONS)
        for step in range(12):
            give_gradients(named_parameters(model), step)
            give_gradients(dict(oracle_model.named_parameters()), step)
            optimizer.step()
            oracle.step()
        full = optimizer.full_state_dict()
        for index, (param, twin) in enumerate(zip(model.parameters(), oracle_model.parameters(), strict=True)):
            assert same_bits(whole(param), twin.detach().bfloat16()), index
            assert not full or same_bits(full["state"][index]["ax"], oracle.state[twin]["ax"]), index
        with optimizer.averaged_parameters():
            for param, twin in zip(optimizer.param_groups[0]["params"], oracle_model.parameters(), strict=True):
                assert same_bits(whole(param), wide(oracle.state[twin]["ax"]).bfloat16())

    run_ranks(2, ranks)


@pytest.mark.parametrize(("world_size", "layouts"), [(3, ("zero", "fsdp", "tp")), (4, ("hsdp",))])
def test_a_full_state_dict_of_bf16_parameters_goes_on_with_the_bits_of_no_stop(
    world_size: int, layouts: tuple[str, ...]
) -> None:
    """fp32 masters included: without them a run that resumes takes up the roundings of its parameters."""

    def start(layout: str, seed: int) -> tuple[torch.nn.Module, ShardedASGD]:
        model = place(layout, Model(seed).to(torch.bfloat16))
        return model, ShardedASGD(model.named_parameters(), **options_of(layout, model), **OPTIONS)

    def go_on(model: torch.nn.Module, optimizer: ShardedASGD, steps: range) -> list[Any]:
        for step in steps:
            give_gradients(named_parameters(model), step)
            optimizer.step()
        box = [optimizer.full_state_dict()]
        dist.broadcast_object_list(box, src=0)
        return [*box, {name: whole(param) for name, param in named_parameters(model).items()}]

    def ranks(rank: int) -> None:
        for layout in layouts:
            model, optimizer = start(layout, seed=0)
            full, values = go_on(model, optimizer, range(8))
            expected = go_on(model, optimizer, range(8, 12))
            model, optimizer = start(layout, seed=1)
            with torch.no_grad():
                for name, param in named_parameters(model).items():
                    param.copy_(distribute_as(param, values[name]))
            optimizer.load_state_dict(full)
            assert same(go_on(model, optimizer, range(8, 12)), expected), layout
            assert full["state"][0]["master"].dtype == torch.float32

    run_ranks(world_size, ranks)


def distribute_as(param: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return dtensors.distribute(value, param) if isinstance(param, DTensor) else value


def same(found: Any, expected: Any) -> bool:
    """Whether trees of dicts, lists, tensors and plain values are equal, tensors bit for bit."""
    if isinstance(expected, torch.Tensor):
        return same_bits(found, expected)
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(same(found[key], expected[key]) for key in expected)
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(same, found, expected))
    return found == expected


# Gradients


@pytest.mark.parametrize(("world_size", "accumulate"), [(2, True), (4, False)])
def test_partial_gradients_of_sequence_parallel_norms(world_size: int, accumulate: bool) -> None:
    def ranks(rank: int) -> None:
        model, oracle_model = Model(), Model()
        tensor_parallel(model, mesh_of("tp"), sequence=True)
        optimizer = ShardedASGD(model.named_parameters(), gradients="reduced", **OPTIONS)
        oracle = torch.optim.ASGD(oracle_model.parameters(), foreach=False, **OPTIONS)
        partial = False
        for step in range(4):
            with optimizer.no_sync() if accumulate else contextlib.nullcontext():
                backward(model, "tp", 100 + step)
                partial |= any(p.is_partial() for p in model.blocks[0].norm.weight.grad.placements)
            backward(model, "tp", step)
            for part in (step, 100 + step):
                x, y = batch(part)
                (oracle_model(x) - y).square().mean().backward()
            with Sent() as sent:
                optimizer.step()
            # The agreement is for the plain parameters that are in it; the rest is all-gathers, by bucket.
            assert len(sent.sizes) <= 3 or step == 0, sent.sizes
            oracle.step()
            optimizer.zero_grad()
            oracle.zero_grad()
        assert partial == accumulate, (
            "inside no_sync() gradients stay as they are, outside they are reduced in backward"
        )
        for name, twin in oracle_model.named_parameters():
            assert close(whole(named_parameters(model)[name]), twin.detach()), name

    run_ranks(world_size, ranks)


def test_partial_gradients_that_were_assigned_are_reduced_by_the_step() -> None:
    def ranks(rank: int) -> None:
        mesh = mesh_of("tp")
        param = nn.Parameter(distribute_tensor(torch.ones(5), mesh, [Replicate()]))
        optimizer = ShardedASGD([param], lr=1.0, lambd=0)
        param.grad = DTensor.from_local(torch.full((5,), 1.0 + rank), mesh, [Partial()], run_check=False)
        optimizer.step()
        assert torch.equal(param.to_local(), torch.full((5,), 1.0 - 3.0))

    run_ranks(2, ranks)


@each_layout
def test_accumulation_inside_no_sync_sends_no_gradients(layout: str, world_size: int) -> None:
    def ranks(rank: int) -> None:
        model = place(layout, Model())
        options = options_of(layout, model) | {"module": model}
        optimizer = ShardedASGD(list(named_parameters(model).items()), **options, **OPTIONS)
        oracle_model = Model()
        oracle = torch.optim.ASGD(oracle_model.parameters(), foreach=False, **OPTIONS)
        for step in range(3):
            for part in (200 + step, 100 + step, step):
                with optimizer.no_sync() if part > 99 else contextlib.nullcontext(), Reductions() as reductions:
                    backward(model, layout, part)
                assert part < 100 or reductions.count == 0 or "tp" in layout, "gradients were sent"
                x, y = batch(part)
                (oracle_model(x) - y).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            oracle.step()
            oracle.zero_grad()
        optimizer.synchronize()
        for name, twin in oracle_model.named_parameters():
            assert close(whole(named_parameters(model)[name]), twin.detach()), name

    run_ranks(world_size, ranks)


class Reductions(Sent):
    """How many collectives in its block reduce something or exchange parts of it; forward's all-gathers do not."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.namespace in ("c10d", "_c10d_functional") and any(
            kind in func._opname for kind in ("reduce", "alltoall", "all_to_all")
        )
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("layout", "world_size", "share"),
    [*((*case, True) for case in LAYOUTS), ("hsdp", 4, False), ("tp", 3, False)],
)
def test_clipping(layout: str, world_size: int, share: bool) -> None:
    def ranks(rank: int) -> list[float]:
        model, optimizer = build(layout, shard_replicas=share, **OPTIONS)
        oracle_model, norms = Model(), []
        oracle = torch.optim.ASGD(oracle_model.parameters(), foreach=False, **OPTIONS)
        for norm_type in (2.0, float("inf"), 1.0):
            give_gradients(named_parameters(model), 1)
            give_gradients(dict(oracle_model.named_parameters()), 1)
            expected = torch.nn.utils.clip_grad_norm_(oracle_model.parameters(), 0.5, norm_type)
            norm = optimizer.clip_grad_norm_(0.5, norm_type)
            assert type(norm) is Tensor and norm.shape == ()
            assert close(norm, expected), (norm, expected)
            oracle.step()
            optimizer.step()
            optimizer.synchronize()
            for name, twin in oracle_model.named_parameters():
                assert close(whole(named_parameters(model)[name]), twin.detach()), (name, norm_type)
            optimizer.zero_grad()
            norms.append(norm.item())
        return norms

    assert len(set(map(tuple, run_ranks(world_size, ranks)))) == 1, "the norm differs between ranks"


@each_layout
def test_grad_scaler_skips_on_all_ranks_what_overflows_on_one(layout: str, world_size: int) -> None:
    def ranks(rank: int) -> list[float]:
        model, optimizer = build(layout, **OPTIONS)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
        scales = []
        for step in range(6):
            x, y = batch(step, *data_rank(layout))
            last = rank == world_size - 1
            infinite = step == 3 and last and layout in ("zero", "ddp")  # these reduce it
            scaler.scale((model(x) - y).square().mean() * (float("inf") if infinite else 1)).backward()
            before = locals_of(model)
            if step == 3 and last and not infinite:
                overflow(model)
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            assert all_same(before, locals_of(model)) == (step == 3), "the step was taken on some rank, or on none"
            optimizer.zero_grad()
            scales.append(scaler.get_scale())
        return scales

    assert run_ranks(world_size, ranks) == [[1024.0, 2048.0, 2048.0, 1024.0, 1024.0, 2048.0]] * world_size


def overflow(model: nn.Module) -> None:
    """An inf in the gradient of the elements that this rank has."""
    grads = [p.grad.to_local() for p in model.parameters() if isinstance(p.grad, DTensor)]
    max(grads, key=Tensor.numel).view(-1)[0] = float("inf")


def test_gradients_of_dtensors_are_copied_and_saved_as_such(tmp_path: Path) -> None:
    """After backward they are of a class of ours, which nobody else should notice."""

    def ranks(rank: int) -> None:
        model, _ = build("fsdp", **OPTIONS)
        backward(model, "fsdp", 0)
        backward(model, "fsdp", 1)
        grad = model.inside.weight.grad
        torch.save(grad, tmp_path / f"{rank}.pt")
        loaded = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        for copied in (copy.deepcopy(grad), loaded, grad.clone(), grad + 0):
            assert type(copied) is DTensor and same_bits(copied.to_local(), grad.to_local())
        total = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        assert total.full_tensor() > 0

    run_ranks(2, ranks)


def test_a_backward_through_values_before_the_step_is_refused() -> None:
    def ranks(rank: int) -> str:
        model = place("tp", Model())
        params = [p for p in model.parameters() if isinstance(p, DTensor)]
        optimizer = ShardedASGD(params, **OPTIONS)
        loss = (model(batch(0)[0])).square().mean()
        loss.backward(retain_graph=True)
        optimizer.step()
        return quick_message(loss.backward)

    assert all("modified by an inplace operation" in text for text in run_ranks(2, ranks))


def test_plain_parameters_and_dtensors_in_one_optimizer() -> None:
    """The plain ones reduced here, the others by FSDP2: clipping and GradScaler see all of them."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.scale = Model(), nn.Parameter(torch.ones(3, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x) * self.scale.sum()

    def ranks(rank: int) -> None:
        model, oracle_model = Mixed(), Mixed()
        fully_shard(model.body)
        optimizer = ShardedASGD(model.named_parameters(), module=model, **OPTIONS)
        oracle = torch.optim.ASGD(oracle_model.parameters(), foreach=False, **OPTIONS)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        for step in range(12):
            x, y = batch(step, rank, 3)
            scaler.scale((model(x) - y).square().mean()).backward()
            scaler.unscale_(optimizer)
            norm = optimizer.clip_grad_norm_(0.3)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            x, y = batch(step)
            (oracle_model(x) - y).square().mean().backward()
            assert close(norm, torch.nn.utils.clip_grad_norm_(oracle_model.parameters(), 0.3), 1e-5)
            oracle.step()
            oracle.zero_grad()
        optimizer.synchronize()
        for name, twin in oracle_model.named_parameters():
            assert close(whole(named_parameters(model)[name]), twin.detach(), 1e-5), name
        with optimizer.averaged_parameters():
            for name, twin in oracle_model.named_parameters():
                assert close(whole(named_parameters(model)[name]), oracle.state[twin]["ax"], 1e-5), name

    run_ranks(3, ranks)


# Averages


@each_layout
def test_forward_computes_with_averages_inside_the_block_and_with_the_parameters_after_it(
    layout: str, world_size: int
) -> None:
    """FSDP2 may have whole copies of either from the last forward; they must not be used again."""

    def ranks(rank: int) -> None:
        options = {**OPTIONS, "t0": 2}
        model, optimizer = build(layout, **options)
        train(model, optimizer, layout, range(6))
        averages: list[Any] = [optimizer.full_state_dict()]
        dist.broadcast_object_list(averages, src=0)
        expected = Model()
        names = list(named_parameters(model))
        expected.load_state_dict({name: averages[0]["state"][i]["ax"] for i, name in enumerate(names)})
        raw = locals_of(optimizer)
        before = evaluate(model)
        with optimizer.averaged_parameters():
            inside = evaluate(model)
            assert "averaged_parameters" in quick_message(optimizer.step)
        assert close(inside, evaluate(expected)) and not close(inside, before, 1e-4)
        assert torch.equal(evaluate(model), before) and all_same(locals_of(optimizer), raw)
        with contextlib.suppress(KeyboardInterrupt), optimizer.averaged_parameters():
            evaluate(model)
            raise KeyboardInterrupt
        assert torch.equal(evaluate(model), before) and all_same(locals_of(optimizer), raw)
        twin, twin_optimizer = build(layout, **options)
        train(twin, twin_optimizer, layout, range(8))
        train(model, optimizer, layout, range(6, 8))
        assert all_same(locals_of(model), locals_of(twin)), "the swap has left a trace"

    run_ranks(world_size, ranks)


@torch.no_grad()
def evaluate(model: nn.Module) -> Tensor:
    return model(batch(99)[0])


@pytest.mark.parametrize("layout", FSDP2)
def test_averages_under_fsdp2_need_the_module(layout: str) -> None:
    def ranks(rank: int) -> str:
        model = place(layout, Model())
        optimizer = ShardedASGD(model.named_parameters(), **OPTIONS)
        train(model, optimizer, layout, range(8))

        def swap() -> None:
            with optimizer.averaged_parameters():
                pass

        return quick_message(swap)

    assert all("pass module=" in text for text in run_ranks(2, ranks))


def test_a_swap_leaves_the_copies_of_another_model_alone() -> None:
    """As a teacher's, whose parameters the optimizer does not have: they are gathered, and stay so."""

    def ranks(rank: int) -> None:
        teacher = place("fsdp", Model())
        model, optimizer = build("fsdp", **OPTIONS)
        train(model, optimizer, "fsdp", range(8))
        teacher(batch(0)[0])
        gathered = list(teacher.parameters())
        assert not all(isinstance(param, DTensor) for param in gathered)
        with optimizer.averaged_parameters():
            pass
        assert all(one is other for one, other in zip(gathered, teacher.parameters(), strict=True))

    run_ranks(2, ranks)


def test_averages_under_tensor_parallelism_need_no_module() -> None:
    def ranks(rank: int) -> None:
        model = place("tp", Model())
        other = fully_shard(Model())  # that somebody else has, in the same process
        optimizer = ShardedASGD(model.named_parameters(), gradients="reduced", **OPTIONS)
        train(model, optimizer, "tp", range(10))
        before = evaluate(model)
        with optimizer.averaged_parameters():
            assert not torch.equal(evaluate(model), before)
        assert torch.equal(evaluate(model), before)
        evaluate(other)

    run_ranks(2, ranks)


# DistributedDataParallel


@pytest.mark.parametrize(
    "options",
    [{"gradient_as_bucket_view": True}, {"static_graph": True}, {"find_unused_parameters": True}, {"bucket_cap_mb": 1}],
    ids=str,
)
@pytest.mark.parametrize("built", ["after", "before"])
def test_ddp_options(built: str, options: dict[str, Any]) -> None:
    """Parameters become views of buckets before or after DDP has made its own."""

    def ranks(rank: int) -> None:
        model, twin = SometimesUnused(), SometimesUnused()
        oracle = torch.optim.ASGD(twin.parameters(), foreach=False, **OPTIONS)
        if built == "after":
            wrapped = DistributedDataParallel(model, **options)
            optimizer = ShardedASGD(model.named_parameters(), gradients="reduced", **OPTIONS)
        else:
            optimizer = ShardedASGD(model.named_parameters(), gradients="reduced", **OPTIONS)
            wrapped = DistributedDataParallel(model, **options)
        twin_wrapped = DistributedDataParallel(twin, **options)
        unused = "find_unused_parameters" in options
        for step in range(8):
            for net in (wrapped, twin_wrapped):
                with net.no_sync() if not ("static_graph" in options or unused) else contextlib.nullcontext():
                    loss(net, 100 + step, rank, unused and step % 2 == 0).backward()
                if not unused:
                    loss(net, step, rank, False).backward()
            optimizer.step()
            oracle.step()
            optimizer.zero_grad()
            oracle.zero_grad()
            assert all_same(locals_of(model), locals_of(twin)), step
        full = optimizer.full_state_dict()
        for index, param in enumerate(twin.parameters()):
            assert not full or same_bits(full["state"][index]["ax"], oracle.state[param]["ax"])

    run_ranks(2, ranks)


class SometimesUnused(Model):
    def forward(self, x: Tensor, short: bool = False) -> Tensor:
        x = self.inside(x)
        for block in self.blocks[: 1 if short else 2]:
            x = block(x)
        return self.outside(x)


def loss(model: nn.Module, step: int, rank: int, short: bool) -> Tensor:
    x, y = batch(step, rank, 2)
    return (model(x, short) - y).square().mean()
