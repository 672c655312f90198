"""State dicts: sharded through stock DCP onto any number of ranks, dense to and from torch.optim.ASGD."""

import copy
import io
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

from dist_asgd import ShardedASGD
from dist_asgd.pieces import rank_local
from tests.support.oracle import (
    MIXED,
    PLAIN,
    Oracle,
    Pair,
    Spec,
    backward,
    check_dense_state,
    make_parameters,
    named,
    random_gradients,
    same_bits,
)
from tests.support.ranks import Sent, message_of, run_alone, run_ranks

SPECS = [*MIXED, Spec((37,), torch.bfloat16), Spec((3, 50)), Spec((2, 3), torch.float16)]
OPTIONS: dict[str, Any] = {"lr": 0.05, "lambd": 0.01, "t0": 3, "bucket_bytes": 300}
LATE = 4  # a parameter that gets its first gradient late
SAVED_AT, LAST = 8, 12


class Model(torch.nn.Module):
    def __init__(self, specs: Sequence[Spec] = SPECS, seed: int = 0) -> None:
        super().__init__()
        self.layers = torch.nn.ParameterList(make_parameters(specs, seed))


def same_for_all(step: int, world_size: int) -> list[list[torch.Tensor | None]]:
    """Gradients whose mean is exact, so that it is the same on any number of ranks."""
    grads = random_gradients(SPECS, 1, step, exact=True)[0]
    own = [None if g is None or (i == LATE and step < SAVED_AT - 4) else g for i, g in enumerate(grads)]
    return [list(own) for _ in range(world_size)]


def train(model: Model, optimizer: ShardedASGD, steps: range) -> None:
    for step in steps:
        backward(list(model.layers), same_for_all(step, 1)[0])
        optimizer.step()
        optimizer.zero_grad()


def build(seed: int = 0, **options: Any) -> tuple[Model, ShardedASGD]:
    model = Model(seed=seed)
    return model, ShardedASGD(model.named_parameters(), **{**OPTIONS, "find_unused_parameters": True, **options})


def expected(steps: int) -> Oracle:
    oracle = Oracle([{"params": list(Model().layers)}], 1, "local", OPTIONS)
    for step in range(steps):
        oracle.backward(same_for_all(step, 1))
        oracle.step()
        oracle.zero_grad()
    return oracle


def check_equal(model: Model, optimizer: ShardedASGD, oracle: Oracle, where: object = "") -> None:
    for index, p in enumerate(model.layers):
        assert same_bits(p, oracle.parameter(index)), (where, index)
    full = optimizer.full_state_dict()
    if not dist.is_initialized() or dist.get_rank() == 0:
        check_dense_state(full, oracle.optimizer, where)
    else:
        assert full == {}


# Resume on another number of ranks


def save_world(rank: int, folder: str, world_size: int) -> None:
    model, optimizer = build()
    train(model, optimizer, range(SAVED_AT))
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    dcp.save(state, checkpoint_id=f"{folder}/{world_size}")


def load_world(rank: int, folder: str, saved_on: Sequence[int]) -> None:
    reference, at_save = expected(LAST), expected(SAVED_AT)
    for world_size in saved_on:
        model, optimizer = build(seed=99, bucket_bytes=1 << 20)
        before = [p.detach().clone() for p in model.parameters()]
        state = {"optimizer": optimizer.state_dict()}
        dcp.load(state, checkpoint_id=f"{folder}/{world_size}")
        assert all(map(same_bits, model.parameters(), before)), "dcp.load into a state dict wrote to the parameters"
        weights = {"model": model.state_dict()}
        dcp.load(weights, checkpoint_id=f"{folder}/{world_size}")
        optimizer.load_state_dict(state["optimizer"])
        check_equal(model, optimizer, at_save, f"loaded from {world_size} ranks")
        train(model, optimizer, range(SAVED_AT, LAST))
        check_equal(model, optimizer, reference, f"trained on from {world_size} ranks")


def test_a_run_resumed_on_any_number_of_ranks_equals_the_uninterrupted_run(tmp_path: Path) -> None:
    """By ``optimizer.state_dict()``, whose state is numbered; test_portability.py has the forms by names."""
    saved_on = {1: (4,), 2: (1, 3), 3: (2, 4), 4: (3,)}  # by the number of ranks that load
    for world_size in saved_on:
        run_ranks(world_size, save_world, str(tmp_path), world_size)
    for world_size, numbers in saved_on.items():
        run_ranks(world_size, load_world, str(tmp_path), numbers, timeout=120)


def test_plain_pytorch_reads_the_checkpoint_without_ranks(tmp_path: Path) -> None:
    run_ranks(3, save_world, str(tmp_path), 3)

    def alone() -> None:
        oracle = expected(SAVED_AT)
        averages = [oracle.optimizer.state[p]["ax"] for p in oracle.params]
        state = {"optimizer": {"state": {i: {"ax": torch.full_like(ax, 7)} for i, ax in enumerate(averages)}}}
        dcp.load(state, checkpoint_id=str(tmp_path / "3"), no_dist=True)
        for index, ax in enumerate(averages):
            assert same_bits(state["optimizer"]["state"][index]["ax"], ax), index

    run_alone(alone)


def test_a_checkpoint_of_the_first_moment_resumes(tmp_path: Path) -> None:
    """Saved before any step: nothing is lost, no first update is skipped."""

    def save(rank: int) -> None:
        _, optimizer = build()
        dcp.save({"optimizer": optimizer.state_dict()}, checkpoint_id=str(tmp_path / "new"))

    def load(rank: int) -> None:
        model, optimizer = build()
        state = {"optimizer": optimizer.state_dict()}
        dcp.load(state, checkpoint_id=str(tmp_path / "new"))
        optimizer.load_state_dict(state["optimizer"])
        train(model, optimizer, range(LAST))
        check_equal(model, optimizer, expected(LAST))

    run_ranks(2, save)
    run_ranks(3, load)


# The same number of ranks: files, copies


@pytest.mark.parametrize("how", ["as it is", "deepcopy", "torch.save", "torch.save, weights only"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_state_dict_may_be_copied_and_pickled(world_size: int, how: str) -> None:
    def ranks(rank: int) -> None:
        model, optimizer = build()
        train(model, optimizer, range(SAVED_AT))
        state = optimizer.state_dict()
        if how == "deepcopy":
            state = copy.deepcopy(state)
            train(model, optimizer, range(SAVED_AT, LAST))  # the copy keeps what it had
            check_equal(model, optimizer, expected(LAST))
        elif how.startswith("torch.save"):
            file = io.BytesIO()
            if world_size > 1:
                with pytest.raises(pickle.PicklingError, match="consolidate_state_dict"):
                    torch.save(state, file)
                file, state = io.BytesIO(), rank_local(state)
            torch.save(state, file)
            file.seek(0)
            state = torch.load(file, weights_only="weights only" in how)
        other, again = build(seed=5)
        for p, q in zip(other.parameters(), expected(SAVED_AT).params, strict=True):
            with torch.no_grad():
                p.copy_(q)
        again.load_state_dict(state)
        train(other, again, range(SAVED_AT, LAST))
        check_equal(other, again, expected(LAST))

    run_ranks(world_size, ranks)


def test_a_file_of_one_rank_holds_only_its_pieces() -> None:
    def ranks(rank: int) -> int:
        params = make_parameters([Spec((1000, 100))])
        optimizer = ShardedASGD(named(params), lr=0.1, t0=0)
        for step in range(4):
            backward(params, random_gradients([Spec((1000, 100))], 1, step)[0])
            optimizer.step()
            optimizer.zero_grad()
        file = io.BytesIO()
        torch.save(rank_local(optimizer.state_dict()), file)
        return len(file.getvalue())

    assert all(size < 100_000 * 4 / 4 * 1.2 + 20_000 for size in run_ranks(4, ranks))


def test_a_sharded_save_gathers_no_tensor() -> None:
    def ranks(rank: int) -> None:
        specs = [Spec((200, 200)), Spec((50_000,), torch.bfloat16)]
        params = make_parameters(specs)
        optimizer = ShardedASGD(named(params), lr=0.1, t0=0)
        for step in range(4):
            backward(params, random_gradients(specs, 2, step)[rank])
            optimizer.step()
            optimizer.zero_grad()
        with Sent() as sent:
            state = optimizer.state_dict()
            optimizer.load_state_dict(state)
        assert sent.sizes and max(sent.sizes) < 4096

    run_ranks(2, ranks)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_state_dict_is_of_one_moment(world_size: int) -> None:
    """Averages are copied for it, by the next step, only if it is still there then."""

    def ranks(rank: int) -> None:
        specs = [Spec((200, 3)), Spec((33,), torch.bfloat16), Spec((40,), torch.float64)]
        pair = Pair(make_parameters(specs), lr=torch.tensor(0.05), t0=2, lambd=0.01)
        optimizer, params = pair.optimizer, pair.params

        def address() -> int:
            ax = optimizer.state[params[0]]["ax"]
            return getattr(ax, "local", ax).data_ptr()

        kept = []
        for step in range(8):
            state = optimizer.state_dict()
            kept.append((state, copy.deepcopy(state)))
            if step == 6:
                optimizer.param_groups[0]["lr"].fill_(0.02)
                pair.oracle.optimizer.param_groups[0]["lr"].fill_(0.02)
                optimizer.state[params[2]]["ax"] = torch.ones(40, dtype=torch.float64)
                pair.oracle.optimizer.state[pair.oracle.params[2]]["ax"].fill_(1)
            pair.backward(random_gradients(specs, world_size, step))
            pair.step()
            pair.zero_grad()
            pair.check(step)
        assert all(same_dict(state, copied) for state, copied in kept)
        assert float(kept[-1][0]["state"][0]["mu"]) < 1, "averages have started"
        for hold in (True, False):
            before, held = address(), optimizer.state_dict()
            if not hold:
                del held
            pair.backward(random_gradients(specs, world_size, 9))
            pair.step()
            assert (address() != before) == hold, "it copies where a state dict is held, and not elsewhere"

    run_ranks(world_size, ranks)


# The shape of a state dict


def test_the_sharded_state_dict_is_laid_out_as_torchs() -> None:
    def ranks(rank: int) -> None:
        groups = [{"params": named(make_parameters(PLAIN))}, {"params": named(make_parameters(MIXED), "x"), "lr": 0.3}]
        ours = ShardedASGD(groups, lr=0.1).state_dict()
        twins = [{"params": named(make_parameters(PLAIN))}, {"params": named(make_parameters(MIXED), "x"), "lr": 0.3}]
        theirs = torch.optim.ASGD(twins, lr=0.1).state_dict()
        assert set(ours) == {"state", "param_groups"}
        assert list(ours["state"]) == list(range(len(PLAIN) + len(MIXED)))
        for mine, group in zip(ours["param_groups"], theirs["param_groups"], strict=True):
            for key in ("params", "param_names", "lr", "lambd", "alpha", "t0", "weight_decay", "maximize"):
                assert mine[key] == group[key]
        for index, spec in enumerate((*PLAIN, *MIXED)):
            entry = ours["state"][index]
            assert set(entry) == {"step", "eta", "mu", "ax"}
            for key in ("step", "eta", "mu"):
                assert isinstance(entry[key], torch.Tensor)
                assert entry[key].shape == () and entry[key].dtype == torch.float32
            assert isinstance(entry["ax"], torch.Tensor)
            assert entry["ax"].shape == spec.shape and entry["ax"].dtype == spec.dtype

    run_ranks(2, ranks)


def test_a_dense_state_dict_goes_into_torch_and_training_goes_on_with_the_same_bits() -> None:
    def ranks(rank: int) -> None:
        specs = MIXED
        pair = Pair(make_parameters(specs), lr=0.05, t0=3, lambd=0.01, find_unused_parameters=True)
        for step in range(10):
            grads = random_gradients(specs, 2, step)
            for own in grads:
                own[LATE] = None  # type: ignore[index]
            pair.backward(grads)
            pair.step()
            pair.zero_grad()
        pair.optimizer.param_groups[0]["lr"] = 0.2  # the late parameter starts with this one
        full = pair.optimizer.full_state_dict()
        if rank != 0:
            return
        twins = [torch.nn.Parameter(p.detach().clone()) for p in pair.oracle.params]
        optimizer = torch.optim.ASGD(twins, lr=1.0, foreach=False)
        optimizer.load_state_dict(full)
        pair.oracle.optimizer.param_groups[0]["lr"] = 0.2
        for step in range(10, 20):
            grads = random_gradients(specs, 1, step)[0]
            for a, b, g in zip(twins, pair.oracle.params, grads, strict=True):
                a.grad, b.grad = g, g
            optimizer.step()
            pair.oracle.optimizer.step()
            assert all(map(same_bits, twins, pair.oracle.params)), step
        for a, b in zip(twins, pair.oracle.params, strict=True):
            assert same_bits(optimizer.state[a]["ax"], pair.oracle.optimizer.state[b]["ax"])

    run_ranks(2, ranks)


NUMBERS: dict[str, Callable[[torch.Tensor], Any]] = {
    "tensors": lambda value: value,
    "Python numbers": lambda value: value.item(),  # as torch wrote them before 2022
    "NumPy's": lambda value: value.numpy()[()],
}


@pytest.mark.parametrize("number", NUMBERS.values(), ids=NUMBERS)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_torch_state_dict_is_taken_and_training_goes_on_with_the_same_bits(
    world_size: int, number: Callable[[torch.Tensor], Any]
) -> None:
    def ranks(rank: int) -> None:
        oracle = Oracle([{"params": make_parameters(MIXED)}], world_size, "local", {"lr": 0.05, "t0": 3, "lambd": 0.01})
        for step in range(10):
            grads = random_gradients(MIXED, world_size, step)
            for own in grads:
                own[LATE] = None  # type: ignore[index]
            oracle.backward(grads)
            oracle.step()
            oracle.zero_grad()
        dense = copy.deepcopy(oracle.optimizer.state_dict())
        assert LATE not in dense["state"]
        dense["state"] = {
            i: {k: v if k == "ax" else number(v) for k, v in entry.items()} for i, entry in dense["state"].items()
        }
        kept = copy.deepcopy(dense)
        pair = Pair(
            [torch.nn.Parameter(p.detach().clone()) for p in oracle.params], lr=9.0, find_unused_parameters=True
        )
        pair.oracle = oracle
        pair.optimizer.load_state_dict(dense)
        assert same_dict(dense, kept), "load_state_dict changed the caller's dict"
        pair.check("after the load")
        for step in range(10, 20):
            pair.backward(random_gradients(MIXED, world_size, step))
            pair.step()
            pair.zero_grad()
            pair.check(step)
        assert same_dict(dense, kept), "training changed the caller's dict"

    run_ranks(world_size, ranks)


def same_dict(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and same_bits(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_dict(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same_dict, a, b))
    return a == b


def test_loading_casts_nothing_for_low_precision() -> None:
    """torch casts eta, mu and ax to bf16 on load; here the resumed run keeps its bits."""

    def ranks(rank: int) -> None:
        specs = [Spec((33,), torch.bfloat16), Spec((5, 7), torch.float16), Spec((9,), torch.float64)]
        pair = Pair(make_parameters(specs), lr=0.0132923, t0=2, lambd=0.01)
        for step in range(16):
            if step in (1, 5, 9):
                pair.restart()
                state = pair.optimizer.state_dict()["state"]
                assert all(
                    entry[key].dtype == torch.float32 for entry in state.values() for key in ("step", "eta", "mu")
                )
                assert state[0]["ax"].dtype == state[0]["master"].dtype == torch.float32
                assert state[2]["ax"].dtype == torch.float64
            pair.backward(random_gradients(specs, 2, step))
            pair.step()
            pair.zero_grad()
            pair.check(step)

    run_ranks(2, ranks)


def test_a_full_state_dict_of_bf16_parameters_resumes_with_its_averages() -> None:
    """Dense, as a file that rank 0 wrote and every rank reads: fp32 averages (and masters) survive."""

    def ranks(rank: int) -> None:
        specs = [Spec((33,), torch.bfloat16), Spec((5, 7))]
        pair = Pair(make_parameters(specs), lr=0.01, t0=1)
        for step in range(8):
            pair.backward(random_gradients(specs, 2, step))
            pair.step()
            pair.zero_grad()
        box = [pair.optimizer.full_state_dict()]
        dist.broadcast_object_list(box, src=0)
        fresh = [torch.nn.Parameter(p.detach().clone()) for p in pair.params]
        optimizer = ShardedASGD(named(fresh), lr=0.01, t0=1)
        optimizer.load_state_dict(box[0])
        full = optimizer.full_state_dict()
        if rank == 0:
            for index in range(2):
                assert full["state"][index]["ax"].dtype == torch.float32
                assert same_dict(full["state"][index], box[0]["state"][index])

    run_ranks(2, ranks)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_consolidated_state_dict_is_whole_once(world_size: int) -> None:
    """As Lightning and scripts for ZeroRedundancyOptimizer save: consolidate on every rank, state_dict() on one."""

    def ranks(rank: int) -> None:
        specs = [Spec((33,), torch.bfloat16), Spec((5, 7)), Spec((40, 9))]
        pair = Pair(make_parameters(specs), lr=0.01, t0=1)
        optimizer = pair.optimizer

        def step(number: int) -> None:
            pair.backward(random_gradients(specs, world_size, number))
            pair.step()
            pair.zero_grad()

        def is_whole() -> bool:
            ax = optimizer.state_dict()["state"][2]["ax"]
            return type(ax) is torch.Tensor and ax.device.type == "cpu"

        for number in range(5):
            step(number)
        last = world_size - 1
        box = [optimizer.full_state_dict()]
        dist.broadcast_object_list(box, src=0)
        for to in {0, last}:
            optimizer.consolidate_state_dict(to=to)
            state = optimizer.state_dict()
            assert is_whole() == (world_size == 1), "the second state_dict() has pieces again"
            if rank == to:
                file = io.BytesIO()
                torch.save(state, file)
                file.seek(0)
                assert same_dict(torch.load(file), box[0])
                assert state["state"][0]["master"].dtype == torch.float32
                plain = torch.optim.ASGD([torch.nn.Parameter(p.detach().clone()) for p in pair.params], foreach=False)
                plain.load_state_dict(state)
                plain.param_groups[0]["params"][2].grad = torch.ones(40, 9)
                plain.step()
        optimizer.consolidate_state_dict()
        step(5)
        assert is_whole() == (world_size == 1), "a step comes between: the state is no longer that of the parameters"
        for bad in (-1, world_size, None):
            with pytest.raises(ValueError, match=rf"to={bad}"):
                optimizer.consolidate_state_dict(to=bad)  # type: ignore[arg-type]
        if world_size > 1:
            with pytest.raises(RuntimeError, match=r"rank 0 called ShardedASGD\.consolidate_state_dict\(to=0\)"):
                optimizer.consolidate_state_dict(to=rank)
        step(6)
        pair.check("at the end")

    run_ranks(world_size, ranks)


def test_the_dense_dict_is_independent_of_the_optimizer() -> None:
    def ranks(rank: int) -> None:
        pair = Pair(make_parameters(PLAIN), lr=0.1, t0=0)
        for step in range(4):
            pair.backward(random_gradients(PLAIN, 2, step))
            pair.step()
            pair.zero_grad()
        full = pair.optimizer.full_state_dict()
        kept = copy.deepcopy(full)
        for entry in full.get("state", {}).values():
            entry["ax"].add_(1)
            entry["ax"].sub_(1)
            entry["ax"].copy_(kept["state"][0]["ax"].sum())
        pair.check("after writing to the dict")
        kept = copy.deepcopy(full)
        for step in range(4, 8):
            pair.backward(random_gradients(PLAIN, 2, step))
            pair.step()
            pair.zero_grad()
        assert same_dict(full, kept), "training changed the dict"
        pair.check()

    run_ranks(2, ranks)


def test_parameters_without_requires_grad_are_saved_and_loaded() -> None:
    def ranks(rank: int) -> None:
        pair = Pair(make_parameters(PLAIN), lr=0.1, t0=0)
        pair.set_requires_grad(2, False)
        for step in range(9):
            if step == 4:
                pair.restart()
            if step == 6:
                pair.set_requires_grad(2, True)
                pair.set_group(0, lr=0.02)
            pair.backward(random_gradients(PLAIN, 2, step))
            pair.step()
            pair.zero_grad()
            pair.check(step)

    run_ranks(2, ranks)


def test_options_of_the_groups_come_from_the_state_dict() -> None:
    def ranks(rank: int) -> None:
        halves = [PLAIN[:2], PLAIN[2:]]
        source = ShardedASGD(
            [{"params": make_parameters(h), "lr": 0.1 * (i + 1), "t0": i} for i, h in enumerate(halves)], alpha=0.5
        )
        target = ShardedASGD([{"params": make_parameters(h)} for h in halves])
        target.load_state_dict(source.state_dict())
        for ours, theirs in zip(target.param_groups, source.param_groups, strict=True):
            for key in ("lr", "t0", "alpha", "lambd", "weight_decay", "maximize"):
                assert ours[key] == theirs[key]

    run_ranks(2, ranks)


def named_pair(order: str, prefix: str = "", value: float = 0.0) -> list[tuple[str, torch.nn.Parameter]]:
    """Parameters of one shape, by name; ``order`` is of their names."""
    return [(prefix + name, torch.nn.Parameter(torch.full((40,), value))) for name in order]


def trained_pair(params: list[tuple[str, torch.nn.Parameter]], kind: Callable[..., Any]) -> Any:
    """An optimizer after some steps, in which the average of each parameter depends on its name."""
    optimizer = kind(params, lr=0.1, t0=0, lambd=0)
    for _ in range(4):
        for name, param in params:
            param.grad = torch.full_like(param, float(ord(name[-1])))
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("world_size", [1, 2])
def test_state_is_matched_by_the_names_of_parameters(world_size: int) -> None:
    """In another order, also with names of wrappers; without names on one side by position, and they are taken."""

    def ranks(rank: int) -> None:
        sources = {"torch": trained_pair(named_pair("abc"), torch.optim.ASGD).state_dict()}
        full: list[Any] = [trained_pair(named_pair("abc"), ShardedASGD).full_state_dict()]
        if dist.is_initialized():
            dist.broadcast_object_list(full, src=0)
        sources |= {"ours": full[0], "pieces": trained_pair(named_pair("abc"), ShardedASGD).state_dict()}
        for form, saved in sources.items():
            kept = copy.deepcopy(saved)
            for prefix in ("", "module.", "module._orig_mod."):
                params = named_pair("cab" if form != "pieces" else "abc", prefix)
                optimizer = ShardedASGD(params, lr=0.1, t0=0, lambd=0)
                optimizer.load_state_dict(saved)
                loaded = optimizer.full_state_dict()
                for index, (name, _) in enumerate(params if rank == 0 else []):
                    expected = full[0]["state"]["abc".index(name[-1])]
                    assert same_dict(loaded["state"][index], expected), (form, name)
                assert optimizer.param_groups[0]["param_names"] == [name for name, _ in params]
            nameless = ShardedASGD([param for _, param in named_pair("xyz")], lr=0.1)
            nameless.load_state_dict(saved)
            assert nameless.param_groups[0]["param_names"] == ["a", "b", "c"]
            again = ShardedASGD(named_pair("cab"), lr=0.1)
            bare = {
                **saved,
                "param_groups": [{k: v for k, v in saved["param_groups"][0].items() if k != "param_names"}],
            }
            again.load_state_dict(bare)
            by_position = again.full_state_dict()
            assert rank or same_dict(by_position["state"], full[0]["state"]), form
            assert form == "pieces" or same_dict(saved, kept)

    run_ranks(world_size, ranks) if world_size > 1 else run_alone(ranks, 0)


def test_names_that_do_not_match_are_an_error_that_says_them() -> None:
    def ranks(rank: int) -> list[str]:
        saved = trained_pair(named_pair("abc"), torch.optim.ASGD).state_dict()
        other = ShardedASGD(named_pair("abd"), lr=0.1)
        before = other.full_state_dict()
        texts = [message_of(lambda: other.load_state_dict(saved), ValueError)]
        saved["param_groups"][0]["param_names"] = ["a", "b"]
        texts.append(message_of(lambda: other.load_state_dict(saved), ValueError))
        assert same_dict(other.full_state_dict(), before)
        return texts

    first, second = run_ranks(2, ranks)
    assert first == second
    assert "no parameter 'd'" in first[0] and "'c' instead" in first[0] and "param_names" in first[0]
    assert "2 'param_names' for 3 parameters" in first[1]


def test_names_made_by_torchs_functions_are_in_the_optimizers_order() -> None:
    """``set_optimizer_state_dict`` reorders ``params`` and state, and leaves ``param_names`` as saved."""

    def alone() -> None:
        class Pair(torch.nn.Module):
            def __init__(self, order: str) -> None:
                super().__init__()
                for name, param in named_pair(order):
                    self.register_parameter(name, param)

        first, second = Pair("ab"), Pair("ba")
        source = trained_pair(list(first.named_parameters()), ShardedASGD)
        target = ShardedASGD(second.named_parameters(), lr=0.1)
        set_optimizer_state_dict(second, target, get_optimizer_state_dict(first, source))
        for name in "ab":
            one, other = getattr(first, name), getattr(second, name)
            assert torch.equal(source.state[one]["ax"], target.state[other]["ax"]), name

    run_alone(alone)


def test_a_tensor_lr_is_copied_from_the_state_dict() -> None:
    """A scheduler writes to it in place."""

    def alone() -> None:
        first, second = (ShardedASGD(make_parameters(PLAIN), lr=torch.tensor(0.1)) for _ in range(2))
        state = copy.deepcopy(first.state_dict())
        first.load_state_dict(state)
        second.load_state_dict(state)
        first.param_groups[0]["lr"].fill_(0.5)
        assert state["param_groups"][0]["lr"] == torch.tensor(0.1)
        assert second.param_groups[0]["lr"] == torch.tensor(0.1)

    run_alone(alone)


def test_a_full_state_dict_by_names_is_set_on_every_rank() -> None:
    """What a checkpoint of torch.optim.ASGD under DDP holds, through torch's own function."""

    def ranks(rank: int) -> None:
        source, optimizer = build()
        train(source, optimizer, range(SAVED_AT))
        box = [optimizer.full_state_dict()]
        dist.broadcast_object_list(box, src=0)
        full = box[0]
        names = [name for name, _ in source.named_parameters()]
        by_names = {
            "state": {names[index]: entry for index, entry in full["state"].items()},
            "param_groups": [{**full["param_groups"][0], "params": names}],
        }
        model, again = build(seed=5)
        with torch.no_grad():
            for p, q in zip(model.parameters(), expected(SAVED_AT).params, strict=True):
                p.copy_(q)
        set_optimizer_state_dict(model, again, by_names, options=StateDictOptions(full_state_dict=True))
        dense = again.full_state_dict()
        assert rank != 0 or same_dict(dense["state"], full["state"])
        assert again.param_groups[0]["lr"] == OPTIONS["lr"]

    run_ranks(2, ranks)


def test_a_piece_in_another_memory_order_is_converted_or_refused() -> None:
    def ranks(rank: int) -> None:
        (source,) = make_parameters([Spec((5, 3, 2, 4), layout="channels_last")])
        (target,) = make_parameters([Spec((5, 3, 2, 4))])
        first, second = (ShardedASGD([("conv.weight", p)], lr=0.1, t0=0) for p in (source, target))
        for step in range(4):
            backward([source], random_gradients([Spec((5, 3, 2, 4))], 2, step)[rank])
            first.step()
            first.zero_grad()
        before = second.full_state_dict()
        try:
            second.load_state_dict(first.state_dict())
        except ValueError as error:
            assert "conv.weight" in str(error)
            assert same_dict(second.full_state_dict(), before)
            return
        ours, theirs = second.full_state_dict(), first.full_state_dict()
        assert rank != 0 or same_bits(ours["state"][0]["ax"], theirs["state"][0]["ax"])

    run_ranks(2, ranks)
