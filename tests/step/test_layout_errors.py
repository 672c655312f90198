"""What users get wrong with sharded models: one clear error on every rank, at construction or at the first step."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.two_tensor import TwoTensor

from dist_asgd import ShardedASGD
from tests.support.failures import one_message, quick_message
from tests.support.layouts import Model, backward, batch, build, give_gradients, local, train, whole
from tests.support.ranks import run_ranks


def test_a_meta_parameter_of_a_sharded_model() -> None:
    def ranks(rank: int) -> str:
        with torch.device("meta"):
            model = Model()
        fully_shard(model)
        text = quick_message(lambda: ShardedASGD(model.named_parameters(), lr=0.1))
        model.to_empty(device="cpu")
        ShardedASGD(model.named_parameters(), lr=0.1)
        return text

    one_message(run_ranks(2, ranks), "inside.weight", "meta", "to_empty")


def shard_fully(model: Model) -> None:
    fully_shard(model)


def parallelize(model: Model) -> None:
    mesh = init_device_mesh("cpu", (2,))
    for block in model.blocks:
        parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})


@pytest.mark.parametrize(
    ("shard", "gradients"), [(shard_fully, "local"), (shard_fully, "reduced"), (parallelize, "local")]
)
def test_a_model_that_is_sharded_after_the_optimizer_was_built(shard: Callable[[Model], None], gradients: str) -> None:
    """Without `module=` the new parameters are not found; tests/optimizer/test_construction_order.py has the rest."""

    def ranks(rank: int) -> str:
        model = Model()
        optimizer = ShardedASGD(model.named_parameters(), lr=0.1, gradients=gradients)
        shard(model)
        x, y = batch(0)
        (model(x) - y).square().mean().backward()
        return quick_message(optimizer.step)

    one_message(
        run_ranks(2, ranks), "after the optimizer was built", "fully_shard", "build it again|Build the optimizer"
    )


@pytest.mark.parametrize("how", ["accumulates", "unused"])
def test_errors_of_local_gradients_under_ddp_name_ddp_first(how: str) -> None:
    def ranks(rank: int) -> str:
        model = Model()
        if how == "unused":
            model.unused = nn.Linear(2, 2)
        optimizer = ShardedASGD(model.named_parameters(), lr=0.1)
        wrapped = DistributedDataParallel(model, find_unused_parameters=how == "unused")
        x, y = batch(0)

        def go() -> None:
            if how == "accumulates":
                with wrapped.no_sync():
                    (wrapped(x) - y).square().mean().backward()
            (wrapped(x) - y).square().mean().backward()
            optimizer.step()

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            text = quick_message(go)
        ddp = text.index("DistributedDataParallel")
        assert ddp < text.index("gradients='reduced'") and "clip" not in text
        assert how == "accumulates" or ddp < text.index("find_unused_parameters")
        return text

    run_ranks(2, ranks)


def test_parts_that_are_sharded_later_are_found_by_their_names() -> None:
    """Each block is a root of FSDP2, so that its names there are shorter than the optimizer's."""

    def ranks(rank: int) -> str:
        model = Model()
        optimizer = ShardedASGD(model.named_parameters(), lr=0.1, gradients="reduced")
        fully_shard(model.blocks[0])
        x, y = batch(0)
        (model(x) - y).square().mean().backward()
        return quick_message(optimizer.step)

    one_message(run_ranks(2, ranks), "blocks.0.", "after the optimizer was built", "fully_shard", "Build the optimizer")


def test_a_sharded_teacher_is_none_of_the_optimizers_business() -> None:
    """It has the names and shapes of its student, of which a parameter has no gradient yet."""

    def ranks(rank: int) -> None:
        model, teacher = Model(), Model(seed=1)
        fully_shard(teacher)
        optimizer = ShardedASGD(model.named_parameters(), lr=0.1, gradients="reduced")
        x, _ = batch(0)
        (model(x) - teacher(x).detach()).square().mean().backward()
        model.inside.weight.grad = None
        before = {name: param.detach().clone() for name, param in model.named_parameters()}
        optimizer.step()
        same = [name for name, param in model.named_parameters() if torch.equal(param, before[name])]
        assert same == ["inside.weight"]

    run_ranks(2, ranks)


@pytest.mark.parametrize("named", [True, False])
def test_a_model_that_is_sharded_after_the_optimizer_was_built_is_warned_of_without_names_or_records(
    named: bool,
) -> None:
    """torch's optimizers skip such parameters silently. Without names FSDP2's records do not tell; TP keeps none."""

    def ranks(rank: int) -> str:
        model = Model()
        params = model.named_parameters() if named else model.parameters()
        optimizer = ShardedASGD(params, lr=0.1, gradients="reduced")
        (parallelize if named else shard_fully)(model)
        x, y = batch(0)
        with pytest.warns(UserWarning) as caught:
            for _ in range(10 if named else 3):  # parallelize leaves some parameters as they are
                (model(x) - y).square().mean().backward()
                optimizer.step()
        return str(caught[0].message)

    one_message(run_ranks(2, ranks), "after the optimizer was built", "fully_shard", "build it again", "module=")


def test_a_first_step_without_gradients_does_nothing_as_in_torch() -> None:
    def ranks(rank: int) -> None:
        model, optimizer = build("fsdp", lr=0.1)
        before = [p.to_local().clone() for p in model.parameters()]
        optimizer.step()
        assert all(torch.equal(p.to_local(), old) for p, old in zip(model.parameters(), before, strict=True))
        train(model, optimizer, "fsdp", range(2))
        assert not torch.equal(next(model.parameters()).to_local(), before[0])

    run_ranks(2, ranks)


@pytest.mark.parametrize("on", [(0, 1), (1,)], ids=["all ranks", "one rank"])
def test_plain_gradients_on_dtensors(on: tuple[int, ...]) -> None:
    def plain(rank: int, model: nn.Module, optimizer: ShardedASGD) -> None:
        if rank in on:
            model.outside.weight.grad = torch.ones(1, 10)

    one_message(first_step(plain), "outside.weight", "plain", "distribute_tensor", "DTensor.from_local")


def test_fsdp1_without_use_orig_params() -> None:
    def ranks(rank: int) -> str:
        wrapped = FullyShardedDataParallel(Model(), use_orig_params=False, device_id=torch.device("cpu"))
        return quick_message(lambda: ShardedASGD(wrapped.named_parameters(), lr=0.1, gradients="sharded"))

    one_message(run_ranks(2, ranks), "FlatParameter", "use_orig_params=True")


@pytest.mark.parametrize("gradients", ["local", "reduced"])
def test_partial_parameters(gradients: str) -> None:
    def ranks(rank: int) -> str:
        mesh = init_device_mesh("cpu", (2,))
        param = nn.Parameter(DTensor.from_local(torch.ones(4), mesh, [Partial()]))
        return quick_message(lambda: ShardedASGD([("half.known", param)], lr=0.1, gradients=gradients))

    one_message(run_ranks(2, ranks), "half.known", "Partial", "redistribute")


# Meshes


def on_two_meshes(rank: int, value: float) -> nn.Parameter:
    """A parameter on a mesh of ranks 0 and 1 on those, and of ranks 2 and 3 on those."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("stage", "dp"))["dp"]
    torch.manual_seed(0)
    return nn.Parameter(distribute_tensor(torch.randn(6, 3) + value, mesh, [Shard(0)], src_data_rank=None))


def test_parameters_of_two_meshes_with_other_values() -> None:
    def ranks(rank: int) -> str:
        param = on_two_meshes(rank, rank // 2)
        return quick_message(lambda: ShardedASGD([("experts.weight", param)], lr=0.1))

    one_message(run_ranks(4, ranks), "experts.weight", "[0, 1]", "[2, 3]", "process_group=mesh.get_group()")


def test_parameters_of_two_meshes_that_start_equal_and_get_other_gradients() -> None:
    def ranks(rank: int) -> str:
        param = on_two_meshes(rank, 0)
        optimizer = ShardedASGD([("experts.weight", param)], lr=0.1)
        before = param.to_local().clone()
        grad = torch.full((3, 3), 1.0 + rank // 2)
        param.grad = DTensor.from_local(grad, param.device_mesh, param.placements, run_check=False)
        text = quick_message(optimizer.step)
        assert torch.equal(param.to_local(), before)
        return text

    one_message(run_ranks(4, ranks), "experts.weight", "differs between ranks", "process_group=mesh.get_group()")


def test_an_expert_among_shared_parameters_whose_first_gradient_is_zero() -> None:
    """Nothing can be told from the first step, and the shared ones are replicas."""

    def ranks(rank: int) -> str:
        params = {f"shared{i}": on_two_meshes(rank, i) for i in range(12)} | {"expert": on_two_meshes(rank, 0)}
        optimizer = ShardedASGD(params.items(), lr=0.1)

        def step(size: float) -> None:
            for name, param in params.items():
                grad = torch.full((3, 3), size * (1 + rank // 2) if name == "expert" else 1.0)
                param.grad = DTensor.from_local(grad, param.device_mesh, param.placements, run_check=False)
            optimizer.step()

        step(0.0)
        step(0.0)
        return quick_message(lambda: step(1.0))

    one_message(run_ranks(4, ranks), "'expert'", "differs between ranks")


def test_a_bad_gradient_on_one_rank_beside_partial_ones() -> None:
    """Ranks agree before they reduce what is partial."""

    def ranks(rank: int) -> str:
        mesh = init_device_mesh("cpu", (2,))
        params = [nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Replicate()])) for _ in range(3)]
        optimizer = ShardedASGD([(f"norm{i}", p) for i, p in enumerate(params)], lr=1.0, lambd=0)
        for param in params:
            param.grad = DTensor.from_local(torch.ones(4), mesh, [Partial()], run_check=False)
        if rank == 0:
            params[1].grad = torch.ones(4)
        text = quick_message(optimizer.step)
        params[1].grad = DTensor.from_local(torch.ones(4), mesh, [Partial()], run_check=False)
        optimizer.step()
        assert all(torch.equal(p.to_local(), torch.full((4,), -1.0)) for p in params)
        return text

    one_message(run_ranks(2, ranks), "rank 0", "norm1", "plain")


def test_a_parameter_of_no_module_without_a_gradient_is_skipped_as_in_torch() -> None:
    def ranks(rank: int) -> None:
        elsewhere = fully_shard(Model())
        free, used = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(5))
        optimizer = ShardedASGD([free, used], lr=0.1, gradients="reduced")
        used.grad = torch.ones(5)
        optimizer.step()
        assert torch.equal(free, torch.ones(3)) and not torch.equal(used, torch.ones(5))
        del elsewhere

    run_ranks(2, ranks)


def test_an_optimizer_for_each_of_two_meshes() -> None:
    def ranks(rank: int) -> None:
        param = on_two_meshes(rank, rank // 2)
        twin = nn.Parameter(param.full_tensor().detach().clone())
        optimizer = ShardedASGD([param], lr=0.1, t0=2, process_group=param.device_mesh.get_group())
        oracle = torch.optim.ASGD([twin], lr=0.1, t0=2, foreach=False)
        for step in range(8):
            give_gradients({"p": param}, step + rank // 2)
            give_gradients({"p": twin}, step + rank // 2)
            optimizer.step()
            oracle.step()
        assert torch.equal(param.full_tensor(), twin)
        assert torch.equal(optimizer.state[param]["ax"].full_tensor(), oracle.state[twin]["ax"])

    run_ranks(4, ranks)


def test_equal_parameters_on_two_meshes_are_replicas_that_share_the_state() -> None:
    def ranks(rank: int) -> None:
        param = on_two_meshes(rank, 0)
        optimizer = ShardedASGD([param], lr=0.1, t0=2)
        twin = nn.Parameter(param.full_tensor().detach().clone())
        oracle = torch.optim.ASGD([twin], lr=0.1, t0=2, foreach=False)
        for step in range(8):
            give_gradients({"p": param}, step)
            give_gradients({"p": twin}, step)
            optimizer.step()
            oracle.step()
        assert torch.equal(param.full_tensor(), twin)
        owned = [None] * 4
        dist.all_gather_object(owned, local(optimizer.state[param]["ax"]).numel())
        assert sum(owned) == param.numel()

    run_ranks(4, ranks)


def test_a_mesh_of_ranks_that_are_not_the_optimizers() -> None:
    def ranks(rank: int) -> str:
        everyone = init_device_mesh("cpu", (4,))
        param = nn.Parameter(distribute_tensor(torch.ones(8), everyone, [Shard(0)]))
        pair, _ = dist.new_subgroups(2)
        return quick_message(lambda: ShardedASGD([("wide.weight", param)], lr=0.1, process_group=pair))

    texts = run_ranks(4, ranks)
    assert all("wide.weight" in text and "[0, 1, 2, 3]" in text and "process_group" in text for text in texts), texts


def test_a_mesh_without_this_rank() -> None:
    def ranks(rank: int) -> str:
        mesh = DeviceMesh("cpu", [0, 1])
        param = nn.Parameter(distribute_tensor(torch.ones(8), mesh, [Replicate()], src_data_rank=None))
        return quick_message(lambda: ShardedASGD([("first.stage", param)], lr=0.1))

    one_message(run_ranks(3, ranks), "first.stage", "[0, 1]", "process_group")


def test_other_placements_on_one_rank() -> None:
    def ranks(rank: int) -> str:
        mesh = init_device_mesh("cpu", (2,))
        placement: Any = Shard(0) if rank else Replicate()
        param = nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [placement], src_data_rank=None))
        return quick_message(lambda: ShardedASGD([("odd.weight", param)], lr=0.1))

    one_message(run_ranks(2, ranks), "odd.weight", "Replicate", "Shard", "rank 1")


# The first step, and later ones


def first_step(spoil: Callable[[int, nn.Module, ShardedASGD], None], layout: str = "fsdp") -> list[str]:
    def ranks(rank: int) -> str:
        model, optimizer = build(layout, lr=0.1, t0=0)
        before = [p.to_local().clone() for p in model.parameters()]
        backward(model, layout, 0)
        spoil(rank, model, optimizer)
        text = quick_message(optimizer.step)
        assert all(torch.equal(p.to_local(), old) for p, old in zip(model.parameters(), before, strict=True))
        return text

    return run_ranks(2, ranks)


def another_lr(rank: int, model: nn.Module, optimizer: ShardedASGD) -> None:
    optimizer.param_groups[0]["lr"] += rank


def no_lr(rank: int, model: nn.Module, optimizer: ShardedASGD) -> None:
    optimizer.param_groups[0]["lr"] = float("nan") if rank else 0.1


def no_gradient(rank: int, model: nn.Module, optimizer: ShardedASGD) -> None:
    if rank:
        model.outside.weight.grad = None


def another_block(rank: int, model: nn.Module, optimizer: ShardedASGD) -> None:
    if rank:
        param = model.inside.weight
        shape = (param.to_local().shape[0] + 1, 7)
        grad = DTensor.from_local(torch.ones(shape), param.device_mesh, param.placements, run_check=False)
        param.grad._local_tensor = grad._local_tensor


@pytest.mark.parametrize("layout", ["fsdp", "hsdp"])
@pytest.mark.parametrize(
    ("spoil", "parts"),
    [
        (another_lr, ("lr of group 0", "rank 1")),
        (no_lr, ("lr must be a finite number", "rank 1")),
        (no_gradient, ("outside.weight", "without|trained")),
        (another_block, ("inside.weight", "same shape", "rank 1")),
    ],
)
def test_what_differs_in_the_first_step(
    layout: str, spoil: Callable[[int, nn.Module, ShardedASGD], None], parts: tuple[str, ...]
) -> None:
    one_message(first_step(spoil, layout), *parts)


@pytest.mark.parametrize(("layout", "size"), [("hsdp", 4), ("tp", 2)])
def test_what_differs_in_a_later_step_of_replicas(layout: str, size: int) -> None:
    """Every rank gets the error, and none waits for an all-gather among replicas. Training goes on after it."""

    def ranks(rank: int) -> list[str]:
        model, optimizer = build(layout, lr=0.1, t0=0)
        train(model, optimizer, layout, range(2))
        texts = []
        for spoil in (another_lr, no_lr, no_gradient):
            before = [whole(p) for p in model.parameters()]
            backward(model, layout, 2)
            spoil(rank % 2, model, optimizer)
            texts.append(quick_message(optimizer.step))
            assert all(torch.equal(whole(p), old) for p, old in zip(model.parameters(), before, strict=True))
            optimizer.param_groups[0]["lr"] = 0.1
            optimizer.zero_grad()
        train(model, optimizer, layout, range(2, 4))
        straight, other = build(layout, lr=0.1, t0=0)
        train(straight, other, layout, range(4))
        assert all(
            torch.equal(whole(a), whole(b)) for a, b in zip(model.parameters(), straight.parameters(), strict=True)
        )
        return texts

    by_spoil = [list(texts) for texts in zip(*run_ranks(size, ranks), strict=True)]
    one_message(by_spoil[0], "lr of group 0", "rank 1")
    one_message(by_spoil[1], "lr must be a finite number", "rank 1")
    one_message(by_spoil[2], "outside.weight", "without|trained")


def test_a_rank_in_another_call_than_its_replicas() -> None:
    def ranks(rank: int) -> str:
        model, optimizer = build("hsdp", lr=0.1, t0=0)
        train(model, optimizer, "hsdp", range(2))
        backward(model, "hsdp", 2)
        return quick_message(optimizer.step if rank else optimizer.full_state_dict)

    one_message(run_ranks(2, ranks), "rank 0 called ShardedASGD.full_state_dict()", "rank 1 called ShardedASGD.step()")


def test_a_local_tensor_without_memory_of_its_own_is_named() -> None:
    """TwoTensor wraps tensors as torchao's float8 weights under FSDP2 do."""

    def ranks(rank: int) -> str:
        mesh = init_device_mesh("cpu", (1,))
        local = TwoTensor(torch.zeros(4, 3), torch.zeros(4, 3))
        param = torch.nn.Parameter(DTensor.from_local(local, mesh, [Shard(0)]))
        return quick_message(lambda: ShardedASGD([("weight", param)]))

    one_message(run_ranks(1, ranks), "'weight'", "local tensor is a TwoTensor", "plain weights")
