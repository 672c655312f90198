"""Averages follow any optimizer: one iterate for each step that was taken, none for one that was not."""

import functools
import gc
import weakref

import pytest
import torch
from torch import nn

from dist_asgd import EMA, ShardedASGD, ShardedAverages, Uniform
from tests.support.iterates import averaged, mean
from tests.support.ranks import run_alone

KINDS = {"ema": EMA(0.9), "mean": Uniform()}


def model_of(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3)).to(dtype)


def loss_of(model, step=0):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 6, generator=generator).to(model[0].weight.dtype)
    return model(x).square().mean()


def backward(model, step=0):
    loss = loss_of(model, step)
    loss.backward()
    return loss


def snapshot(model):
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def check(averages, iterates):
    for name, kind in KINDS.items():
        found, expected = averages.full_state_dict(name), averaged(iterates, kind)
        assert all(torch.equal(found[key], expected[key]) for key in expected), name
    assert averages.updates == len(iterates)


OPTIMIZERS = {
    "adamw for": functools.partial(torch.optim.AdamW, foreach=False),
    "adamw foreach": functools.partial(torch.optim.AdamW, foreach=True),
    "adamw fused": functools.partial(torch.optim.AdamW, fused=True),
    "sgd": functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "adagrad": torch.optim.Adagrad,
    "asgd": functools.partial(ShardedASGD, lr=0.1),
}


def follow(make):
    model = model_of()
    optimizer = make(list(model.parameters()))
    averages = ShardedAverages(model.named_parameters(), KINDS, optimizer=optimizer)
    iterates = []
    for step in range(6):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
        iterates.append(snapshot(model))
    check(averages, iterates)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_step_is_an_iterate(name):
    run_alone(follow, OPTIMIZERS[name])


def two_optimizers():
    """Muon has the matrices, AdamW the rest; each parameter follows its own, also where one steps twice as often."""
    muon = getattr(torch.optim, "Muon", functools.partial(torch.optim.SGD, momentum=0.9))
    model = model_of()
    matrices = [param for param in model.parameters() if param.ndim == 2]
    others = [param for param in model.parameters() if param.ndim != 2]
    optimizers = [muon(matrices, lr=0.1), torch.optim.AdamW(others, lr=0.1)]
    averages = ShardedAverages(model.named_parameters(), KINDS, optimizer=optimizers)
    iterates = {True: [], False: []}
    for step in range(6):
        backward(model, step)
        for optimizer, is_matrix in zip(optimizers, (True, False), strict=True):
            if is_matrix or step % 2:
                optimizer.step()
                iterates[is_matrix].append({n: p for n, p in snapshot(model).items() if (p.ndim == 2) == is_matrix})
        for optimizer in optimizers:
            optimizer.zero_grad()
    for name, kind in KINDS.items():
        expected = averaged(iterates[True], kind) | averaged(iterates[False], kind)
        found = averages.full_state_dict(name)
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    state = averages.state_dict()
    again = ShardedAverages(model.named_parameters(), KINDS, optimizer=optimizers)
    again.load_state_dict(state)
    assert again.state_dict()["progress"] == state["progress"]
    alone = ShardedAverages(model.named_parameters(), KINDS)
    for other, saved in ((alone, state), (again, alone.state_dict())):
        with pytest.raises(ValueError, match="optimizers, these averages"):
            other.load_state_dict(saved)


def test_two_optimizers():
    run_alone(two_optimizers)


def closures():
    model = model_of()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
    averages = ShardedAverages(model.named_parameters(), KINDS, optimizer=optimizer)
    iterates = []
    for step in range(3):

        def closure(step=step):
            optimizer.zero_grad()
            return backward(model, step)

        optimizer.step(closure)
        iterates.append(snapshot(model))
    check(averages, iterates)


def test_a_closure_is_one_iterate():
    run_alone(closures)


def skipped(fused):
    model = model_of()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
    averages = ShardedAverages(model.named_parameters(), KINDS, optimizer=optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    iterates = []
    for step in range(5):
        scaler.scale(loss_of(model, step)).backward()
        if step == 2:
            model[0].weight.grad.fill_(torch.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if step != 2:
            iterates.append(snapshot(model))
    check(averages, iterates)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_grad_scaler_skips_is_no_iterate(fused):
    run_alone(skipped, fused)


def no_gradients():
    model = model_of()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    averages = ShardedAverages(model.named_parameters(), KINDS, optimizer=optimizer)
    optimizer.step()
    assert averages.updates == 0
    backward(model)
    optimizer.step()
    optimizer.zero_grad()
    optimizer.step()
    assert averages.updates == 1


def test_a_step_without_gradients_is_no_iterate():
    run_alone(no_gradients)


class WithoutVersions(torch.optim.Optimizer):
    """Writes to `p.data`, which torch does not count, as many optimizers of other packages do."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})

    def step(self, closure=None):
        for param in self.param_groups[0]["params"]:
            param.data.add_(param.grad, alpha=-0.1)
            param.grad = None


def test_an_optimizer_whose_writes_torch_does_not_count():
    run_alone(follow, WithoutVersions)


def in_backward():
    """Every parameter has an optimizer of its own, which steps in the hook of its gradient."""
    model = model_of()
    optimizers = {param: torch.optim.SGD([param], lr=0.1) for param in model.parameters()}
    averages = ShardedAverages(model.named_parameters(), KINDS, optimizer=list(optimizers.values()))

    def step(param):
        optimizers[param].step()
        optimizers[param].zero_grad()

    for param in model.parameters():
        param.register_post_accumulate_grad_hook(step)
    iterates = []
    for number in range(4):
        backward(model, number)
        iterates.append(snapshot(model))
    check(averages, iterates)


def test_optimizers_that_step_in_backward():
    run_alone(in_backward)


def by_hand():
    model = model_of(torch.bfloat16)
    averages = ShardedAverages(model.named_parameters(), KINDS)
    iterates = []
    for step in range(200):
        with torch.no_grad():
            for param in model.parameters():
                param.copy_(1 + 0.5 * (torch.rand(param.shape) < 0.5) + step / 400)
        averages.update()
        iterates.append(snapshot(model))
    check(averages, iterates)
    found, true = averages.full_state_dict("mean"), mean(iterates)
    assert max((found[key] - true[key]).abs().max().item() for key in true) < 1e-6


def test_bf16_weights_by_hand():
    run_alone(by_hand)


def forgotten():
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    averages = ShardedAverages(model.named_parameters(), EMA(0.9), optimizer=optimizer, module=model)
    gone = weakref.ref(averages)
    del averages
    gc.collect()
    backward(model)
    optimizer.step()
    assert gone() is None
    assert not optimizer._optimizer_step_post_hooks


def test_an_optimizer_does_not_keep_averages_alive():
    run_alone(forgotten)
