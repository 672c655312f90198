"""Kinds of average, each against the float64 mean of the stored iterates by weights that are computed here."""

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.utils._python_dispatch import TorchDispatchMode

import dist_asgd
from dist_asgd import EMA, Checkpointer, PolynomialDecay, ShardedASGD, Tail, Uniform
from dist_asgd.averages.kinds import Average
from tests.support import fsdp1, layouts
from tests.support.memory import reachable
from tests.support.oracle import LOW, Spec, make_parameters, named, random_gradients, same_bits, wide
from tests.support.ranks import message_of, run_alone, run_ranks

STEPS, T0 = 25, 3
SPECS = (
    Spec((33,), torch.bfloat16),
    Spec((5, 7), torch.float16),
    Spec((67,)),
    Spec((4, 3), torch.float64),
    Spec((5,), torch.complex64),
)


def power(gamma: float) -> Callable[[int], list[float]]:
    """Shamir and Zhang's weights, by their closed form."""
    return lambda n: [math.exp(math.lgamma(k + gamma) - math.lgamma(k)) for k in range(1, n + 1)]


# By kind: the weights, up to a factor, of n iterates, oldest first.
WEIGHTS: dict[Average, Callable[[int], list[float]]] = {
    Uniform(): lambda n: [1.0] * n,
    Uniform(every=4): lambda n: [float(k % 4 == 0) for k in range(n)],
    EMA(0.9): lambda n: [0.9 ** (n - k) for k in range(1, n + 1)],
    EMA(0.9, warmup=False): lambda n: [0.9 ** (n - 1), *(0.1 * 0.9 ** (n - k) for k in range(2, n + 1))],
    EMA(0.8, every=3): lambda n: [0.8 ** ((n - 1) // 3 - k // 3) * (k % 3 == 0) for k in range(n)],
    PolynomialDecay(8): power(8),
    PolynomialDecay(0.5): power(0.5),
    Tail(0.25, STEPS): lambda n: [0.0] * (n - 6) + [1.0] * 6,
    Tail(1.0, STEPS): lambda n: [1.0] * n,
}
SEVERAL = {f"kind{number}": kind for number, kind in enumerate(WEIGHTS)}  # all at once
STARTED = {"mean": Uniform(), "ema": EMA(0.9), "tail": Tail(0.25, STEPS), "thin": EMA(0.8, every=3)}


def gradients(specs: Sequence[Spec], step: int) -> list[Any]:
    return random_gradients(specs, 1, step)[0]


def iterates(
    specs: Sequence[Spec], out: Mapping[int, Sequence[int]] = MappingProxyType({})
) -> list[list[torch.Tensor]]:
    """By torch, on masters of those in low precision. ``out``: steps without a gradient, by parameter."""
    params = [torch.nn.Parameter(wide(p.detach())) for p in make_parameters(specs)]
    optimizer = torch.optim.ASGD(params, lr=0.05, foreach=False)
    found = []
    for step in range(STEPS):
        for index, (p, g) in enumerate(zip(params, gradients(specs, step), strict=True)):
            p.grad = None if step in out.get(index, ()) else wide(g)
        optimizer.step()
        found.append([p.detach().clone() for p in params])
    return found


def train(params: Sequence[torch.Tensor], steps: Iterable[int], optimizer: ShardedASGD) -> None:
    for step in steps:
        for p, g in zip(params, gradients(SPECS, step), strict=True):
            p.grad = g
        optimizer.step()


def build(
    params: list[torch.nn.Parameter], average: Average | Mapping[str, Average] | None, **options: Any
) -> ShardedASGD:
    given = {"lr": 0.05, "t0": T0, "bucket_bytes": 256, "gradients": "reduced", **options}
    return ShardedASGD(named(params), average=average, **given)


def weighted_mean(values: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    whole = math.fsum(weights)
    wide = [value.to(torch.promote_types(value.dtype, torch.float64)) for value in values]
    return torch.stack([value * (w / whole) for value, w in zip(wide, weights, strict=True)]).sum(0)


@pytest.mark.parametrize("world_size", [1, 3])
def test_every_kind_is_the_weighted_mean_of_the_iterates(world_size: int) -> None:
    def ranks(rank: int) -> None:
        found = iterates(SPECS)
        taken = found[T0 + 1 :]  # as in torch, step t0 + 2 is the first
        for kind, weights in WEIGHTS.items():
            params = make_parameters(SPECS)
            optimizer = build(params, kind)
            train(params, range(STEPS), optimizer)
            assert all(same_bits(p, q.to(p.dtype)) for p, q in zip(params, found[-1], strict=True))
            state = optimizer.full_state_dict()
            with optimizer.averaged_parameters():
                inside = [p.detach().clone() for p in params]
            for index, p in enumerate(inside if rank == 0 else []):
                ax = state["state"][index]["ax"]
                expected = weighted_mean([values[index] for values in taken], weights(len(taken)))
                assert (ax - expected).abs().max() < 2e-6, (kind, index)
                assert same_bits(p, ax.to(p.dtype)), (kind, index)

    run_ranks(world_size, ranks)


def test_averages_go_on_from_their_state_and_refuse_that_of_others() -> None:
    """With the bits of a run without a stop, which for the uniform one are torch's: tests/optimizer/test_bits.py."""

    def ranks(rank: int, kind: Average) -> str:
        states, text = [], ""
        for stop in (None, T0 + 8):
            params = make_parameters(SPECS)
            optimizer = build(params, kind)
            train(params, range(stop or STEPS), optimizer)
            if stop is not None:
                state = optimizer.state_dict()
                assert state["param_groups"][0]["average"] == str(kind)
                other = build(make_parameters(SPECS), None)
                if kind == Tail(0.25, STEPS):  # whose average has not begun
                    other.load_state_dict(state)
                else:
                    text = message_of(functools.partial(other.load_state_dict, state), ValueError)
                optimizer = build(params, kind)
                optimizer.load_state_dict(state)
                train(params, range(stop, STEPS), optimizer)
            states.append(optimizer.full_state_dict())
        for index, entry in states[0].get("state", {}).items():
            assert all(same_bits(value, states[1]["state"][index][key]) for key, value in entry.items()), kind
        return text

    kinds = (EMA(0.8, every=3), Tail(0.25, STEPS), PolynomialDecay(8))
    text, _, other = (run_ranks(2, ranks, kind)[0] for kind in kinds)
    assert "EMA(every=3, decay=0.8, warmup=True)" in text and "Uniform(every=1)" in text and "average=" in other


# Several at once


def check_means(
    averages: Mapping[str, Average], state: Mapping[str, torch.Tensor], taken: Sequence[torch.Tensor], where: object
) -> None:
    """That a parameter's ``state`` has the weighted means of the iterates ``taken``."""
    for number, (name, kind) in enumerate(averages.items()):
        ax = state[f"ax_{name}" if number else "ax"]
        expected = weighted_mean(taken, WEIGHTS[kind](len(taken)))
        assert ax.dtype == taken[0].dtype and (ax - expected).abs().max() < 2e-6, (kind, where)


@pytest.mark.parametrize(("world_size", "gradients_are"), [(1, "reduced"), (3, "reduced"), (2, "local")])
def test_all_kinds_at_once_are_the_weighted_means_of_the_iterates(world_size: int, gradients_are: str) -> None:
    def ranks(rank: int) -> None:
        found, params = iterates(SPECS), make_parameters(SPECS)
        optimizer = build(params, SEVERAL, gradients=gradients_are)
        train(params, range(STEPS), optimizer)
        raw = [p.detach().clone() for p in params]
        assert all(same_bits(p, q.to(p.dtype)) for p, q in zip(raw, found[-1], strict=True))
        state = optimizer.full_state_dict().get("state", {})
        for index, entry in state.items():
            check_means(SEVERAL, entry, [values[index] for values in found[T0 + 1 :]], index)
        for number, name in enumerate([None, *SEVERAL]):
            with optimizer.averaged_parameters(name):
                inside = [p.detach().clone() for p in params]
            key = f"ax_{name}" if number > 1 else "ax"
            assert all(same_bits(inside[index], entry[key].to(inside[index].dtype)) for index, entry in state.items())
            assert all(map(same_bits, params, raw)), name

    run_ranks(world_size, ranks)


@pytest.mark.parametrize("master_weights", [True, False])
@pytest.mark.parametrize("in_one_pass", [True, False])
def test_each_of_several_has_the_bits_that_it_has_alone(
    in_one_pass: bool, master_weights: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In low precision without masters, all of them take the iterates before these are rounded."""
    if not in_one_pass:
        monkeypatch.setattr("dist_asgd.kernels.dispatch.native_update", lambda *dtypes: None)

    def ranks(rank: int) -> None:
        states = {}
        for name, average in (("together", STARTED), *STARTED.items()):
            params = make_parameters(SPECS)
            optimizer = build(params, average, master_weights=master_weights)
            train(params, range(STEPS), optimizer)
            states[name] = optimizer.full_state_dict().get("state", {})
        for index, entry in states["together"].items():
            for number, name in enumerate(STARTED):
                together = entry[f"ax_{name}" if number else "ax"]
                assert same_bits(together, states[name][index]["ax"]), (name, index)

    run_ranks(2, ranks)


def test_steps_that_a_parameter_sits_out_are_in_none_of_its_averages() -> None:
    """Each parameter counts its own, so that their scalars differ from some step on."""
    out = {0: (9, 10), 2: (5, 6, 11), 4: (0, 1)}  # steps without a gradient, by parameter
    averages = {name: kind for name, kind in SEVERAL.items() if kind != Tail(0.25, STEPS)}  # which counts from the end

    def ranks(rank: int) -> None:
        params, found = make_parameters(SPECS), iterates(SPECS, out)
        optimizer = build(params, averages)
        for step in range(STEPS):
            for index, (p, g) in enumerate(zip(params, gradients(SPECS, step), strict=True)):
                p.grad = None if step in out.get(index, ()) else g
            optimizer.step()
        for index, entry in optimizer.full_state_dict().get("state", {}).items():
            own = [values[index] for step, values in enumerate(found) if step not in out.get(index, ())]
            check_means(averages, entry, own[T0 + 1 :], index)

    run_ranks(3, ranks)


PLACES = [("zero", 2), ("ddp", 2), ("fsdp", 3), ("hsdp", 4), ("tp", 2), ("fsdp+tp", 4)]
IN_SEVERAL_PASSES = [("zero", 2), ("fsdp", 3)]  # to the update, shards of all layouts are lists of plain tensors


def iterates_of_model() -> list[list[torch.Tensor]]:
    """By torch, of layouts.Model under the gradients of layouts.give_gradients."""
    params, found = dict(layouts.Model().named_parameters()), []
    optimizer = torch.optim.ASGD(params.values(), lr=0.05, foreach=False)
    for step in range(STEPS):
        layouts.give_gradients(params, step)
        optimizer.step()
        found.append([p.detach().clone() for p in params.values()])
    return found


@pytest.mark.parametrize(
    ("layout", "world_size", "in_one_pass"),
    [*((*place, True) for place in PLACES), *((*place, False) for place in IN_SEVERAL_PASSES)],
)
def test_several_averages_under_every_parallelism(
    layout: str, world_size: int, in_one_pass: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not in_one_pass:
        monkeypatch.setattr("dist_asgd.kernels.dispatch.native_update", lambda *dtypes: None)

    def ranks(rank: int) -> None:
        model, optimizer = layouts.build(layout, lr=0.05, t0=T0, average=SEVERAL)
        params, found = layouts.named_parameters(model), iterates_of_model()
        for step in range(STEPS):
            layouts.give_gradients(params, step)
            optimizer.step()
        optimizer.synchronize()
        state = optimizer.full_state_dict().get("state", {})
        for index, entry in state.items():
            check_means(SEVERAL, entry, [values[index] for values in found[T0 + 1 :]], list(params)[index])
        with optimizer.averaged_parameters("kind5"):
            inside = [layouts.whole(p) for p in params.values()]
        assert all(same_bits(inside[index], entry["ax_kind5"]) for index, entry in state.items())
        assert all(map(same_bits, map(layouts.whole, params.values()), found[-1]))

    run_ranks(world_size, ranks)


def check_bits(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Of parameters in two full state dicts."""
    assert ours.get("state", {}).keys() == theirs.get("state", {}).keys()
    for index, entry in theirs.get("state", {}).items():
        mine = ours["state"][index]
        assert mine.keys() == entry.keys()
        assert all(same_bits(mine[key], value) for key, value in entry.items()), index


@pytest.mark.parametrize(
    ("saved_on", "loaded_on", "stop"), [(3, 2, T0 - 1), (3, 2, T0 + 8), (1, 3, T0 + 8), (1, 3, STEPS - 3)]
)
def test_several_averages_go_on_from_state_of_other_ranks(
    saved_on: int, loaded_on: int, stop: int, tmp_path: Path
) -> None:
    """By full_state_dict(), stock torch.distributed.checkpoint and a Checkpointer: with the bits of no stop."""
    url = str(tmp_path / "run")

    def state_of(params: list[torch.nn.Parameter], optimizer: ShardedASGD) -> dict[str, Any]:
        return {"model": torch.nn.ParameterDict({str(i): p for i, p in enumerate(params)}), "optimizer": optimizer}

    def save(rank: int) -> tuple[Any, Any, Any]:
        params = make_parameters(SPECS)
        optimizer = build(params, STARTED)
        train(params, range(stop), optimizer)
        dcp.save({"p": dict(named(params)), "o": optimizer.state_dict()}, checkpoint_id=f"{url}-stock")
        with Checkpointer(url) as checkpoints:
            checkpoints.save(stop, state_of(params, optimizer))
        full, values = optimizer.full_state_dict(), [p.detach().clone() for p in params]
        train(params, range(stop, STEPS), optimizer)
        return full, values, optimizer.full_state_dict()

    full, values, expected = run_ranks(saved_on, save)[0]

    def load(rank: int, way: str) -> None:
        params = make_parameters(SPECS, seed=7)
        optimizer = build(params, STARTED)
        train(params, range(50, 50 + T0 + 4), optimizer)  # so that there is something else to be loaded over
        if way == "full":
            with torch.no_grad():
                for p, value in zip(params, values, strict=True):
                    p.copy_(value)
            optimizer.load_state_dict(full)
        elif way == "stock":
            state = {"p": dict(named(params)), "o": optimizer.state_dict()}
            dcp.load(state, checkpoint_id=f"{url}-stock")
            optimizer.load_state_dict(state["o"])
        else:
            checkpoints = Checkpointer(url)
            assert checkpoints.load(state_of(params, optimizer)) == stop
            other = make_parameters(SPECS, seed=8)
            checkpoints.load({"model": state_of(other, optimizer)["model"]}, average="ema")
            with optimizer.averaged_parameters("ema"):
                assert all(map(same_bits, params, other))
            checkpoints.close()
        check_bits(optimizer.full_state_dict(), full if rank == 0 else {})
        train(params, range(stop, STEPS), optimizer)
        check_bits(optimizer.full_state_dict(), expected if rank == 0 else {})

    for way in ("full", "stock", "checkpointer"):
        run_ranks(loaded_on, load, way)


def test_the_first_average_is_torchs_whatever_its_name() -> None:
    """Its state goes to torch's optimizer and back, also with others beside it."""

    def alone() -> None:
        specs = [spec for spec in SPECS if spec.dtype not in LOW]
        state: dict[str, Any] = {}
        for average in ({"mean": Uniform()}, {"mean": Uniform(), "ema": EMA(0.9)}):
            twins, params = make_parameters(specs), make_parameters(specs)
            oracle = torch.optim.ASGD(twins, lr=0.05, t0=T0, foreach=False)
            optimizer: Any = build(params, average)
            for step in range(12):
                if step == 8:
                    state = optimizer.state_dict()
                    optimizer = torch.optim.ASGD(params, foreach=False)
                    optimizer.load_state_dict(state)
                for p, twin, g in zip(params, twins, gradients(specs, step), strict=True):
                    p.grad, twin.grad = g, g.clone()
                optimizer.step()
                oracle.step()
            for p, twin in zip(params, twins, strict=True):
                assert same_bits(p, twin) and same_bits(optimizer.state[p]["ax"], oracle.state[twin]["ax"])
            again = build(make_parameters(specs), {"any_name": Uniform()})
            again.load_state_dict(oracle.state_dict())
            for p, twin in zip(again.state, twins, strict=True):
                assert same_bits(again.state[p]["ax"], oracle.state[twin]["ax"])
            others = build(params, STARTED)
            text = message_of(functools.partial(others.load_state_dict, oracle.state_dict()), ValueError)
            assert "averages by Uniform(every=1), the optimizer by mean=Uniform(every=1), ema=EMA(" in text
        # the one with others beside the first
        text = message_of(functools.partial(build(params, None).load_state_dict, state), ValueError)
        assert "averages by mean=Uniform(every=1), ema=EMA(" in text and "the optimizer by Uniform(every=1)" in text
        others = build(params, {"x": Uniform(), "ema": EMA(0.8)})
        assert "the optimizer by x=" in message_of(functools.partial(others.load_state_dict, state))
        # before averages have begun, their kinds say nothing
        begun = build(make_parameters(SPECS), STARTED)
        train(list(begun.state), range(STEPS), begun)
        fresh = build(make_parameters(SPECS), None)
        train(list(fresh.state), range(2), fresh)
        begun.load_state_dict(fresh.state_dict())
        for p, entry in begun.state.items():
            assert all(float(entry[key]) == 1 for key in entry if key.startswith("mu")) and "mu_thin" in entry
            assert all(same_bits(entry[key], entry["ax"]) for key in entry if key.startswith("ax")), p.dtype
        same = {"any": Uniform(), "thin": STARTED["thin"], "tail": STARTED["tail"], "ema": EMA(0.9)}
        build(list(begun.state), same).load_state_dict(begun.state_dict())

    run_alone(alone)


def test_what_cannot_be_several_averages_is_the_same_error_on_every_rank() -> None:
    wrong = {
        "empty": {},
        "identifier": {"a": Uniform(), "not one": EMA(0.9)},
        "got 'master'": {"mean": Uniform(), "master": EMA(0.9)},
        "'a' and 'b' are both EMA": {"a": EMA(0.9), "b": EMA(0.9, every=1)},
        "got {'a': 0.9}": {"a": 0.9},
        "got ['ema']": ["ema"],
        "average of group 0": None,  # on rank 1 the first
        "rank 1: average is an empty": None,
    }

    def ranks(rank: int) -> list[str]:
        texts, params = [], make_parameters(SPECS[2:4])
        before = [(p.data_ptr(), p.detach().clone()) for p in params]
        for part, average in wrong.items():
            given: Any = average
            if average is None:
                given = STARTED if rank == 0 else {} if "empty" in part else {"mean": Uniform()}
            texts.append(message_of(functools.partial(build, params, given), ValueError, TypeError))
            assert part in texts[-1]
        assert all(p.data_ptr() == at and torch.equal(p, value) for p, (at, value) in zip(params, before, strict=True))
        return texts

    assert len(set(map(tuple, run_ranks(2, ranks)))) == 1


def test_on_the_device_there_is_only_torchs_average() -> None:
    def alone() -> None:
        params = make_parameters(SPECS)
        text = message_of(functools.partial(build, params, STARTED, capturable=True), ValueError)
        assert "average mean=Uniform" in text and "with capturable=True" in text
        text = message_of(functools.partial(build, params, {"mean": Uniform()}, capturable=True), ValueError)
        assert "needs parameters on a CUDA device" in text

    run_alone(alone)


def test_an_average_that_is_not_there_or_not_the_same_everywhere_is_not_swapped_in() -> None:
    def ranks(rank: int) -> list[str]:
        texts, params = [], make_parameters(SPECS)
        optimizer = build(params, STARTED)
        train(params, range(STEPS - 1), optimizer)
        before = [p.detach().clone() for p in params]
        single = build(make_parameters(SPECS), None)
        for which, names in (
            (optimizer, ("other", "other")),
            (optimizer, ("ema", "other")),
            (optimizer, ("ema", "thin")),
            (optimizer, (None, "ema")),
            (single, (None, "ema")),
            (optimizer, (["ema"], "ema")),
        ):
            texts.append(message_of(lambda o=which, n=names[rank]: o.averaged_parameters(n).__enter__()))
            assert all(map(same_bits, params, before))
        with optimizer.averaged_parameters(None if rank else "mean"):  # the same one
            assert not same_bits(params[2], before[2])
        train(params, [STEPS - 1], optimizer)
        assert all(same_bits(p, q.to(p.dtype)) for p, q in zip(params, iterates(SPECS)[-1], strict=True))
        return texts

    texts, others = run_ranks(2, ranks)
    assert texts == others and all(text.startswith("ValueError") for text in texts[:5])
    assert all("no average 'other'" in text and "'mean', 'ema', 'tail', 'thin'" in text for text in texts[:2])
    assert "ax_ema on rank 0" in texts[2] and "ax_thin on rank 1" in texts[2] and "ax on rank 0" in texts[3]
    assert "no average 'ema'" in texts[4] and "'average'" in texts[4]


@pytest.mark.parametrize(("gradients_are", "owners"), [("reduced", 2), ("sharded", 1)])
def test_each_average_takes_its_share_of_memory_and_nothing_before_it_begins(gradients_are: str, owners: int) -> None:
    numel = 3 * 2**20

    class Largest(TorchDispatchMode):
        """Of what operators make: bytes."""

        found = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            known = {arg.untyped_storage().data_ptr() for arg in args if isinstance(arg, torch.Tensor)}
            if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in known:
                self.found = max(self.found, result.untyped_storage().nbytes())
            return result

    def ranks(rank: int) -> list[int]:
        model = torch.nn.ParameterList([torch.nn.Parameter(torch.zeros(numel))])
        averages = {"ema": EMA(0.9), "tail": Tail(0.5, 8), "thin": Uniform(every=2)}
        optimizer = ShardedASGD(model.named_parameters(), t0=1, average=averages, gradients=gradients_are)
        model[0].grad, held = torch.ones(numel), []
        for _ in range(6):
            optimizer.step()
            held.append(reachable(optimizer, model) - 4 * numel)  # the gradient
        with Largest() as largest:
            optimizer.step()
        assert largest.found <= 2**20
        optimizer.restart_averaging()
        return [*held, reachable(optimizer, model) - 4 * numel]

    share = 4 * numel // owners
    for held in run_ranks(2, ranks):
        kept = [round(each / share, 3) for each in held]
        assert kept == [0, 0, 2, 2, 3, 3, 0]  # steps 3 and 5 find more than one iterate


def test_restarted_averages_forget_at_once_and_hold_the_second_step_from_then() -> None:
    """Of every kind, a Tail before its time among them; and they go on so from their state."""
    again, more = 9, STEPS

    def ranks(rank: int) -> None:
        found, params = iterates(SPECS), make_parameters(SPECS)
        optimizer = build(params, SEVERAL)
        train(params, range(again), optimizer)
        optimizer.restart_averaging()
        assert all(entry[key] == 1 for entry in optimizer.state.values() for key in entry if key.startswith("mu"))
        for name in SEVERAL:
            with optimizer.averaged_parameters(name):
                assert all(same_bits(p, q.to(p.dtype)) for p, q in zip(params, found[again - 1], strict=True))
        train(params, range(again, again + 3), optimizer)
        state, optimizer = optimizer.state_dict(), build(params, SEVERAL)
        optimizer.load_state_dict(state)
        train(params, range(again + 3, more), optimizer)
        whole = {name: Uniform() if isinstance(kind, Tail) else kind for name, kind in SEVERAL.items()}
        for index, entry in optimizer.full_state_dict().get("state", {}).items():
            check_means(whole, entry, [values[index] for values in found[again + 1 :]], index)

    for size in (1, 3):
        run_ranks(size, ranks)


def test_a_tail_that_is_started_by_hand_keeps_its_own_later_start() -> None:
    def ranks(rank: int) -> None:
        found, params = iterates(SPECS), make_parameters(SPECS)
        optimizer = build(params, STARTED)
        train(params, range(5), optimizer)
        optimizer.restart_averaging()
        train(params, range(5, 9), optimizer)
        optimizer.start_averaging()
        for name in STARTED:  # that were under way
            with optimizer.averaged_parameters(name):
                assert not same_bits(params[2], found[8][2]), name
        train(params, range(9, STEPS), optimizer)
        for index, entry in optimizer.full_state_dict().get("state", {}).items():
            check_means(STARTED, entry, [values[index] for values in found[10:]], index)

    run_ranks(2, ranks)


def test_slices_of_fsdp1_have_several_averages_too(tmp_path: Path) -> None:
    def ranks(rank: int) -> Mapping[int, dict[str, torch.Tensor]]:
        model, optimizer = fsdp1.build(t0=T0, average=SEVERAL)
        found: list[dict[str, torch.Tensor]] = []
        for step in range(STEPS):
            fsdp1.train(model, optimizer, range(step, step + 1))
            found.append({name: p.clone() for name, p in fsdp1.model_state(model).items()})
        state = optimizer.full_state_dict().get("state", {})
        for index, name in enumerate(found[0] if rank == 0 else ()):
            check_means(SEVERAL, state[index], [values[name] for values in found[T0 + 1 :]], name)
        with optimizer.averaged_parameters("kind3"):
            inside = {name: p.clone() for name, p in fsdp1.model_state(model).items()}
        for index, entry in state.items():
            assert same_bits(inside[list(inside)[index]], entry["ax_kind3"])
        dist_asgd.save(tmp_path / "saved", {"model": model, "optimizer": optimizer})
        return state

    state = run_ranks(2, ranks)[0]
    for number, name in enumerate(SEVERAL):
        other = layouts.Model(9)
        dist_asgd.load(tmp_path / "saved", {"model": other}, average=name)
        for index, p in enumerate(other.parameters()):
            assert same_bits(p, state[index][f"ax_{name}" if number else "ax"]), (name, index)


def test_restarting_is_for_all_ranks_and_outside_of_a_swap() -> None:
    def ranks(rank: int) -> list[str]:
        params = make_parameters(SPECS)
        optimizer = build(params, STARTED)
        train(params, range(T0 + 6), optimizer)
        before = optimizer.full_state_dict()
        with optimizer.averaged_parameters():
            texts = [message_of(optimizer.restart_averaging, RuntimeError)]
        call = optimizer.restart_averaging if rank else optimizer.full_state_dict
        texts.append(message_of(call, RuntimeError))
        check_bits(optimizer.full_state_dict(), before)
        return texts

    texts, others = run_ranks(2, ranks)
    assert texts == others and "restart_averaging()" in texts[0]
    assert "rank 1 called ShardedASGD.restart_averaging()" in texts[1]
