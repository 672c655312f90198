"""Bad arguments, and ranks that disagree when the optimizer is built or a group is added."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dist_asgd import ShardedASGD
from tests.support.failures import one_message, quick_message
from tests.support.oracle import PLAIN, Pair, Spec, make_parameters, named, random_gradients
from tests.support.ranks import message_of, run_alone, run_ranks

# Arguments

NAN, INF = float("nan"), float("inf")
BAD_NUMBERS = {
    "lr": [
        *(NAN, -0.1, "0.1", None, 1j, 10**400),
        *(torch.tensor([0.1, 0.2]), torch.tensor(NAN), torch.tensor(-1.0), torch.empty((), device="meta")),
    ],
    "lambd": [NAN, -1e-4, "1e-4", None, [1e-4]],
    "alpha": [NAN, -0.75, "x", None],
    "t0": [NAN, -1, "x", 1j, 10**400],
    "weight_decay": [NAN, -0.1, "x", None],
    "eta_decay": [NAN, INF, -0.1, "x", True],
}


@pytest.mark.parametrize(("option", "value"), [(k, v) for k, values in BAD_NUMBERS.items() for v in values], ids=str)
def test_a_hyperparameter_that_is_no_sensible_number(option: str, value: Any) -> None:
    def alone() -> None:
        p, q = make_parameters(PLAIN[:2])
        optimizer = ShardedASGD([p])
        builds = [
            lambda: ShardedASGD([{"params": [q], option: value}]),
            lambda: optimizer.add_param_group({"params": [q], option: value}),
        ]
        if (option, value) != ("t0", None):  # that is the default: which number it is depends on average=
            builds.append(lambda: ShardedASGD([q], **{option: value}))
        for build in builds:
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
        ({"verify_every": 0}, "verify_every"),
        ({"verify_every": True}, "verify_every"),
        ({"verify_every": 1, "capturable": True}, "verify_every and capturable"),
        ({"bucket_bytes": 0}, "bucket_bytes"),
        ({"bucket_bytes": -1}, "bucket_bytes"),
        ({"bucket_bytes": "25MB"}, "bucket_bytes"),
        ({"average_dtype": torch.int32}, "average_dtype"),
        ({"average_dtype": "float32"}, "average_dtype"),
        ({"module": 3}, "module"),
        ({"capturable": 1}, "capturable"),
        ({"lr_on_time": 1}, "lr_on_time"),
        ({"lr_on_time": None}, "lr_on_time"),
        ({"lr_on_time": True, "capturable": True}, "lr_on_time=True with capturable=True"),
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


def test_options_of_torch_that_choose_an_implementation() -> None:
    def alone() -> None:
        optimizer = ShardedASGD(make_parameters(PLAIN), foreach=False, differentiable=False)
        optimizer.add_param_group({"params": make_parameters([Spec((3,))]), "foreach": None})
        assert [group["foreach"] for group in optimizer.param_groups] == [False, None]
        for option, said in {"foreach": "foreach=False", "differentiable": "torch.optim.ASGD"}.items():
            for build in (
                lambda option=option: ShardedASGD(make_parameters(PLAIN), **{option: True}),
                lambda option=option: optimizer.add_param_group({"params": make_parameters(PLAIN), option: True}),
            ):
                text = message_of(build, ValueError)
                assert f"{option}=True" in text and said in text
        assert len(optimizer.param_groups) == 2

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


def test_a_parameter_on_the_meta_device_is_refused_by_name() -> None:
    def ranks(rank: int) -> None:
        p = torch.nn.Parameter(torch.empty(4, device="meta"))
        text = message_of(lambda: ShardedASGD([("on.meta", p)], lr=0.1))
        assert "on.meta" in text and "meta" in text

    run_ranks(2, ranks)


def test_capturable_where_no_graph_can_hold_a_step() -> None:
    def alone() -> None:
        p = make_parameters(PLAIN[:1])[0]
        text = message_of(lambda: ShardedASGD([("on.cpu", p)], lr=0.1, capturable=True), ValueError)
        assert all(word in text for word in ("on.cpu", "cpu", "CUDA")), text
        text = message_of(lambda: ShardedASGD([{"params": [p], "capturable": True}]), ValueError)
        assert "group 0" in text and "capturable" in text, text
        optimizer = ShardedASGD(make_parameters(PLAIN))
        message_of(lambda: optimizer.add_param_group({"params": [p], "capturable": True}), ValueError)
        assert len(optimizer.param_groups) == 1

    def ranks(rank: int) -> str:
        return message_of(lambda: ShardedASGD(named(make_parameters(PLAIN)), lr=0.1, capturable=True), ValueError)

    run_alone(alone)
    one_message(run_ranks(2, ranks), "2 ranks", "DTensors")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int32], ids=str)
def test_dtypes_that_have_no_rule_are_refused_by_name(dtype: torch.dtype) -> None:
    def alone() -> None:
        p = torch.nn.Parameter(torch.zeros(4, dtype=dtype), requires_grad=False)
        text = message_of(lambda: ShardedASGD([("odd.weight", p)], lr=0.1), ValueError)
        assert "odd.weight" in text and str(dtype) in text

    run_alone(alone)


@pytest.mark.parametrize("when", ["at first", "in an added group"])
def test_parameters_tied_by_their_memory_are_refused_by_name(when: str) -> None:
    """With torch's optimizers they would stay tied; with a place of its own for each they would not."""

    def ranks(rank: int) -> str:
        first, second, other = make_parameters([Spec((4, 6)), Spec((4, 6)), Spec((5,))])
        if when == "at first":
            second.data = first.data[1:]
            return quick_message(lambda: ShardedASGD([("a", first), ("z", other), ("b", second)]))
        optimizer = ShardedASGD([("a", first), ("z", other)])
        second.data = first.data
        return quick_message(lambda: optimizer.add_param_group({"params": [("b", second)]}))

    one_message(run_ranks(2, ranks), "'a' and 'b'", "share memory")


def test_parameters_that_are_slices_of_one_tensor_are_welcome() -> None:
    def alone() -> None:
        whole = torch.arange(24.0).view(4, 6)
        params = [torch.nn.Parameter(part) for part in (whole[:, :2], whole[:, 2:5], whole[0, 5:], whole[1:, 5])]
        pair = Pair(params, lr=0.1, t0=0)
        pair.train(range(4))

    run_alone(alone)


def test_an_empty_parameter_list_is_refused() -> None:
    def alone() -> None:
        assert "empty" in message_of(lambda: ShardedASGD([], lr=0.1), ValueError)

    run_alone(alone)
    run_ranks(2, lambda rank: alone())


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


def lazy(run: bool) -> torch.nn.Module:
    module = torch.nn.LazyLinear(3)
    if run:
        module(torch.ones(2, 4))
    return module


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
            ("lr_on_time", False, True),
            ("eta_decay", None, 1e-4),
            ("gradients", "local", "reduced"),
            ("find_unused_parameters", False, True),
            ("bucket_bytes", 1024, 4096),
            ("verify_every", 10, 20),
            ("average_dtype", None, torch.float64),
        ]
    },
    "tensor lr": (
        lambda: ShardedASGD(named(plain()), lr=torch.tensor(0.1)),
        lambda: ShardedASGD(named(plain()), lr=torch.tensor(0.2)),
        "lr",
    ),
    "a bad lr on one rank": (lambda: ShardedASGD(named(plain())), lambda: ShardedASGD(named(plain()), lr=NAN), "nan"),
    "an option on one rank that is refused": (
        lambda: ShardedASGD(named(plain())),
        lambda: ShardedASGD(named(plain()), foreach=True),
        "foreach",
    ),
    "an unknown option on one rank": (
        lambda: ShardedASGD(named(plain())),
        lambda: ShardedASGD(named(plain()), momentum=0.9),
        "momentum",
    ),
    "a lazy module that has run on one rank only": (
        lambda: ShardedASGD(lazy(run=True).named_parameters()),
        lambda: ShardedASGD(lazy(run=False).named_parameters()),
        "weight|bias",
    ),
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


def test_a_rank_outside_of_the_process_group_is_told() -> None:
    def ranks(rank: int) -> None:
        group = dist.new_group([0])
        if rank == 0:
            ShardedASGD(named(make_parameters(PLAIN)), process_group=group)
        else:
            text = quick_message(lambda: ShardedASGD(named(make_parameters(PLAIN)), process_group=group))
            assert "process_group" in text or "process group" in text

    run_ranks(2, ranks)


# Memory that others have


def test_parameters_in_shared_memory_are_refused_by_name() -> None:
    """Other processes would not see them train, once they have moved into a bucket."""

    def alone() -> None:
        model = torch.nn.Linear(3, 2).share_memory()
        text = message_of(lambda: ShardedASGD(model.named_parameters(), lr=0.1), ValueError)
        assert "'weight'" in text and "shared memory" in text and "torch.optim.ASGD" in text
        optimizer = ShardedASGD(torch.nn.Linear(3, 2).named_parameters(), lr=0.1)
        late = [("late", torch.nn.Parameter(torch.ones(2).share_memory_()))]
        assert "'late'" in message_of(lambda: optimizer.add_param_group({"params": late}), ValueError)
        assert len(optimizer.param_groups) == 1
        model = torch.nn.Linear(3, 2)
        optimizer = ShardedASGD(model.named_parameters(), lr=0.1)
        model.to(torch.bfloat16).share_memory()
        assert "shared memory" in message_of(optimizer.step, ValueError)

    run_alone(alone)


@pytest.mark.parametrize("kind", ["buffer", "frozen parameter"])
def test_memory_that_the_module_uses_under_another_name(kind: str) -> None:
    def ranks(rank: int) -> str:
        model = torch.nn.Linear(4, 4)
        if kind == "buffer":
            model.register_buffer("other", model.weight.detach()[1])
        else:
            model.other = torch.nn.Parameter(model.weight.detach(), requires_grad=False)
        trained = [(name, param) for name, param in model.named_parameters() if name != "other"]
        return quick_message(lambda: ShardedASGD(trained, lr=0.1, module=model), ValueError)

    one_message(run_ranks(2, ranks), "'weight'", "'other'", "shares memory", "clone()")
