"""What ShardedASGD has to equal: torch.optim.ASGD(foreach=False), fed the gradients that the ranks reduce to.

`Pair` drives both with the same calls and compares them. Every rank computes every rank's gradients, so nothing but
ShardedASGD itself communicates.
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from dist_asgd import ShardedASGD

LOW = (torch.bfloat16, torch.float16)
TORCH_OPTIONS = ("lr", "lambd", "alpha", "t0", "weight_decay", "maximize")
Grads = Sequence[torch.Tensor | None]  # of one rank, one for each parameter


@dataclass(frozen=True)
class Spec:
    """One parameter: its shape, dtype and how it lies in memory."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"

    def random(self, generator: torch.Generator) -> torch.Tensor:
        wide = {torch.complex64: torch.complex64, torch.complex128: torch.complex128}.get(self.dtype, torch.float64)
        values = torch.randn(self.shape, generator=generator, dtype=wide).to(self.dtype)
        return laid_out(values, self.layout)

    def integers(self, generator: torch.Generator) -> torch.Tensor:
        return torch.randint(-4, 5, self.shape, generator=generator).to(self.dtype)


def laid_out(values: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values in another memory layout."""
    if layout == "channels_last":
        return values.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        return values.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "strided":  # with holes: not dense
        holes = torch.zeros(*values.shape[:-1], 2 * values.shape[-1], dtype=values.dtype)
        holes[..., ::2] = values
        return holes[..., ::2]
    return values


PLAIN = (Spec((7, 5)), Spec((64,)), Spec((1,)), Spec((257,)), Spec((3, 33)))
MIXED = (
    Spec((7, 5)),
    Spec(()),
    Spec((13, 3), torch.float64),
    Spec((0,)),
    Spec((5, 3, 2, 4), layout="channels_last"),
    Spec((6, 9), layout="transposed"),
    Spec((5,), torch.complex64),
    Spec((131,)),
    Spec((4, 6), layout="strided"),
    Spec((2, 2), torch.complex128),
    Spec((1,)),
    Spec((0, 3), torch.float64),
    Spec((), torch.complex64),
)


def make_parameters(specs: Iterable[Spec], seed: int = 0) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(spec.random(generator)) for spec in specs]


def named(parameters: Iterable[torch.Tensor], prefix: str = "layer") -> list[tuple[str, torch.Tensor]]:
    return [(f"{prefix}{index}.weight", p) for index, p in enumerate(parameters)]


def backward(parameters: Sequence[torch.Tensor], grads: Grads) -> None:
    """A real backward pass whose gradients are exactly `grads`; a parameter with None takes no part in it."""
    pairs = [(p, g) for p, g in zip(parameters, grads, strict=True) if g is not None and p.requires_grad]
    terms = [(p * g.conj()).sum().real if p.is_complex() else (p * g).sum() for p, g in pairs]
    if terms:
        torch.autograd.backward(terms)


def wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.dtype in LOW else tensor


def reduce_in_rank_order(grads: Grads) -> torch.Tensor | None:
    """(g_0 + g_1 + ...) / N in rank order, in fp32 for low precision. A missing one is zeros; all missing: None."""
    present = [g for g in grads if g is not None]
    if not present:
        return None
    zero = torch.zeros_like(present[0])
    total = wide(grads[0] if grads[0] is not None else zero).clone()
    for g in grads[1:]:
        total += wide(g if g is not None else zero)
    parts = torch.view_as_real(total) if total.is_complex() else total
    parts.div_(len(grads))
    return total


class Oracle:
    """torch.optim.ASGD on fp32 masters of low-precision parameters, and the gradients of all ranks."""

    def __init__(self, groups: list[dict[str, Any]], world_size: int, gradients: str, defaults: dict[str, Any]) -> None:
        self.world_size = world_size
        self.gradients = gradients
        self.dtypes: list[torch.dtype] = []
        self.params: list[torch.nn.Parameter] = []
        self.reduced: list[torch.Tensor | None] = []
        self.local: list[list[torch.Tensor | None]] = []
        options = {key: value for key, value in defaults.items() if key in TORCH_OPTIONS}
        self.optimizer = torch.optim.ASGD([self._adopt(group) for group in groups], foreach=False, **options)

    def _adopt(self, group: dict[str, Any]) -> dict[str, Any]:
        copies = [torch.nn.Parameter(wide(p.detach().clone()), p.requires_grad) for p in group["params"]]
        self.dtypes += [p.dtype for p in group["params"]]
        self.params += copies
        self.reduced += [None] * len(copies)
        self.local += [[None] * self.world_size for _ in copies]
        return {**group, "params": copies}

    def add_param_group(self, group: dict[str, Any]) -> None:
        self.optimizer.add_param_group(self._adopt(group))

    def backward(self, by_rank: Sequence[Grads], sync: bool = True) -> None:
        for index, p in enumerate(self.params):
            if not p.requires_grad:
                continue
            mine = self.local[index]
            for rank, grads in enumerate(by_rank):
                g = grads[index]
                if g is not None:
                    mine[rank] = g.clone() if mine[rank] is None else mine[rank] + g
            if sync:
                self._reduce(index)

    def _reduce(self, index: int) -> None:
        total = reduce_in_rank_order(self.local[index])
        if total is None:
            return
        if self.gradients == "reduced" or self.world_size == 1:
            total = total.to(self.dtypes[index])  # p.grad is a plain tensor of the parameter's dtype
        before = self.reduced[index]
        self.reduced[index] = total if before is None else before + total
        self.local[index] = [None] * self.world_size

    def step(self) -> None:
        for index, p in enumerate(self.params):
            self._reduce(index)
            g = self.reduced[index]
            p.grad = None if g is None or not p.requires_grad else wide(g).clone()
        self.optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for index, g in enumerate(self.reduced):
            had_local = any(mine is not None for mine in self.local[index])
            self.local[index] = [None] * self.world_size
            if set_to_none:
                self.reduced[index] = None
            elif g is not None:
                self.reduced[index] = torch.zeros_like(g)
            elif had_local:
                self.reduced[index] = torch.zeros_like(self.params[index])

    def parameter(self, index: int) -> torch.Tensor:
        return self.params[index].detach().to(self.dtypes[index])


class Pair:
    """ShardedASGD on this rank and its oracle, driven by the same calls."""

    def __init__(self, groups: list[dict[str, Any]] | list[torch.nn.Parameter], **options: Any) -> None:
        torch_groups = list(groups)
        if not isinstance(torch_groups[0], dict):
            torch_groups = [{"params": torch_groups}]
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.gradients = options.get("gradients", "local")
        self.oracle = Oracle(torch_groups, self.world_size, self.gradients, options)
        self.params = [p for group in torch_groups for p in group["params"]]
        self.named = 0
        self.options = options
        self.optimizer = ShardedASGD([self._named(group) for group in torch_groups], **options)

    def _named(self, group: dict[str, Any]) -> dict[str, Any]:
        start = self.named
        self.named += len(group["params"])
        return {**group, "params": [(f"layer{start + i}.weight", p) for i, p in enumerate(group["params"])]}

    def add_param_group(self, group: dict[str, Any]) -> None:
        self.params += group["params"]
        self.oracle.add_param_group(group)
        self.optimizer.add_param_group(self._named(group))

    def backward(self, by_rank: Sequence[Grads], sync: bool = True) -> None:
        """Every rank's gradients; this rank does its own backward pass."""
        self.oracle.backward(by_rank, sync or self.gradients == "reduced")
        if self.gradients == "reduced":
            mean = [reduce_in_rank_order([grads[i] for grads in by_rank]) for i in range(len(self.params))]
            own = [None if g is None else g.to(p.dtype) for g, p in zip(mean, self.params, strict=True)]
            backward(self.params, own)
        elif sync:
            backward(self.params, by_rank[self.rank])
        else:
            with self.optimizer.no_sync():
                backward(self.params, by_rank[self.rank])

    def step(self) -> None:
        self.oracle.step()
        self.optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.oracle.zero_grad(set_to_none)
        self.optimizer.zero_grad(set_to_none)

    def train(self, steps: range) -> None:
        """Whole steps with gradients that are random, but the same for the same step."""
        specs = [Spec(tuple(p.shape), p.dtype) for p in self.params]
        for step in steps:
            self.backward(random_gradients(specs, self.world_size, step))
            self.step()
            self.zero_grad()
            self.check(step)

    def drop_gradients(self, by: str) -> None:
        """The three ways to drop all gradients: the optimizer's zero_grad, the model's, and None by hand."""
        self.oracle.zero_grad()
        if by == "optimizer":
            self.optimizer.zero_grad()
        elif by == "model":
            torch.nn.ParameterList(self.params).zero_grad()
        else:
            for p in self.params:
                p.grad = None

    def set_group(self, index: int, **options: Any) -> None:
        self.oracle.optimizer.param_groups[index].update(options)
        self.optimizer.param_groups[index].update(options)

    def set_requires_grad(self, index: int, value: bool) -> None:
        self.oracle.params[index].requires_grad_(value)
        self.params[index].requires_grad_(value)

    def write(self, index: int, values: torch.Tensor) -> None:
        """What a user does who loads weights after the optimizer was built."""
        with torch.no_grad():
            self.params[index].copy_(values)
            self.oracle.params[index].copy_(values)
            state = self.oracle.optimizer.state.get(self.oracle.params[index])
            if state and state["mu"] == 1:  # the average is the parameter; torch copies it at the next step
                state["ax"].copy_(self.oracle.params[index])

    def restart(self) -> None:
        """Go on as a new process does: new parameters, and a new optimizer that loaded the old one's state.

        Parameters are frozen after the optimizer is built, as they were: each rank's pieces fit equal buckets only.
        """
        self.zero_grad()
        state = self.optimizer.state_dict()
        fresh = {id(p): torch.nn.Parameter(p.detach().clone()) for p in self.params}
        frozen = [fresh[id(p)] for p in self.params if not p.requires_grad]
        groups = [
            {"params": [(name, fresh[id(p)]) for name, p in zip(group["param_names"], group["params"], strict=True)]}
            for group in self.optimizer.param_groups
        ]
        self.params = [fresh[id(p)] for p in self.params]
        self.optimizer = ShardedASGD(groups, **self.options)
        for p in frozen:
            p.requires_grad_(False)
        self.optimizer.load_state_dict(state)

    def check_parameters(self, where: object = "") -> None:
        synchronize(self.optimizer)
        for index, p in enumerate(self.params):
            twin = self.oracle.parameter(index)
            assert same_bits(p, twin), f"parameter {index} {where}: {difference(p, twin)}"

    def check(self, where: object = "") -> None:
        self.check_parameters(where)
        self.check_state(where)

    def check_state(self, where: object = "") -> None:
        full = self.optimizer.full_state_dict()
        if self.rank != 0:
            assert full == {}, "full_state_dict() is for rank 0"
            return
        check_dense_state(full, self.oracle.optimizer, where)


def check_dense_state(full: dict[str, Any], expected: torch.optim.ASGD, where: object = "") -> None:
    """That a dense state dict says what torch's optimizer holds."""
    state = expected.state_dict()
    groups = [group["params"] for group in full["param_groups"]]
    assert groups == [group["params"] for group in state["param_groups"]], "parameter ids are not torch's"
    for index, p in enumerate(p for group in expected.param_groups for p in group["params"]):
        ours, theirs = full["state"].get(index, {}), state["state"].get(index, {})
        if not theirs:  # torch makes the state at the first gradient
            assert not ours or (float(ours["step"]) == 0 and float(ours["mu"]) == 1), f"{index} {where}: {ours}"
            continue
        assert set(ours) >= {"step", "eta", "mu", "ax"}, f"{index} {where}: {set(ours)}"
        for key in ("step", "eta", "mu"):
            assert ours[key].shape == () and ours[key].dtype == torch.float32, f"{key} of {index} {where}"
            assert torch.equal(ours[key], theirs[key]), f"{key} of {index} {where}: {ours[key]} is not {theirs[key]}"
        assert type(ours["ax"]) is torch.Tensor and ours["ax"].dtype == p.dtype, (
            f"ax of {index} {where}: {ours['ax']!r}"
        )
        assert same_bits(ours["ax"], theirs["ax"]), f"ax of {index} {where}: {difference(ours['ax'], theirs['ax'])}"


def synchronize(optimizer: Any) -> None:
    if isinstance(optimizer, ShardedASGD):
        optimizer.synchronize()


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal in dtype, shape and every value; NaN equals NaN."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    a, b = a.detach(), b.detach()
    if a.is_complex():
        a, b = torch.view_as_real(a.resolve_conj()), torch.view_as_real(b.resolve_conj())
    return torch.equal(a, b) or bool(((a == b) | (a.isnan() & b.isnan())).all())


def difference(a: torch.Tensor, b: torch.Tensor) -> str:
    if a.dtype != b.dtype or a.shape != b.shape:
        return f"{a.dtype} {tuple(a.shape)} is not {b.dtype} {tuple(b.shape)}"
    a, b = a.detach(), b.detach()
    wrong = (a != b).sum().item()
    return f"{wrong} of {a.numel()} elements differ, by at most {(a - b).abs().max().item():.3g}"


def random_gradients(
    specs: Sequence[Spec], world_size: int, seed: int, missing: float = 0.0, exact: bool = False
) -> list[Grads]:
    """Every rank's gradients, on every rank. `missing`: the chance that one is None. `exact`: small integers."""
    generator = torch.Generator().manual_seed(seed)
    chance = random.Random(seed)
    made = [[s.integers(generator) if exact else s.random(generator) for s in specs] for _ in range(world_size)]
    return [[None if chance.random() < missing else g for g in grads] for grads in made]


class Messenger(torch.nn.Module):
    """Elementwise layers: the same bits wherever the parameters lie in memory, which BLAS does not promise."""

    def __init__(self, width: int = 37, depth: int = 4, seed: int = 0, vocabulary: int = 11) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.embedding = torch.nn.Embedding(vocabulary, width)
        self.embedding.weight.data.normal_(generator=generator)
        self.layers = torch.nn.ModuleList(Elementwise(width, generator) for _ in range(depth))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return x


class Elementwise(torch.nn.Module):
    def __init__(self, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.randn(width, generator=generator))
        self.shift = torch.nn.Parameter(torch.randn(width, generator=generator))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x * self.scale + self.shift) + x


def model_gradients(model: torch.nn.Module, tokens: torch.Tensor) -> list[torch.Tensor]:
    """The gradients of a model's mean squared output."""
    return list(torch.autograd.grad((model(tokens) ** 2).mean(), list(model.parameters())))


def tokens_of(rank: int, step: int, vocabulary: int = 11) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randint(vocabulary, (6,), generator=generator)
