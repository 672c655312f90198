"""Bad input: a clear error on every rank within seconds: parameter, rank, what to do. Nothing has changed after it."""

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dist_asgd import ShardedASGD
from oracle import (
    PLAIN,
    Messenger,
    Pair,
    Spec,
    backward,
    make_parameters,
    named,
    random_gradients,
    reduce_in_rank_order,
    same_bits,
    tokens_of,
)
from ranks import message_of, run_alone, run_ranks

SECONDS = 8.0  # an error takes no longer than this, on any rank


def quick_message(fn: Callable[[], Any], *kinds: type[BaseException]) -> str:
    start = time.monotonic()
    text = message_of(fn, *kinds)
    assert time.monotonic() - start < SECONDS, f"it took {time.monotonic() - start:.0f} s to say: {text}"
    return text


def one_message(texts: list[str], *parts: str) -> None:
    """Every rank said the same, and it contains each part."""
    assert all(text == texts[0] for text in texts), "ranks say different things:\n" + "\n".join(texts)
    for part in parts:
        assert any(p in texts[0] for p in part.split("|")), f"{part!r} is not in: {texts[0]}"


# Arguments

NAN, INF = float("nan"), float("inf")
BAD_NUMBERS = {
    "lr": [NAN, -0.1, "0.1", None, torch.tensor([0.1, 0.2]), torch.tensor(NAN), torch.tensor(-1.0), 1j],
    "lambd": [NAN, -1e-4, "1e-4", None, [1e-4]],
    "alpha": [NAN, -0.75, "x", None],
    "t0": [NAN, -1, "x", None, 1j],
    "weight_decay": [NAN, -0.1, "x", None],
}


@pytest.mark.parametrize(("option", "value"), [(k, v) for k, values in BAD_NUMBERS.items() for v in values], ids=str)
def test_a_hyperparameter_that_is_no_sensible_number(option: str, value: Any) -> None:
    def alone() -> None:
        p, q = make_parameters(PLAIN[:2])
        optimizer = ShardedASGD([p])
        for build in (
            lambda: ShardedASGD([q], **{option: value}),
            lambda: ShardedASGD([{"params": [q], option: value}]),
            lambda: optimizer.add_param_group({"params": [q], option: value}),
        ):
            text = message_of(build, ValueError, TypeError)
            said = "learning rate" in text or "lr" in text if option == "lr" else option in text
            assert said, text
            if not isinstance(value, torch.Tensor):
                assert str(value) in text, f"the value {value!r} is not in: {text}"
        assert len(optimizer.param_groups) == 1
        p.grad = torch.ones_like(p)
        optimizer.step()
        assert ShardedASGD([q]).param_groups  # the refused parameter is untouched

    run_alone(alone)


def test_an_infinite_t0_means_never() -> None:
    def alone() -> None:
        pair = Pair(make_parameters(PLAIN), lr=0.1, t0=INF)
        for step in range(4):
            pair.backward(random_gradients(PLAIN, 1, step))
            pair.step()
            pair.zero_grad()
        pair.check()

    run_alone(alone)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"gradients": "both"}, "both"),
        ({"gradients": None}, "None"),
        ({"bucket_bytes": 0}, "bucket_bytes"),
        ({"bucket_bytes": -1}, "bucket_bytes"),
        ({"bucket_bytes": "25MB"}, "bucket_bytes"),
        ({"average_dtype": torch.int32}, "average_dtype"),
        ({"average_dtype": "float32"}, "average_dtype"),
        ({"module": 3}, "module"),
        ({"process_group": "world"}, "process_group"),
    ],
    ids=str,
)
def test_options_of_the_wrong_kind(options: dict[str, Any], said: str) -> None:
    def alone() -> None:
        text = message_of(lambda: ShardedASGD(make_parameters(PLAIN), lr=0.1, **options), ValueError, TypeError)
        assert said in text, text

    run_alone(alone)


def test_unknown_options() -> None:
    def alone() -> None:
        params = make_parameters(PLAIN)
        for name in ("momentum", "learning_rate", "foreach_", "t_0"):
            assert name in message_of(lambda name=name: ShardedASGD(params, **{name: 1}), TypeError)
        message_of(lambda: ShardedASGD(params, 0.1, 1e-4, 0.75, 0, 0, True), TypeError)  # the rest are keywords only

    run_alone(alone)


def test_params_that_are_no_parameters() -> None:
    def alone() -> None:
        p = make_parameters(PLAIN[:1])[0]
        for wrong in (
            p,
            [3],
            ["x"],
            [p * 2],
            [("a", p), p],
            [{"param": [p]}],
            [{"params": []}, 3],
            None,
        ):
            message_of(lambda wrong=wrong: ShardedASGD(wrong, lr=0.1), ValueError, TypeError, KeyError)
        text = message_of(
            lambda: ShardedASGD([("idx", torch.nn.Parameter(torch.arange(3), requires_grad=False))]),
            ValueError,
            TypeError,
        )
        assert "idx" in text and "int64" in text, text

    run_alone(alone)


# Ranks that disagree when the optimizer is built


def two_groups(params: list[torch.nn.Parameter], split: int, **options: Any) -> list[dict[str, Any]]:
    pairs = named(params)
    return [{"params": pairs[:split]}, {"params": pairs[split:], **options}]


def renamed(params: list[torch.nn.Parameter]) -> list[tuple[str, torch.Tensor]]:
    pairs = named(params)
    pairs[2] = ("other.weight", pairs[2][1])
    return pairs


def with_spec(index: int, spec: Spec) -> list[tuple[str, torch.Tensor]]:
    specs = list(PLAIN)
    specs[index] = spec
    return named(make_parameters(specs))


def swapped() -> list[tuple[str, torch.Tensor]]:
    pairs = named(make_parameters(PLAIN))
    pairs[1], pairs[2] = pairs[2], pairs[1]
    return pairs


def plain() -> list[torch.nn.Parameter]:
    return make_parameters(PLAIN)


DISAGREEMENTS: dict[str, tuple[Callable[[], Any], Callable[[], Any], str]] = {
    # what: (on most ranks, on rank 1, what the message has to say)
    "a name": (
        lambda: ShardedASGD(named(plain())),
        lambda: ShardedASGD(renamed(plain())),
        "layer2.weight|other.weight",
    ),
    "a shape": (lambda: ShardedASGD(named(plain())), lambda: ShardedASGD(with_spec(1, Spec((65,)))), "layer1.weight"),
    "a shape of as many elements": (
        lambda: ShardedASGD(named(plain())),
        lambda: ShardedASGD(with_spec(0, Spec((5, 7)))),
        "layer0.weight",
    ),
    "a dtype": (
        lambda: ShardedASGD(named(plain())),
        lambda: ShardedASGD(with_spec(3, Spec((257,), torch.float64))),
        "layer3.weight",
    ),
    "a memory layout": (
        lambda: ShardedASGD(named(plain())),
        lambda: ShardedASGD(with_spec(4, Spec((3, 33), layout="transposed"))),
        "layer4.weight",
    ),
    "the order": (lambda: ShardedASGD(named(plain())), lambda: ShardedASGD(swapped()), "layer1.weight|layer2.weight"),
    "one more": (
        lambda: ShardedASGD(named(plain())),
        lambda: ShardedASGD(named(make_parameters([*PLAIN, Spec((3,))]))),
        "layer5.weight",
    ),
    "one fewer": (lambda: ShardedASGD(named(plain())), lambda: ShardedASGD(named(plain()[:4])), "layer4.weight"),
    "names or none": (lambda: ShardedASGD(named(plain())), lambda: ShardedASGD(plain()), "name|layer0.weight"),
    "the shape of one without a name": (
        lambda: ShardedASGD(plain()),
        lambda: ShardedASGD([p for _, p in with_spec(3, Spec((9,)))]),
        "3",
    ),
    "the groups": (
        lambda: ShardedASGD(two_groups(plain(), 2)),
        lambda: ShardedASGD(two_groups(plain(), 3)),
        "group|layer2.weight",
    ),
    "the number of groups": (lambda: ShardedASGD(two_groups(plain(), 2)), lambda: ShardedASGD(named(plain())), "group"),
    "an option of a group": (
        lambda: ShardedASGD(two_groups(plain(), 2, t0=3)),
        lambda: ShardedASGD(two_groups(plain(), 2, t0=4)),
        "t0",
    ),
    **{
        option: (
            lambda option=option, a=a: ShardedASGD(named(plain()), **{option: a}),
            lambda option=option, b=b: ShardedASGD(named(plain()), **{option: b}),
            option,
        )
        for option, a, b in [
            ("lr", 0.1, 0.1 + 1e-16 * 4),
            ("lambd", 1e-4, 1e-3),
            ("alpha", 0.75, 0.5),
            ("t0", 1e6, 0),
            ("weight_decay", 0, 0.1),
            ("maximize", False, True),
            ("gradients", "local", "reduced"),
            ("find_unused_parameters", False, True),
            ("bucket_bytes", 1024, 4096),
            ("average_dtype", None, torch.float64),
        ]
    },
    "tensor lr": (
        lambda: ShardedASGD(named(plain()), lr=torch.tensor(0.1)),
        lambda: ShardedASGD(named(plain()), lr=torch.tensor(0.2)),
        "lr",
    ),
    "a bad lr on one rank": (lambda: ShardedASGD(named(plain())), lambda: ShardedASGD(named(plain()), lr=NAN), "nan"),
    "no parameters on one rank": (lambda: ShardedASGD(named(plain())), lambda: ShardedASGD([]), "empty|no parameters"),
    "masters": (
        lambda: ShardedASGD([("w", make_parameters([Spec((9,), torch.bfloat16)])[0])]),
        lambda: ShardedASGD([("w", make_parameters([Spec((9,), torch.bfloat16)])[0])], master_weights=False),
        "master_weights",
    ),
}


def usable(rank: int, world_size: int) -> None:
    """An optimizer built now works: the failure left the process group in order."""
    pair = Pair(make_parameters(PLAIN), lr=0.1, t0=0)
    for step in range(2):
        pair.backward(random_gradients(PLAIN, world_size, step))
        pair.step()
        pair.zero_grad()
    pair.check()


@pytest.mark.parametrize("what", DISAGREEMENTS, ids=str)
def test_ranks_that_disagree_when_the_optimizer_is_built(what: str) -> None:
    usual, odd, said = DISAGREEMENTS[what]

    def ranks(rank: int) -> str:
        text = quick_message(odd if rank == 1 else usual)
        usable(rank, 3)
        return text

    one_message(run_ranks(3, ranks, timeout=40), said, "rank 1")


def test_ranks_that_disagree_about_an_added_group() -> None:
    def ranks(rank: int) -> str:
        pair = Pair(make_parameters(PLAIN), lr=0.1, t0=0)
        shape = (4,) if rank == 1 else (5,)
        late = make_parameters([Spec(shape)])
        text = quick_message(lambda: pair.optimizer.add_param_group({"params": [("late", late[0])]}))
        assert len(pair.optimizer.param_groups) == 1
        for step in range(4):
            pair.backward(random_gradients(PLAIN, 2, step))
            pair.step()
            pair.zero_grad()
        pair.check()
        return text

    one_message(run_ranks(2, ranks), "late", "rank 1")


def test_a_group_that_is_bad_on_one_rank_is_added_on_none() -> None:
    def ranks(rank: int) -> str:
        pair = Pair(make_parameters(PLAIN), lr=0.1, t0=0)
        late = make_parameters([Spec((5,))])[0]
        group = {"params": [("late", late)], "lr": -1.0 if rank == 1 else 0.1}
        text = quick_message(lambda: pair.optimizer.add_param_group(group))
        assert len(pair.optimizer.param_groups) == 1
        for step in range(3):
            pair.backward(random_gradients(PLAIN, 2, step))
            pair.step()
            pair.zero_grad()
        pair.check()
        return text

    one_message(run_ranks(2, ranks), "rank 1", "-1.0")


# A step that cannot be made


def unchanged(pair: Pair, fn: Callable[[], Any]) -> str:
    """The message of the error of `fn`, after which the parameters are what they were."""
    before = [p.detach().clone() for p in pair.params]
    text = quick_message(fn)
    pair.optimizer.synchronize()
    assert all(map(same_bits, pair.params, before)), f"parameters changed although the step failed: {text}"
    return text


def train(pair: Pair, steps: range) -> None:
    for step in steps:
        pair.backward(random_gradients([Spec(tuple(p.shape), p.dtype) for p in pair.params], pair.world_size, step))
        pair.step()
        pair.zero_grad()
        pair.check(step)


def failing_step(
    world_size: int, spoil: Callable[[int, Pair], Any], repair: Callable[[int, Pair], Any] | None = None, **options: Any
) -> list[str]:
    """Train, spoil something, fail, repair, and train on with the right bits; the messages of the ranks."""

    def ranks(rank: int) -> str:
        pair = Pair(make_parameters(PLAIN), **{"lr": 0.1, "t0": 1, **options})
        train(pair, range(4))

        def go() -> None:
            spoil(rank, pair)
            pair.optimizer.step()

        text = unchanged(pair, go)
        if repair is not None:
            repair(rank, pair)
        pair.check_state("after the failed step")
        pair.optimizer.zero_grad()
        train(pair, range(10, 16))
        return text

    return run_ranks(world_size, ranks, timeout=40)


def gradients_but(rank: int, pair: Pair, missing: dict[int, tuple[int, ...]]) -> None:
    """A backward pass in which some ranks have no gradient for some parameters."""
    grads = list(random_gradients(PLAIN, pair.world_size, 77)[rank])
    for index in missing.get(rank, ()):
        grads[index] = None
    backward(pair.params, grads)


@pytest.mark.parametrize("gradients", ["local", "reduced"])
@pytest.mark.parametrize(
    ("missing", "name", "rank"),
    [
        ({1: (2,)}, "layer2.weight", "rank 1"),
        ({0: (4,)}, "layer4.weight", "rank 0"),
        ({2: (0, 1, 2, 3, 4)}, "layer", "rank 2"),
        ({0: (3,), 1: (2,)}, "layer2.weight|layer3.weight", "rank 0|rank 1"),
    ],
    ids=str,
)
def test_a_gradient_missing_on_some_ranks(
    missing: dict[int, tuple[int, ...]], name: str, rank: str, gradients: str
) -> None:
    texts = failing_step(3, lambda r, pair: gradients_but(r, pair, missing), gradients=gradients)
    one_message(texts, name, rank, *(["find_unused_parameters=True"] if gradients == "local" else []))


def test_a_gradient_missing_on_all_ranks() -> None:
    texts = failing_step(2, lambda r, pair: gradients_but(r, pair, {0: (1,), 1: (1,)}))
    one_message(texts, "layer1.weight", "find_unused_parameters=True")


def test_no_gradient_at_all_on_any_rank() -> None:
    one_message(failing_step(2, lambda r, pair: None), "layer", "find_unused_parameters=True")


def test_a_gradient_dropped_by_hand_on_one_rank() -> None:
    def spoil(rank: int, pair: Pair) -> None:
        gradients_but(rank, pair, {})
        if rank == 1:
            pair.params[3].grad = None

    one_message(failing_step(2, spoil), "layer3.weight", "rank 1")


def drop(pair: Pair, by: str) -> None:
    if by == "optimizer":
        pair.optimizer.zero_grad()
    else:
        torch.nn.ParameterList(pair.params).zero_grad()


@pytest.mark.parametrize("find_unused", [False, True])
@pytest.mark.parametrize("by", ["optimizer", "model"])
def test_gradients_of_different_backwards_are_not_added_up(by: str, find_unused: bool) -> None:
    """Rank 1 leaves a batch out; then all drop their gradients and run the next one."""

    def spoil(rank: int, pair: Pair) -> None:
        if rank == 0:
            gradients_but(rank, pair, {})
        drop(pair, by)
        gradients_but(rank, pair, {})

    one_message(failing_step(2, spoil, find_unused_parameters=find_unused), "different backwards", "zero_grad()")


def test_gradients_dropped_by_one_rank_between_backwards_are_not_added_up() -> None:
    def spoil(rank: int, pair: Pair) -> None:
        gradients_but(rank, pair, {})
        if rank == 0:
            drop(pair, "optimizer")
        gradients_but(rank, pair, {})

    one_message(failing_step(2, spoil), "only some did", "zero_grad()")


@pytest.mark.parametrize("to", ["another", "None"])
def test_a_reduced_gradient_replaced_on_one_rank_only(to: str) -> None:
    """All ran as many backwards: the message must not say otherwise only."""

    def spoil(rank: int, pair: Pair) -> None:
        gradients_but(rank, pair, {})
        if rank == 0:
            pair.params[3].grad = torch.ones_like(pair.params[3]) if to == "another" else None

    texts = failing_step(2, spoil, find_unused_parameters=True)
    one_message(texts, "p.grad", "only some did")


@pytest.mark.parametrize("find_unused", [False, True])
def test_a_reduced_gradient_put_back_after_it_was_dropped(find_unused: bool) -> None:
    """It is a stand-in: its values went when it was dropped."""

    def spoil(rank: int, pair: Pair) -> None:
        gradients_but(rank, pair, {})
        stashed = [p.grad for p in pair.params]
        pair.optimizer.zero_grad()
        for p, grad in zip(pair.params, stashed, strict=True):
            p.grad = grad

    one_message(failing_step(2, spoil, find_unused_parameters=find_unused), "layer", "gradient")


@pytest.mark.parametrize("buckets", [256, 25 * 2**20])
def test_a_gradient_missing_under_accumulation(buckets: int) -> None:
    def spoil(rank: int, pair: Pair) -> None:
        with pair.optimizer.no_sync():
            gradients_but(rank, pair, {1: (2,)})
        gradients_but(rank, pair, {1: (2,)})

    texts = failing_step(2, spoil, bucket_bytes=buckets)
    one_message(texts, "layer2.weight", "rank 1", "find_unused_parameters=True")


def test_a_rank_without_any_gradient_under_accumulation() -> None:
    def spoil(rank: int, pair: Pair) -> None:
        for _ in range(2):
            gradients_but(rank, pair, {1: (0, 1, 2, 3, 4)})

    one_message(failing_step(2, spoil), "layer", "rank 1", "find_unused_parameters=True")


def test_a_frozen_parameter_on_one_rank_only() -> None:
    def spoil(rank: int, pair: Pair) -> None:
        if rank == 1:
            pair.params[2].requires_grad_(False)
        gradients_but(rank, pair, {})

    def repair(rank: int, pair: Pair) -> None:
        pair.params[2].requires_grad_(True)

    one_message(failing_step(2, spoil, repair), "layer2.weight", "rank 1")


@pytest.mark.parametrize("option", ["lr", "lambd", "alpha", "t0", "weight_decay", "maximize"])
@pytest.mark.parametrize("gradients", ["local", "reduced"])
def test_ranks_that_disagree_about_a_hyperparameter_later(option: str, gradients: str) -> None:
    def spoil(rank: int, pair: Pair) -> None:
        gradients_but(rank, pair, {})
        if rank == 1:
            pair.optimizer.param_groups[0][option] = True if option == "maximize" else 0.5

    def repair(rank: int, pair: Pair) -> None:
        pair.optimizer.param_groups[0][option] = pair.oracle.optimizer.param_groups[0][option]

    one_message(failing_step(2, spoil, repair, gradients=gradients), option, "rank 1")


@pytest.mark.parametrize(
    ("option", "value"), [("lr", NAN), ("lr", -1.0), ("t0", "x"), ("lambd", -1.0), ("weight_decay", NAN)]
)
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_hyperparameter_made_bad_later(world_size: int, option: str, value: Any) -> None:
    def spoil(rank: int, pair: Pair) -> None:
        gradients_but(rank, pair, {})
        pair.optimizer.param_groups[0][option] = value

    def repair(rank: int, pair: Pair) -> None:
        pair.optimizer.param_groups[0][option] = pair.oracle.optimizer.param_groups[0][option]

    one_message(failing_step(world_size, spoil, repair), option, str(value))


# Gradients that cannot be used


@pytest.mark.parametrize("how", ["backward", "by hand"])
@pytest.mark.parametrize(("world_size", "where"), [(1, (0,)), (2, (0, 1)), (2, (1,))])
def test_sparse_gradients(world_size: int, where: tuple[int, ...], how: str) -> None:
    def ranks(rank: int) -> str:
        table = torch.nn.Embedding(11, 5, sparse=rank in where)
        dense = make_parameters(PLAIN[:2])
        optimizer = ShardedASGD([*named(dense), ("table.weight", table.weight)], lr=0.1)
        before = [p.detach().clone() for p in (*dense, table.weight)]

        def go() -> None:
            if how == "backward":
                loss = table(torch.tensor([1, 2])).sum() + sum((p * 2).sum() for p in dense)
                loss.backward()
            else:
                backward(dense, [torch.ones_like(p) for p in dense])
                g = torch.ones(11, 5)
                table.weight.grad = g.to_sparse(1) if rank in where else g
            optimizer.step()

        text = quick_message(go, RuntimeError, ValueError)
        assert all(map(same_bits, (*dense, table.weight), before))
        optimizer.zero_grad()
        backward([*dense, table.weight], [torch.ones_like(p) for p in (*dense, table.weight)])
        optimizer.step()
        assert not same_bits(dense[0], before[0])
        return text

    one_message(run_ranks(world_size, ranks), "sparse", "table.weight", *([] if 0 in where else ["rank 1"]))


def bad_gradient(p: torch.nn.Parameter, how: str) -> None:
    """torch guards p.grad = ..., but not these ways round it."""
    p.grad = torch.ones_like(p)
    if how == "shape":
        p.grad.data = torch.ones(p.numel() + 1)
    elif how == "as many elements":
        p.grad.data = torch.ones(p.numel(), 1)


@pytest.mark.parametrize("gradients", ["local", "reduced"])
@pytest.mark.parametrize("how", ["shape", "as many elements"])
@pytest.mark.parametrize(("world_size", "where"), [(1, (0,)), (2, (0, 1)), (2, (1,))])
def test_a_gradient_of_another_shape(world_size: int, where: tuple[int, ...], how: str, gradients: str) -> None:
    def spoil(rank: int, pair: Pair) -> None:
        for index, p in enumerate(pair.params):
            bad_gradient(p, how if rank in where and index == 3 else "fine")

    texts = failing_step(world_size, spoil, gradients=gradients)
    one_message(texts, "layer3.weight", "shape|size", *([] if 0 in where else ["rank 1"]))


@pytest.mark.parametrize("gradients", ["local", "reduced"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_gradient_of_another_dtype_is_converted(world_size: int, gradients: str) -> None:
    """As torch's ASGD takes one; also where only one rank has it."""

    def ranks(rank: int) -> None:
        specs = [Spec((9, 4)), Spec((50,), torch.bfloat16), Spec((7,), torch.float64)]
        pair = Pair(make_parameters(specs), lr=0.1, t0=1, gradients=gradients)
        for step in range(8):
            by_rank = random_gradients(specs, world_size, step, exact=True)  # the same value in every dtype
            pair.oracle.backward(by_rank)
            mean = [reduce_in_rank_order(grads) for grads in zip(*by_rank, strict=True)]
            for index, p in enumerate(pair.params):
                own = by_rank[rank][index] if gradients == "local" else mean[index]
                p.grad = own.to(p.dtype)
                if step % 4 == index and rank == world_size - 1:
                    p.grad.data = own.double() if index < 2 else own.float()
            pair.step()
            pair.zero_grad()
            pair.check(step)

    run_ranks(world_size, ranks)


# Views broken by the user


@pytest.mark.parametrize("how", ["double", "bfloat16"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_model_cast_after_the_optimizer_was_built(world_size: int, how: str) -> None:
    def ranks(rank: int) -> str:
        model = Messenger()
        optimizer = ShardedASGD(model.named_parameters(), lr=0.1)
        for step in range(2):
            (model(tokens_of(rank, step)) ** 2).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        getattr(model, how)()
        before = [p.detach().clone() for p in model.parameters()]

        def go() -> None:
            (model(tokens_of(rank, 3)) ** 2).mean().backward()
            optimizer.step()

        text = quick_message(go)
        assert all(map(same_bits, model.parameters(), before))
        return text

    one_message(run_ranks(world_size, ranks), "embedding.weight|layers.", "dtype|float64|bfloat16")


@pytest.mark.parametrize(("world_size", "module_given"), [(1, True), (2, False), (2, True)])
def test_weights_loaded_with_assign(world_size: int, module_given: bool) -> None:
    """assign=True puts new parameters into the model; the optimizer holds the old ones.

    One rank without the module cannot know: its parameters have no gradients, as with torch.
    """

    def ranks(rank: int) -> str:
        model = Messenger()
        optimizer = ShardedASGD(model.named_parameters(), lr=0.1, module=model if module_given else None)
        for step in range(2):
            (model(tokens_of(rank, step)) ** 2).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)

        def go() -> None:
            (model(tokens_of(rank, 3)) ** 2).mean().backward()
            optimizer.step()

        return quick_message(go)

    one_message(run_ranks(world_size, ranks), "embedding.weight|layers.")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gradients", ["local", "reduced"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_data_replaced_is_noticed_or_taken_up(world_size: int, gradients: str, dtype: torch.dtype) -> None:
    """p.data = other, of the same shape: the new values count (or an error names the parameter)."""

    def ranks(rank: int) -> None:
        specs = [Spec((9, 4), dtype), Spec((50,), dtype)]
        pair = Pair(make_parameters(specs), lr=0.1, t0=2, gradients=gradients)
        for step in range(9):
            if step in (0, 3, 6):
                new = specs[1].random(torch.Generator().manual_seed(step))
                pair.params[1].data = new.clone()
                with torch.no_grad():
                    pair.oracle.params[1].copy_(new)
            pair.backward(random_gradients(specs, world_size, step))
            try:
                pair.step()
            except RuntimeError as error:
                assert "layer1.weight" in str(error)
                return
            pair.zero_grad()
            pair.check(step)

    run_ranks(world_size, ranks)


def test_data_replaced_on_one_rank_only_is_an_error_or_harmless() -> None:
    def ranks(rank: int) -> None:
        pair = Pair(make_parameters(PLAIN), lr=0.1, t0=2)
        train(pair, range(3))
        if rank == 1:
            pair.params[1].data = pair.params[1].data.clone()  # the same values
        train(pair, range(3, 8))

    run_ranks(2, ranks)


def test_data_of_another_shape() -> None:
    def spoil(rank: int, pair: Pair) -> None:
        pair.kept = pair.params[3].data  # type: ignore[attr-defined]
        pair.params[3].data = torch.zeros(5)
        grads: list[Any] = list(random_gradients(PLAIN, 2, 77)[rank])
        grads[3] = torch.ones(5)
        backward(pair.params, grads)

    def ranks(rank: int) -> str:
        pair = Pair(make_parameters(PLAIN), lr=0.1, t0=1)
        train(pair, range(3))

        def go() -> None:
            spoil(rank, pair)
            pair.optimizer.step()

        return quick_message(go)

    one_message(run_ranks(2, ranks), "layer3.weight", "shape|size")


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_model_moved_to_where_it_is_goes_on(world_size: int) -> None:
    def ranks(rank: int) -> None:
        model = torch.nn.ParameterList(make_parameters(PLAIN))
        pair = Pair(list(model), lr=0.1, t0=1)
        for step in range(6):
            model.to("cpu")
            model.float()
            model.load_state_dict(model.state_dict())
            model.train(step % 2 == 0)
            pair.backward(random_gradients(PLAIN, world_size, step))
            pair.step()
            pair.zero_grad()
            pair.check(step)

    run_ranks(world_size, ranks)


# Other misuse


def test_a_closure_that_fails_is_the_users_error() -> None:
    def ranks(rank: int) -> None:
        pair = Pair(make_parameters(PLAIN), lr=0.1, t0=0)
        with pytest.raises(KeyError):
            pair.optimizer.step(lambda: {}["loss"])
        train(pair, range(4))

    run_ranks(2, ranks)


@pytest.mark.parametrize(
    ("max_norm", "norm_type"),
    [
        (NAN, 2.0),
        (-1.0, 2.0),
        ("x", 2.0),
        (1.0, 0.0),
        (1.0, -1.0),
        (1.0, NAN),
        (1.0, "fro"),
        (None, 2.0),
        (torch.ones(2), 2.0),
    ],
)
def test_clip_grad_norm_of_nonsense(max_norm: Any, norm_type: Any) -> None:
    def ranks(rank: int) -> None:
        pair = Pair(make_parameters(PLAIN), lr=0.1, t0=0)
        pair.backward(random_gradients(PLAIN, 2, 0))
        message_of(lambda: pair.optimizer.clip_grad_norm_(max_norm, norm_type), ValueError, TypeError)
        pair.step()
        pair.check()

    run_ranks(2, ranks)


@pytest.mark.parametrize(("max_norm", "norm_type", "said"), [("x", 2.0, "max_norm"), (1.0, -1.0, "norm_type")])
def test_clip_grad_norm_of_nonsense_on_one_rank_only(max_norm: Any, norm_type: Any, said: str) -> None:
    def ranks(rank: int) -> str:
        pair = Pair(make_parameters(PLAIN), lr=0.1, t0=0)
        pair.backward(random_gradients(PLAIN, 2, 0))
        arguments = (max_norm, norm_type) if rank == 1 else (1.0, 2.0)
        text = quick_message(lambda: pair.optimizer.clip_grad_norm_(*arguments))
        pair.step()
        pair.check()
        return text

    one_message(run_ranks(2, ranks), said, "rank 1")


def test_a_rank_outside_of_the_process_group_is_told() -> None:
    def ranks(rank: int) -> None:
        group = dist.new_group([0])
        if rank == 0:
            ShardedASGD(named(make_parameters(PLAIN)), process_group=group)
        else:
            text = quick_message(lambda: ShardedASGD(named(make_parameters(PLAIN)), process_group=group))
            assert "process_group" in text or "process group" in text

    run_ranks(2, ranks)


@pytest.mark.parametrize("hidden", ["DTensor", "meta"])
def test_parameters_that_are_not_supported_are_refused_by_name(hidden: str) -> None:
    def ranks(rank: int) -> None:
        if hidden == "meta":
            p = torch.nn.Parameter(torch.empty(4, device="meta"))
            text = message_of(lambda: ShardedASGD([("on.meta", p)], lr=0.1))
            assert "on.meta" in text and "meta" in text
            return
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Shard, distribute_tensor

        mesh = init_device_mesh("cpu", (2,))
        p = torch.nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)]))
        try:
            ShardedASGD([("sharded.weight", p)], lr=0.1)
        except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:
            assert "DTensor" in str(error) and "sharded.weight" in str(error)

    run_ranks(2, ranks)


@pytest.mark.parametrize("buckets", [64, 25 * 2**20])
def test_a_frozen_parameter_with_a_gradient_on_one_rank_only(buckets: int) -> None:
    """As after the error of a missing gradient, by one who freezes the parameter and steps again."""

    def spoil(rank: int, pair: Pair) -> None:
        pair.params[2].requires_grad_(False)
        gradients_but(rank, pair, {0: (2,), 1: (2,)})
        if rank == 0:
            pair.params[2].grad = torch.ones_like(pair.params[2])

    def repair(rank: int, pair: Pair) -> None:
        pair.params[2].requires_grad_(True)

    one_message(failing_step(2, spoil, repair, bucket_bytes=buckets), "layer2.weight", "rank 0", "frozen")


def test_clipping_to_another_norm_on_each_rank() -> None:
    def ranks(rank: int) -> str:
        pair = Pair(make_parameters(PLAIN), lr=0.1, t0=0)
        pair.backward(random_gradients(PLAIN, 2, 0))
        text = quick_message(lambda: pair.optimizer.clip_grad_norm_(1.0 + rank), RuntimeError)
        pair.step()
        pair.check()
        return text

    one_message(run_ranks(2, ranks), "max_norm=1.0", "max_norm=2.0", "rank 1")


@pytest.mark.parametrize("where", [(0,), (0, 1)])
def test_a_sparse_gradient_on_top_of_a_reduced_one(where: tuple[int, ...]) -> None:
    def spoil(rank: int, pair: Pair) -> None:
        gradients_but(rank, pair, {})
        grads: list[Any] = list(random_gradients(PLAIN, 2, 77)[rank])
        if rank not in where:
            return backward(pair.params, grads)
        rows = torch.nn.functional.embedding(torch.tensor([1]), pair.params[0], sparse=True)
        torch.autograd.backward([rows.sum(), *((p * g).sum() for p, g in zip(pair.params[1:], grads[1:], strict=True))])

    one_message(failing_step(2, spoil), "layer0.weight", "sparse", "rank 0")


@pytest.mark.parametrize("data", ["flat", "half"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_data_of_another_shape_at_the_same_place(world_size: int, data: str) -> None:
    def ranks(rank: int) -> str:
        p, q = (torch.nn.Parameter(torch.ones(8, 4)) for _ in "pq")
        optimizer = ShardedASGD([("p", p), ("q", q)], lr=1.0)
        p.data = p.data.view(-1) if data == "flat" else p.data[:4]
        (p.sum() + q.sum()).backward()
        text = quick_message(optimizer.step, RuntimeError)
        assert (p == 1).all() and (q == 1).all()
        return text

    one_message(run_ranks(world_size, ranks), "'p'", "shape")


@pytest.mark.parametrize("broken_on", [0, 1])
def test_a_group_added_to_a_broken_optimizer_may_be_added_once_it_is_mended(broken_on: int) -> None:
    def ranks(rank: int) -> str:
        pair = Pair(make_parameters(PLAIN), lr=0.1, t0=0)
        group = {"params": [("late", make_parameters([Spec((5,))])[0])]}
        data = pair.params[1].data
        if rank == broken_on:
            pair.params[1].data = data.double()
        text = quick_message(lambda: pair.optimizer.add_param_group(group), RuntimeError)
        pair.params[1].data = data
        train(pair, range(3))
        pair.optimizer.add_param_group(group)
        assert len(pair.optimizer.param_groups) == 2
        return text

    one_message(run_ranks(2, ranks), "layer1.weight", f"rank {broken_on}")


def test_param_groups_taken_away() -> None:
    def ranks(rank: int) -> str:
        pair = Pair([{"params": make_parameters(PLAIN[:2])}, {"params": make_parameters(PLAIN[2:])}], lr=0.1, t0=0)
        removed = pair.optimizer.param_groups.pop()
        backward(pair.params, random_gradients(PLAIN, 2, 0)[rank])
        text = unchanged(pair, pair.optimizer.step)
        pair.optimizer.param_groups.append(removed)
        pair.optimizer.zero_grad()
        train(pair, range(3))
        return text

    one_message(run_ranks(2, ranks), "param_groups", "2")
