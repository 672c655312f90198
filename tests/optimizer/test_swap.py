"""`averaged_parameters()` cannot go wrong: what happens inside is refused or right, and what was before comes back."""

import contextlib
import re
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
)
from torch.optim.swa_utils import update_bn

import dist_asgd
from dist_asgd import Checkpointer, ShardedASGD, swap
from dist_asgd.checkpoint import CheckpointError
from tests.support import fsdp1
from tests.support.averaging import trained
from tests.support.failures import one_message
from tests.support.layouts import (
    EVERYWHERE,
    WORLD_SIZES,
    Model,
    backward,
    batch,
    build,
    data_rank,
    named_parameters,
    train,
    whole,
)
from tests.support.oracle import PLAIN, Spec, same_bits, wide
from tests.support.ranks import message_of, run_alone, run_ranks

OPTIONS: dict[str, Any] = {"lr": 0.05, "lambd": 1e-3, "t0": 2}
FSDP1 = [("fsdp1", 1), ("fsdp1", 3)]


def make(layout: str, **options: Any) -> tuple[nn.Module, ShardedASGD]:
    """A model after a few steps, averaging."""
    options = OPTIONS | options
    model, optimizer = fsdp1.build(**options) if layout == "fsdp1" else build(layout, **options)
    steps(model, optimizer, layout, range(6))
    return model, optimizer


def steps(model: nn.Module, optimizer: ShardedASGD, layout: str, numbers: range) -> None:
    if layout == "fsdp1":
        fsdp1.train(model, optimizer, numbers)
    else:
        train(model, optimizer, layout, numbers)


def give(model: nn.Module, layout: str, step: int) -> None:
    (fsdp1.backward if layout == "fsdp1" else lambda *_: backward(model, layout, step))(model, step)


def bits(optimizer: ShardedASGD) -> list[Tensor]:
    """What this rank has of the parameters."""
    optimizer.synchronize()
    params = optimizer.param_groups[0]["params"]
    return [(p.to_local() if isinstance(p, dist.tensor.DTensor) else p).detach().clone() for p in params]


def all_same(some: list[Tensor], others: list[Tensor]) -> bool:
    return len(some) == len(others) and all(map(same_bits, some, others))


def values_of(model: nn.Module, layout: str) -> list[Tensor]:
    if layout == "fsdp1":
        return list(get_model_state_dict(model, options=WHOLE).values())
    return [whole(param) for param in named_parameters(model).values()]


WHOLE = StateDictOptions(full_state_dict=True)


def averages_of(optimizer: ShardedASGD) -> list[Tensor]:
    """On every rank."""
    full: list[Any] = [optimizer.full_state_dict()]
    if dist.is_initialized():
        dist.broadcast_object_list(full, src=0)
    return [full[0]["state"][index]["ax"] for index in range(len(full[0]["state"]))]


@pytest.mark.parametrize(("layout", "world_size"), EVERYWHERE + FSDP1)
def test_round_trip(layout: str, world_size: int) -> None:
    """With gradients held, and left by an exception, a KeyboardInterrupt or the end; a twin that never swaps agrees."""

    def ranks(rank: int) -> None:
        model, optimizer = make(layout)
        twin, twin_optimizer = make(layout)
        averages = averages_of(optimizer)
        give(model, layout, 50)
        give(twin, layout, 50)
        before = bits(twin_optimizer)
        for error in (None, ValueError, KeyboardInterrupt):
            with contextlib.suppress(ValueError, KeyboardInterrupt), optimizer.averaged_parameters():
                assert all_same(values_of(model, layout), averages)
                if error is not None:
                    raise error
            assert all_same(bits(optimizer), before)
        assert all_same(averages_of(optimizer), averages)
        for each in (optimizer, twin_optimizer):
            each.step()
            each.zero_grad()
        steps(model, optimizer, layout, range(51, 53))
        steps(twin, twin_optimizer, layout, range(51, 53))
        assert all_same(bits(optimizer), bits(twin_optimizer))
        assert all_same(averages_of(optimizer), averages_of(twin_optimizer))

    run_ranks(world_size, ranks)


@pytest.mark.parametrize(("layout", "world_size"), [(layout, 2) for layout in WORLD_SIZES])
def test_averages_of_bf16_parameters_are_rounded_once(layout: str, world_size: int) -> None:
    def ranks(rank: int) -> None:
        torch.set_default_dtype(torch.bfloat16)  # of Model's parameters
        model, optimizer = build(layout, **OPTIONS)
        torch.set_default_dtype(torch.float32)
        for step in range(6):
            for index, param in enumerate(optimizer.param_groups[0]["params"]):
                param.grad = torch.full_like(param, 0.3 + index + step)
            optimizer.step()
        before, averages = bits(optimizer), averages_of(optimizer)
        assert all(average.dtype == torch.float32 for average in averages)
        with optimizer.averaged_parameters():
            assert all_same(values_of(model, layout), [wide(average).bfloat16() for average in averages])
        assert all_same(bits(optimizer), before)

    run_ranks(world_size, ranks)


# What is refused inside


def saved(model: nn.Module, optimizer: ShardedASGD) -> dict[str, Any]:
    return {"model": model, "optimizer": optimizer}


REFUSED: dict[str, Callable[[nn.Module, ShardedASGD, str], object]] = {
    "step": lambda model, optimizer, folder: optimizer.step(),
    "state_dict": lambda model, optimizer, folder: optimizer.state_dict(),
    "full_state_dict": lambda model, optimizer, folder: optimizer.full_state_dict(),
    "load_state_dict": lambda model, optimizer, folder: optimizer.load_state_dict({}),
    "add_param_group": lambda model, optimizer, folder: optimizer.add_param_group(
        {"params": [nn.Parameter(Tensor(3))]}
    ),
    "averaged_parameters": lambda model, optimizer, folder: optimizer.averaged_parameters().__enter__(),
    "get_optimizer_state_dict": lambda model, optimizer, folder: get_optimizer_state_dict(model, optimizer),
    "get_state_dict": lambda model, optimizer, folder: get_state_dict(model, optimizer),
    "dcp.save": lambda model, optimizer, folder: dcp.save(saved(model, optimizer), checkpoint_id=f"{folder}/stock"),
    "torch.save": lambda model, optimizer, folder: torch.save(
        {"model": model.state_dict(), "optimizer": optimizer.state_dict()}, f"{folder}/file"
    ),
    "save": lambda model, optimizer, folder: dist_asgd.save(f"{folder}/one", saved(model, optimizer)),
    "load": lambda model, optimizer, folder: dist_asgd.load(f"{folder}/good", saved(model, optimizer)),
}


@pytest.mark.parametrize(("layout", "world_size"), [("zero", 1), ("zero", 2), ("fsdp", 2), ("hsdp", 2), ("fsdp1", 2)])
def test_what_would_go_wrong_inside_is_refused(layout: str, world_size: int, tmp_path: Path) -> None:
    def ranks(rank: int) -> list[str]:
        model, optimizer = make(layout)
        dist_asgd.save(tmp_path / "good", saved(model, optimizer))
        twin, twin_optimizer = make(layout)
        texts = []
        with optimizer.averaged_parameters():
            inside = bits(optimizer)
            for name, call in REFUSED.items():
                kind = CheckpointError if name in ("save", "load") else RuntimeError
                texts.append(message_of(lambda call=call: call(model, optimizer, str(tmp_path)), kind))
                assert all_same(bits(optimizer), inside), name
        steps(model, optimizer, layout, range(50, 53))
        steps(twin, twin_optimizer, layout, range(50, 53))
        assert all_same(bits(optimizer), bits(twin_optimizer))
        assert all_same(averages_of(optimizer), averages_of(twin_optimizer))
        return texts

    for name, texts in zip(REFUSED, zip(*run_ranks(world_size, ranks), strict=True), strict=True):
        one_message(list(texts), "inside averaged_parameters()", *(["save the model alone"] if "save" in name else []))
    assert {path.name for path in tmp_path.iterdir() if list(path.iterdir())} == {"good"}


@pytest.mark.parametrize("wait", [True, False])
def test_a_refused_save_leaves_the_checkpointer_as_it_was(wait: bool, tmp_path: Path) -> None:
    def ranks(rank: int) -> list[str]:
        model, optimizer = make("zero")
        checkpoints = Checkpointer(tmp_path / "run", keep_last=1)
        state = {"model": model, "optimizer": optimizer, "data": {"epoch": 1}}
        checkpoints.save(6, state, wait=wait)
        steps(model, optimizer, "zero", range(6, 8))
        with optimizer.averaged_parameters():
            texts = [message_of(lambda: checkpoints.save(8, state, wait=wait), CheckpointError)]
            texts.append(message_of(lambda: checkpoints.load(state), CheckpointError))
        expected = bits(optimizer)
        steps(model, optimizer, "zero", range(8, 9))
        assert checkpoints.steps() == [6]
        checkpoints.save(9, state, wait=wait)
        assert checkpoints.load(state) == 9
        assert checkpoints.steps() == [9]
        checkpoints.close()
        assert not all_same(bits(optimizer), expected)
        return texts

    for texts in zip(*run_ranks(2, ranks), strict=True):
        one_message(list(texts), "state_dict()", "save the model alone")


def test_loading_as_stock_pytorch_does_is_refused(tmp_path: Path) -> None:
    def ranks(rank: int) -> str:
        model, optimizer = make("fsdp")
        state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
        dcp.save(state, checkpoint_id=str(tmp_path))
        with optimizer.averaged_parameters():
            return message_of(lambda: set_optimizer_state_dict(model, optimizer, state["optimizer"]), RuntimeError)

    one_message(run_ranks(2, ranks), "inside averaged_parameters()")


# What is right inside


@pytest.mark.parametrize("layout", ["zero", "fsdp"])
def test_the_model_alone_is_saved_with_its_average(layout: str, tmp_path: Path) -> None:
    def ranks(rank: int) -> None:
        model, optimizer = make(layout)
        averages = averages_of(optimizer)
        with optimizer.averaged_parameters():
            dist_asgd.save(tmp_path / "average", {"model": model})
        shipped = Model(seed=9)
        dist_asgd.load(tmp_path / "average", {"model": shipped})
        assert all_same(list(shipped.parameters()), averages)

    run_ranks(2, ranks)


@pytest.mark.parametrize("layout", ["zero", "fsdp"])
def test_what_works_inside_means_what_it_means_outside(layout: str) -> None:
    """Clipping, dropping gradients, freezing, starting the average, looking at the state of one parameter."""

    def ranks(rank: int) -> None:
        model, optimizer = make(layout)
        twin, twin_optimizer = make(layout)
        norms = []
        for step, inside in ((50, True), (51, False), (52, True)):
            for net, each in ((model, optimizer), (twin, twin_optimizer)):
                give(net, layout, step)
                with each.averaged_parameters() if inside and each is optimizer else contextlib.nullcontext():
                    norms.append(each.clip_grad_norm_(0.01))
                    if step == 50:
                        each.start_averaging()
                        next(net.parameters()).requires_grad_(False)
                    if step == 51:
                        each.zero_grad()
                each.step() if step != 51 else None
                each.zero_grad()
            state, other = ({**each.state[each.param_groups[0]["params"][3]]} for each in (optimizer, twin_optimizer))
            with optimizer.averaged_parameters():
                inside_state = optimizer.state[optimizer.param_groups[0]["params"][3]]
                for key, value in state.items():
                    one, two, three = (getattr(each[key], "local", each[key]) for each in (state, inside_state, other))
                    one, two, three = (getattr(each, "_local_tensor", each) for each in (one, two, three))
                    assert same_bits(one, two) and same_bits(one, three), (key, value)
        assert norms[0] > 0.01 and all(map(torch.equal, norms[::2], norms[1::2]))
        assert all_same(bits(optimizer), bits(twin_optimizer))
        assert optimizer.param_groups[0]["t0"] == twin_optimizer.param_groups[0]["t0"] == 6

    run_ranks(2, ranks)


@pytest.mark.parametrize("layout", ["zero", "fsdp", "tp"])
@pytest.mark.parametrize("averaging", [True, False])
def test_what_is_written_to_parameters_inside_is_dropped(averaging: bool, layout: str) -> None:
    """Weights that are loaded, or zeroed, also before there is an average; the model moved and cast to and fro."""

    def ranks(rank: int) -> None:
        model, optimizer = make(layout, t0=2 if averaging else 1e6)
        twin, twin_optimizer = make(layout, t0=2 if averaging else 1e6)
        before = bits(optimizer)
        other = dict(zip(named_parameters(model), values_of(build(layout, seed=5)[0], layout), strict=True))
        with optimizer.averaged_parameters():
            if layout == "zero":
                model.load_state_dict(other)
            with torch.no_grad():
                next(iter(named_parameters(model).values())).zero_()
        assert all_same(bits(optimizer), before)
        with optimizer.averaged_parameters():
            model.half()
            model.float()
        assert all_same(bits(optimizer), before)
        assert all_same(values_of(model, layout), values_of(twin, layout))
        steps(model, optimizer, layout, range(50, 53))
        steps(twin, twin_optimizer, layout, range(50, 53))
        assert all_same(bits(optimizer), bits(twin_optimizer))

    run_ranks(2, ranks)


@pytest.mark.parametrize("layout", ["zero", "fsdp"])
def test_a_model_that_was_cast_inside_and_not_back_is_noticed(layout: str) -> None:
    def ranks(rank: int) -> str:
        model, optimizer = make(layout)

        def cast() -> None:
            with optimizer.averaged_parameters():
                model.half()

        text = message_of(cast, RuntimeError)
        assert "float16" in message_of(optimizer.state_dict, RuntimeError)
        return text

    for text in run_ranks(2, ranks):
        assert "has become torch.float16" in text and "built for torch.float32" in text


@pytest.mark.parametrize("layout", ["zero", "ddp", "fsdp", "hsdp", "tp"])
@pytest.mark.parametrize("order", ["forward inside", "backward inside", "around"])
def test_no_backward_goes_through_other_values_than_its_forward(order: str, layout: str) -> None:
    """FSDP2 would gather what the parameters are by then, without a word."""

    def ranks(rank: int) -> str:
        model, optimizer = make(layout)
        x, y = batch(99, *data_rank(layout))
        block = optimizer.averaged_parameters()
        if order != "forward inside":
            loss = (model(x) - y).square().mean()
        with block:
            if order == "forward inside":
                loss = (model(x) - y).square().mean()
            if order == "backward inside":
                return message_of(loss.backward, RuntimeError)
        return message_of(loss.backward, RuntimeError)

    assert all("modified by an inplace operation" in text for text in run_ranks(2, ranks))


@pytest.mark.parametrize("how", ["autocast", "inference_mode", "no_grad"])
@pytest.mark.parametrize("layout", ["zero", "fsdp"])
def test_inside_of_what_evaluations_are_in(layout: str, how: str) -> None:
    """Autocast keeps what it has cast, as long as it lasts."""

    def ranks(rank: int) -> None:
        model, optimizer = make(layout)
        expected = Model()
        expected.load_state_dict(dict(zip(dict(expected.named_parameters()), averages_of(optimizer), strict=True)))
        x = batch(99)[0]

        @contextlib.contextmanager
        def evaluation() -> Any:
            if how == "autocast":
                with torch.autocast("cpu", torch.bfloat16):
                    yield
            else:
                with torch.inference_mode() if how == "inference_mode" else torch.no_grad():
                    yield

        with evaluation():
            raw = model(x)
            with optimizer.averaged_parameters():
                averaged = model(x)
            again = model(x)
        with evaluation():
            assert torch.equal(averaged, expected(x)) and not torch.equal(averaged, raw)
        assert torch.equal(again, raw)
        twin, twin_optimizer = make(layout)
        steps(model, optimizer, layout, range(50, 53))
        steps(twin, twin_optimizer, layout, range(50, 53))
        assert all_same(bits(optimizer), bits(twin_optimizer))

    if (layout, how) == ("fsdp", "inference_mode"):
        pytest.skip("FSDP2 keeps inference tensors of an inference_mode, and cannot go on training: torch's own")
    run_ranks(2, ranks)


class Tied(Model):
    def __init__(self) -> None:
        super().__init__()
        self.blocks[1].up.weight = self.blocks[0].up.weight
        self.blocks[1].norm = self.blocks[0].norm


@pytest.mark.parametrize("layout", ["zero", "fsdp"])
def test_tied_weights_and_compiled_models(layout: str) -> None:
    def ranks(rank: int) -> None:
        torch.manual_seed(0)
        model = Tied()
        if layout == "fsdp":
            dist.fsdp.fully_shard(model)
        optimizer = ShardedASGD(model.named_parameters(), module=model if layout == "fsdp" else None, **OPTIONS)
        compiled = torch.compile(model, backend="aot_eager")
        train(compiled, optimizer, "zero", range(6))
        expected = Tied()
        values = dict(zip(dict(expected.named_parameters()), averages_of(optimizer), strict=True))
        expected.load_state_dict(values, strict=False)
        x = batch(99)[0]
        with torch.no_grad():
            raw = compiled(x)
            with optimizer.averaged_parameters():
                averaged = compiled(x)
            assert torch.allclose(averaged, expected(x), atol=1e-6) and not torch.allclose(averaged, raw, atol=1e-4)
            assert torch.equal(compiled(x), raw)

    run_ranks(2, ranks, timeout=120)


# Staging, threads, interrupts, ends


def test_a_swap_right_after_an_asynchronous_save(tmp_path: Path) -> None:
    """It has copied all that it needs: the checkpoint has the weights, not their average."""

    def ranks(rank: int) -> list[Tensor]:
        model, optimizer = make("zero")
        checkpoints = Checkpointer(tmp_path / "run")
        checkpoints.save(6, saved(model, optimizer), wait=False)
        with optimizer.averaged_parameters():
            checkpoints.wait()
        other, loaded = build("zero", seed=7, **OPTIONS)
        assert checkpoints.load(saved(other, loaded)) == 6
        checkpoints.close()
        assert all_same(bits(loaded), bits(optimizer))
        return bits(optimizer)

    run_ranks(2, ranks)


def test_another_thread_neither_steps_nor_saves_inside_nor_swaps_meanwhile() -> None:
    def alone() -> None:
        pair = trained(list(PLAIN), 1)
        optimizer, before = pair.optimizer, [p.detach().clone() for p in pair.params]

        def enter() -> None:
            with optimizer.averaged_parameters():
                pass

        def in_thread(call: Callable[[], object]) -> str:
            texts: list[str] = []
            thread = threading.Thread(target=lambda: texts.append(message_of(call, RuntimeError)))
            thread.start()
            thread.join()
            return texts[0]

        with optimizer.averaged_parameters():
            for call in (optimizer.step, optimizer.state_dict, enter):
                assert "inside averaged_parameters()" in in_thread(call)
        hook = optimizer.register_state_dict_pre_hook(lambda _: texts.append(in_thread(enter)))
        texts: list[str] = []
        optimizer.state_dict()  # as slow as it may be: the other thread wants to swap in its middle
        hook.remove()
        assert "another thread" in texts[0]
        assert all(map(same_bits, pair.params, before))
        enter()
        pair.train(range(50, 55))

    run_alone(alone)


def interrupt_at(number: int, call: Callable[[], object], is_place: Callable[[Any], bool]) -> bool:
    """Ctrl-C where Python looks for signals: at the `number`-th call in or by a frame that `is_place`, if any."""
    count = 0

    def profile(frame: Any, event: str, _: object) -> None:
        nonlocal count
        if event != "return" and (is_place(frame) or (event == "call" and frame.f_back and is_place(frame.f_back))):
            count += 1
            if count == number:
                signal.raise_signal(signal.SIGINT)

    with contextlib.suppress(KeyboardInterrupt):
        try:
            sys.setprofile(profile)
            call()
        finally:
            sys.setprofile(None)
    return count >= number


def is_ours(frame: Any) -> bool:
    file = frame.f_code.co_filename
    return file == contextlib.__file__ or f"{Path(dist_asgd.__file__).parent}/" in file


def is_swap(frame: Any) -> bool:
    """Elsewhere, what a rank does depends on what it has."""
    return frame.f_code.co_filename == swap.__file__


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("start", range(3))
def test_an_interrupt_at_any_point_restores(start: int) -> None:
    def alone() -> int:
        pair = trained([*PLAIN, Spec((9,), torch.bfloat16)], 1, bucket_bytes=1024)
        before = [p.detach().clone() for p in pair.params]

        def swap() -> None:
            with pair.optimizer.averaged_parameters():
                pass

        point = 1 + start
        while interrupt_at(point, swap, is_ours):
            assert all(map(same_bits, pair.params, before)), point
            pair.optimizer.state_dict()
            point += 3
        pair.train(range(50, 52))
        return point

    assert run_alone(alone) > 100


@pytest.mark.parametrize("layout", ["zero", "fsdp", "hsdp", "tp", "fsdp1"])
def test_an_interrupt_of_all_ranks_restores(layout: str) -> None:
    def ranks(rank: int) -> int:
        model, optimizer = make(layout, bucket_bytes=2048)
        before = bits(optimizer)

        def swap() -> None:
            with optimizer.averaged_parameters():
                pass

        point = 1
        while interrupt_at(point, swap, is_swap):
            assert all_same(bits(optimizer), before), point
            point += 3
        twin, twin_optimizer = make(layout, bucket_bytes=2048)
        steps(model, optimizer, layout, range(50, 52))
        steps(twin, twin_optimizer, layout, range(50, 52))
        assert all_same(bits(optimizer), bits(twin_optimizer))
        return point

    assert min(run_ranks(2, ranks)) > 60


def test_a_block_that_is_never_left_keeps_refusing_and_one_that_is_forgotten_is_left() -> None:
    def ranks(rank: int) -> None:
        model, optimizer = make("zero")
        before = bits(optimizer)
        block = optimizer.averaged_parameters()
        block.__enter__()
        assert "leave the with block" in message_of(optimizer.step, RuntimeError)
        del block
        assert all_same(bits(optimizer), before)
        steps(model, optimizer, "zero", range(50, 52))

    run_ranks(2, ranks)


def test_leaving_after_the_process_group_was_destroyed() -> None:
    """What needs other ranks cannot come back, and says so; what does not, does."""

    def ranks(rank: int) -> None:
        _, optimizer = make("zero")
        _, sharded = make("fsdp")
        raw, raw_sharded = bits(optimizer), bits(sharded)
        blocks = [optimizer.averaged_parameters(), sharded.averaged_parameters()]
        for block in blocks:
            block.__enter__()
        dist.barrier()
        dist.destroy_process_group()
        text = message_of(lambda: blocks[0].__exit__(None, None, None))
        assert "destroy_process_group()" in text
        own = [same_bits(mine, other) for mine, other in zip(bits(optimizer), raw, strict=True)]
        assert any(own) and not all(own)
        blocks[1].__exit__(None, None, None)
        assert all_same(bits(sharded), raw_sharded)
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # for the harness

    run_ranks(2, ranks)


# BatchNorm


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.inside, self.norm, self.outside = nn.Linear(7, 10), nn.BatchNorm1d(10), nn.Linear(10, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.outside(torch.tanh(self.norm(self.inside(x))))


GUIDE = (Path(__file__).parents[2] / "docs/guide/averaging.md").read_text()
RECIPE = re.search(r"```python\n(from torch\.optim\.swa_utils import update_bn\n.*?)```", GUIDE, re.DOTALL)


@pytest.mark.parametrize(("layout", "world_size"), [("zero", 1), ("zero", 2), ("ddp", 2), ("fsdp", 2)])
def test_statistics_of_the_average_as_the_docs_have_it(layout: str, world_size: int) -> None:
    """Runs the recipe of docs/guide/averaging.md beside a plain model that holds the averages."""

    def ranks(rank: int) -> None:
        torch.set_default_dtype(torch.float64)
        model, expected = Normed(), Normed()
        if layout == "fsdp":
            dist.fsdp.fully_shard(model)
        net = nn.parallel.DistributedDataParallel(model) if layout == "ddp" else model
        options = {"gradients": "reduced" if layout == "ddp" else "local", "module": model}
        opt = ShardedASGD(model.named_parameters(), **options, **OPTIONS)
        batches = [batch(step, rank, world_size)[0].double() for step in range(6)]
        for x in batches:
            net(x).square().mean().backward()
            opt.step()
            opt.zero_grad()
        names = dict(expected.named_parameters())
        expected.load_state_dict(dict(zip(names, averages_of(opt), strict=True)), strict=False)
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        assert before["norm.num_batches_tracked"] == 6
        update_bn(batches, expected)
        expected.eval()
        seen = []

        def evaluate(evaluated: nn.Module) -> None:
            assert not evaluated.training
            for (name, buffer), other in zip(evaluated.named_buffers(), expected.buffers(), strict=True):
                assert torch.allclose(buffer, other, rtol=1e-12, atol=1e-14), name
                assert not torch.equal(buffer, before[name]) or "num" in name
            seen.append(torch.allclose(evaluated(batches[0]), expected(batches[0]), rtol=1e-12))

        assert RECIPE is not None
        model.eval()
        exec(RECIPE.group(1), {"model": model, "opt": opt, "batches": batches, "evaluate": evaluate})
        assert seen == [True] and not model.training
        assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())

    run_ranks(world_size, ranks)
