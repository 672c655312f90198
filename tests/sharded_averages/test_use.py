"""What users do with averages: start them, evaluate on them, copy them, compare tails, add parameters."""

import copy
import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from dist_asgd import EMA, PolynomialDecay, ShardedASGD, ShardedAverages, Tail, TwoTailed, Uniform, load, save
from tests.support.beside import iterate, trained
from tests.support.iterates import averaged
from tests.support.layouts import Model, backward, named_parameters, place, whole
from tests.support.ranks import run_alone, run_ranks


def parameters(dtypes=(torch.float32,)):
    """Parameters of many shapes: 0-d, empty, complex with a complex dtype."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(), (0, 3), (5,), (3, 4, 2), (33, 7)]
    return {
        f"{dtype}.{number}".removeprefix("torch."): nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        for dtype in dtypes
        for number, shape in enumerate(shapes)
    }


def walk(params, step):
    """Writes values to parameters that depend on the step alone, equal on every rank."""
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for param in params.values():
            if param.requires_grad:
                param.copy_(torch.randn(param.shape, generator=generator).to(param.dtype))


def snapshot(params):
    return {name: param.detach().clone() for name, param in params.items()}


def all_equal(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64)


def many_dtypes(rank=0):
    params = parameters(DTYPES)
    kinds = {"ema": EMA(0.7, warmup=False), "mean": Uniform(), "power": PolynomialDecay(2.0), "rare": Uniform(every=3)}
    averages = ShardedAverages(params.items(), kinds)
    iterates = []
    for step in range(8):
        walk(params, step)
        averages.update()
        iterates.append(snapshot(params))
    for name, kind in kinds.items():
        found = averages.full_state_dict(name)
        if rank == 0:
            assert all_equal(found, averaged(iterates, kind)), name


@pytest.mark.parametrize("world_size", [1, 3])
def test_dtypes_and_shapes(world_size):
    run_ranks(world_size, many_dtypes)


def starts():
    params = parameters()
    averages = ShardedAverages(params.items(), {"mean": Uniform(), "ema": EMA(0.5)}, start=2, offload=True)
    waiting = ShardedAverages(params.items(), Uniform(), start=math.inf)
    iterates = []
    for step in range(6):
        walk(params, step)
        averages.update()
        waiting.update()
        iterates.append(snapshot(params))
        if step < 2:
            assert not any(tensor is not None for _, b in averages._buckets for tensor in b.shard.averages.values())
            assert all_equal(averages.full_state_dict("ema"), iterates[-1])
        if step == 3:
            waiting.start_averaging()
    assert all_equal(averages.full_state_dict("mean"), averaged(iterates[2:], Uniform()))
    assert all_equal(averages.full_state_dict("ema"), averaged(iterates[2:], EMA(0.5)))
    assert all_equal(waiting.full_state_dict(), averaged(iterates[4:], Uniform()))
    averages.restart_averaging()
    assert all_equal(averages.full_state_dict(), iterates[-1])
    for step in range(6, 9):
        walk(params, step)
        averages.update()
        iterates.append(snapshot(params))
    assert all_equal(averages.full_state_dict(), averaged(iterates[6:], Uniform()))
    assert averages.updates == 9


def test_the_start_of_averaging():
    run_alone(starts)


def tails():
    params = parameters()
    averages = ShardedAverages(params.items(), Tail(fraction=0.5, steps=8))
    iterates = []
    for step in range(8):
        walk(params, step)
        averages.update()
        iterates.append(snapshot(params))
    assert all_equal(averages.full_state_dict(), averaged(iterates[4:], Uniform()))


def test_a_tail_is_counted_from_the_first_update():
    run_alone(tails)


@pytest.mark.parametrize(
    ("kind", "decay"),
    [
        (EMA(half_life=5), lambda n: 2 ** (-1 / 5)),
        (EMA(half_life=5, every=2), lambda n: 2 ** (-2 / 5)),
        (EMA(half_life_fraction=0.25), lambda n: 2 ** (-1 / (0.25 * n))),
    ],
)
def test_half_lives(kind, decay):
    """An iterate counts half as much after a half-life: of a constant one, or of a fraction of the iterates so far."""
    numbers = range(1, 200)
    weights = [1.0]
    for n in numbers[1:]:
        mu = kind.mu(kind.every * (n - 1), -1)
        assert mu == kind.weight(n)
        weights = [weight * (1 - mu) for weight in weights] + [mu]
    assert math.isclose(sum(weights), 1)
    last = decay(199) if kind.half_life_fraction else decay(1)
    assert math.isclose(weights[-2] / weights[-1], last * (kind.weight(198) / kind.weight(199)), rel_tol=1e-9)
    if kind.half_life_fraction is None:
        steps = 5 // math.gcd(5, kind.every)
        assert math.isclose(weights[-1 - steps] / weights[-1], 2 ** (-steps * kind.every / 5), rel_tol=1e-9)


def frozen(rank):
    params = parameters()
    names = list(params)
    params[names[2]].requires_grad_(False)
    averages = ShardedAverages(params.items(), Uniform())
    iterates = []
    for step in range(5):
        if step == 2:
            params[names[2]].requires_grad_(True)
        walk(params, step)
        averages.update()
        iterates.append(snapshot(params))
        if step == 1:
            assert names[2] not in averages.state_dict()["average"]
            assert rank or torch.equal(averages.full_state_dict()[names[2]], params[names[2]]), "as it is"
            assert rank == 0 or averages.full_state_dict() == {}
    found = averages.full_state_dict()
    if rank == 0:
        late = averaged([{names[2]: it[names[2]]} for it in iterates[2:]], Uniform())
        assert all_equal(found, averaged(iterates, Uniform()) | late)
    if dist.get_world_size() > 1:
        return
    state = averages.state_dict()
    again = ShardedAverages(params.items(), Uniform())
    again.load_state_dict(state)
    walk(params, 9)
    averages.update()
    again.update()
    one, other = averages.full_state_dict(), again.full_state_dict()
    assert all_equal(one, other)


@pytest.mark.parametrize("world_size", [1, 2])
def test_frozen_parameters_join_when_they_are_unfrozen(world_size):
    run_ranks(world_size, frozen)


def added(rank):
    params = parameters()
    averages = ShardedAverages(params.items(), Uniform())
    walk(params, 0)
    averages.update()
    more = {"late": nn.Parameter(torch.zeros(6))}
    averages.add_param_group({"params": list(more.items())})
    iterates = []
    for step in range(1, 4):
        walk(params | more, step)
        averages.update()
        iterates.append(snapshot(more))
    found = averages.full_state_dict()
    assert rank or torch.equal(found["late"], averaged(iterates, Uniform())["late"])
    with pytest.raises(ValueError, match="'late' has averages already"):
        averages.add_param_group({"params": list(more.items())})


def test_parameters_that_are_added_later():
    run_ranks(2, added)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.inside = nn.Embedding(9, 4)
        self.outside = nn.Linear(4, 9, bias=False)
        self.outside.weight = self.inside.weight


def tied():
    model = Tied()
    averages = ShardedAverages(model.named_parameters(), Uniform(), module=model)
    averages.update()
    assert list(averages.full_state_dict()) == ["inside.weight", "outside.weight"]
    Tied().load_state_dict(averages.full_state_dict())
    assert list(averages.state_dict()["average"]) == ["inside.weight", "outside.weight"]
    compiled = torch.compile(model)
    names = list(ShardedAverages(compiled.named_parameters(), Uniform(), module=compiled).full_state_dict())
    assert names == ["inside.weight", "outside.weight"], "without the prefix of torch.compile"


def test_tied_weights_have_all_their_names():
    run_alone(tied)


def test_an_average_of_tied_weights_is_loaded_as_weights(tmp_path):
    def work():
        model = Tied()
        averages = ShardedAverages(model.named_parameters(), Uniform(), module=model)
        averages.update()
        expected = model.inside.weight.detach().clone()
        save(tmp_path / "saved", {"model": model, "averages": averages})
        other = Tied()
        load(tmp_path / "saved", {"model": other}, average=True)
        assert torch.equal(other.inside.weight, expected) and other.outside.weight is other.inside.weight

    run_alone(work)


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.BatchNorm1d(3)
        self.last = nn.Linear(3, 1)
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, x):
        return self.last(self.norm(x))


def with_buffers(rank):
    model = DistributedDataParallel(Normed(), broadcast_buffers=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    averages = ShardedAverages(
        model.named_parameters(),
        {"mean": Uniform(), "ema": EMA(0.5)},
        optimizer=optimizer,
        module=model,
        buffers="average",
    )
    seen = []
    for step in range(4):
        x = torch.randn(16, 3, generator=torch.Generator().manual_seed(10 * step + rank)) + rank
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append({name: value.clone() for name, value in model.module.named_buffers()})
    expected = averaged([{"norm.running_mean": buffers["norm.running_mean"]} for buffers in seen], Uniform())
    found = averages.full_state_dict("mean")
    if rank == 0:
        assert torch.equal(found["norm.running_mean"], expected["norm.running_mean"])
        assert found["norm.num_batches_tracked"] == 4
        Normed().load_state_dict({name: value for name, value in found.items() if name != "scratch"})
    before = {name: value.clone() for name, value in model.module.named_buffers()}
    with averages.averaged_parameters("mean"):
        inside = averages._agreement.gather(model.module.norm.running_mean.tolist())
        assert inside[0] == inside[1], "rank 0's"
        model.train()(torch.randn(16, 3))
    assert all_equal(dict(model.module.named_buffers()), before)
    teacher = Normed()
    averages.copy_to(teacher, "mean")
    assert teacher.norm.running_mean.tolist() == inside[0]
    assert teacher.norm.num_batches_tracked == 4


@pytest.mark.filterwarnings("ignore:`broadcast_buffers` is deprecated")
def test_buffers_are_averaged_copied_and_swapped():
    run_ranks(2, with_buffers)


def treatments():
    model = Normed()

    def build(buffers):
        return ShardedAverages(model.named_parameters(), Uniform(), module=model, buffers=buffers)

    everything = {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked", "scratch"}
    assert set(build("copy")._buffers.names) == everything
    assert build({"*.running_*": "average"})._buffers.names == ["norm.running_mean", "norm.running_var"]
    for bad, error, text in [
        ("both", ValueError, "'average', 'copy'"),
        ({"*.nothing": "copy"}, ValueError, "no such buffer"),
        (3, TypeError, "mapping"),
    ]:
        with pytest.raises(error, match=text):
            build(bad)
    with pytest.raises(ValueError, match="Pass module="):
        ShardedAverages(model.named_parameters(), Uniform(), buffers="copy")


def test_treatments_of_buffers():
    run_alone(treatments)


def two_tailed(rank):
    params = parameters()
    averages = ShardedAverages(params.items(), TwoTailed())
    assert averages.names == ("short", "long")
    with pytest.raises(RuntimeError, match="no losses are known"):
        print(averages.best)
    short, long = [], []
    losses = [(3.0, 3.0), (2.0, 3.0), (5.0, 4.0), (1.0, 1.0), (math.inf, 0.5)]
    for number, (short_loss, long_loss) in enumerate(losses):
        for step in range(number + 1):
            walk(params, 10 * number + step)
            averages.update()
            short.append(snapshot(params))
            long.append(snapshot(params))
        for name, of_name in (("short", short), ("long", long)):
            found = averages.full_state_dict(name)
            assert rank or all_equal(found, averaged(of_name, Uniform())), (number, name)
        better = averages.compare_tails(short=short_loss + rank, long=long_loss + rank)
        if short_loss <= long_loss:
            assert better == "short"
            short, long = [], short
            found = averages.full_state_dict("short")
            assert rank or all_equal(found, snapshot(params)), "begins anew"
        assert averages.best == "long"
        if number == 2:  # its state is in state dicts
            again = ShardedAverages(params.items(), TwoTailed())
            again.load_state_dict(copy.deepcopy(averages.state_dict()))
            averages = again
            assert averages.best == "long"
    with pytest.raises(ValueError, match="got nan"):
        averages.compare_tails(short=math.nan, long=1.0)
    plain = ShardedAverages(params.items(), Uniform())
    with pytest.raises(ValueError, match="TwoTailed"):
        plain.compare_tails(short=1.0, long=1.0)
    with pytest.raises(ValueError, match="TwoTailed"):
        print(plain.best)
    with pytest.raises(ValueError, match="ShardedAverages"):
        ShardedASGD(params.items(), average=TwoTailed())


@pytest.mark.parametrize("world_size", [1, 2])
def test_two_tailed_averages(world_size):
    run_ranks(world_size, two_tailed)


def copied(rank, layout, other):
    _, _, averages, iterates = trained(layout)
    teacher = place(other, Model(3)) if other != "plain" else Model(3)
    averages.copy_to(teacher, "ema")
    with torch.no_grad():
        teacher(torch.ones(4, 7))  # FSDP2 keeps whole parameters from here on, which it drops at the next reshard()
    averages.copy_to(teacher, "mean")
    if isinstance(teacher, FSDPModule):
        teacher.reshard()
    expected = averaged(iterates, Uniform())
    assert all(torch.equal(whole(param), expected[name]) for name, param in named_parameters(teacher).items())


@pytest.mark.parametrize(
    ("layout", "other"), [("ddp", "plain"), ("fsdp", "fsdp"), ("hsdp", "plain"), ("zero", "fsdp"), ("tp", "fsdp")]
)
def test_copies_for_teachers(layout, other):
    run_ranks(2, copied, layout, other)


def interrupted(rank, layout):
    model, optimizer, averages, _ = trained(layout)
    before = iterate(model)
    with pytest.raises(KeyError), averages.averaged_parameters("mean"):
        raise KeyError
    assert all_equal(iterate(model), before)
    with averages.averaged_parameters("mean"):
        for forbidden in (optimizer.step, averages.state_dict, lambda: averages.full_state_dict()):
            with pytest.raises(RuntimeError, match=r"inside averaged_parameters\(\)"):
                forbidden()
        with pytest.raises(RuntimeError, match=r"inside averaged_parameters\(\)"), averages.averaged_parameters():
            pass
    assert all_equal(iterate(model), before)
    backward(model, layout, 7)
    optimizer.step()


@pytest.mark.parametrize("layout", ["zero", "ddp", "fsdp"])
def test_a_swap_is_undone_and_steps_are_refused_inside(layout):
    run_ranks(2, interrupted, layout)


def compiled_step():
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.01))
    averages = ShardedAverages(model.named_parameters(), Uniform(), optimizer=optimizer)
    step = torch.compile(optimizer.step, backend="eager")
    iterates = []
    for number in range(4):
        x = torch.randn(4, 7, generator=torch.Generator().manual_seed(number))
        model(x).square().mean().backward()
        step()
        optimizer.zero_grad()
        iterates.append(iterate(model))
    assert averages.updates == 4
    assert all_equal(averages.full_state_dict(), averaged(iterates, Uniform()))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_compiled_step():
    run_alone(compiled_step)
