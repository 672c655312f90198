"""The rule against float64 closed forms and against torch.optim.ASGD, one tensor at a time."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_asgd.asgd.rule import asgd_step_, average_step_
from dist_asgd.asgd.schedule import Hyperparameters, Scalars, first_scalars, next_scalars


def options(**changed):
    return Hyperparameters(
        **{"lr": 0.1, "lambd": 1e-4, "alpha": 0.75, "t0": 0.0, "weight_decay": 0.0, "maximize": False} | changed
    )


def run(h, start, gradient, steps):
    """Trajectory of float64 parameters and averages under ``gradient(p)``: lists of tensors."""
    param, average, scalars = start.clone(), start.clone(), first_scalars(h)
    params, averages = [], []
    for step in range(1, steps + 1):
        asgd_step_(param, gradient(param), [average], h, scalars)
        scalars = next_scalars(h, step)
        params.append(param.clone())
        averages.append(average.clone())
    return params, averages


def test_constant_gradient_has_a_closed_form_without_decay():
    """lambd = 0: eta is lr for ever, so p_s = p_0 - s * lr * g, and the average is that of an arithmetic sequence."""
    h = options(lambd=0.0, lr=0.25, t0=3.0)
    start, g = torch.tensor([1.0, -2.0], dtype=torch.float64), torch.tensor([0.5, 2.0], dtype=torch.float64)
    params, averages = run(h, start, lambda p: g, 40)
    for step, (param, average) in enumerate(zip(params, averages, strict=True), start=1):
        torch.testing.assert_close(param, start - step * 0.25 * g, rtol=1e-14, atol=1e-14)
        first = min(step, 5)  # t0 + 2 is the first iterate of the mean; before it the average is the iterate
        expected = start - 0.25 * g * (first + step) / 2
        torch.testing.assert_close(average, expected, rtol=1e-6, atol=1e-6)  # mu is rounded to fp32


def test_quadratic_with_weight_decay_contracts_as_computed():
    """g = p: p_{s+1} = p_s * ((1 - lambd * eta) - eta * (1 + weight_decay)), with the step's own eta."""
    h = options(lambd=0.01, lr=0.3, weight_decay=0.5, t0=math.inf)
    params, averages = run(h, torch.ones(1, dtype=torch.float64), lambda p: p.clone(), 30)
    expected, eta = 1.0, 0.3
    for step, (param, average) in enumerate(zip(params, averages, strict=True), start=1):
        expected *= (1 - 0.01 * eta) - eta * 1.5
        assert param.item() == pytest.approx(expected, rel=1e-5)
        assert torch.equal(average, param)  # t0 = inf: never averages
        eta = 0.3 / (1 + 0.01 * 0.3 * step) ** 0.75


@pytest.mark.parametrize("t0", [0, 1, 7, 50])
def test_average_is_the_mean_of_the_iterates_from_t0_plus_2(t0):
    torch.manual_seed(t0)
    gradients = iter(torch.randn(200, 16, dtype=torch.float64))
    params, averages = run(options(t0=float(t0)), torch.zeros(16, dtype=torch.float64), lambda p: next(gradients), 120)
    for step in range(t0 + 3, 121):
        mean = torch.stack(params[t0 + 1 : step]).mean(0)
        torch.testing.assert_close(averages[step - 1], mean, rtol=1e-5, atol=1e-6)


@settings(max_examples=300, deadline=None)
@given(
    lr=st.floats(0, 10),
    lambd=st.floats(0, 1),
    alpha=st.floats(0, 2),
    t0=st.floats(0, 50),
    weight_decay=st.sampled_from([0.0, 0.1]),
    maximize=st.booleans(),
    double=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_options_equal_torch_bit_for_bit(lr, lambd, alpha, t0, weight_decay, maximize, double, seed):
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.float64 if double else torch.float32
    theirs = torch.nn.Parameter(torch.randn(67, generator=generator, dtype=dtype))
    param, average = theirs.detach().clone(), theirs.detach().clone()
    h = options(lr=lr, lambd=lambd, alpha=alpha, t0=t0, weight_decay=weight_decay, maximize=maximize)
    optimizer = torch.optim.ASGD([theirs], lr, lambd, alpha, t0, weight_decay, foreach=False, maximize=maximize)
    scalars = first_scalars(h)
    for step in range(1, 8):
        theirs.grad = torch.randn(67, generator=generator, dtype=dtype)
        asgd_step_(param, theirs.grad, [average], h, scalars)
        scalars = next_scalars(h, step)
        optimizer.step()
        state = optimizer.state[theirs]
        assert torch.equal(param, theirs.detach())
        assert torch.equal(average, state["ax"])
        assert (scalars.eta, *scalars.mus) == (state["eta"].item(), state["mu"].item())


def test_a_tensor_lr_gives_the_eta_of_torchs_tensor_arithmetic():
    lr = torch.tensor(0.3)
    theirs = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.ASGD([theirs], lr, lambd=0.37, foreach=False)
    for step in range(1, 50):
        theirs.grad = torch.ones(1)
        optimizer.step()
        assert next_scalars(options(lr=lr, lambd=0.37), step).eta == optimizer.state[theirs]["eta"].item()


def test_the_gradient_is_only_read():
    grad = torch.randn(5)
    before = grad.clone()
    h = options(maximize=True, weight_decay=0.1)
    asgd_step_(torch.randn(5), grad, [torch.zeros(5)], h, Scalars(3, 0.1, (0.5,)))
    assert torch.equal(grad, before)


def test_an_average_in_another_dtype_is_computed_in_the_wider_one():
    iterate = torch.tensor([1.0009765625, 3.0])
    narrow = torch.ones(2, dtype=torch.bfloat16)
    average_step_(narrow, iterate, 0.5)
    assert narrow.tolist() == [1.0, 2.0]
    wide = torch.ones(2, dtype=torch.float64)
    average_step_(wide, iterate, 2**-30)
    assert wide[1].item() == 1 + 2 * 2**-30


def test_infinity_does_not_stay_in_an_average_that_is_the_parameter():
    average = torch.tensor([math.inf])
    average_step_(average, torch.tensor([2.0]), 1.0)
    assert average.item() == 2.0


def test_an_iterate_that_an_average_leaves_out_cannot_spoil_it():
    average = torch.tensor([1.0])
    average_step_(average, torch.tensor([math.nan]), 0.0)
    assert average.item() == 1.0


@pytest.mark.parametrize("name", ["lr", "lambd", "alpha", "t0", "weight_decay"])
@pytest.mark.parametrize("value", [-1e-9, math.nan, "0.1", None, True])
def test_an_option_out_of_range_is_named_with_its_value(name, value):
    with pytest.raises((ValueError, TypeError), match=name) as caught:
        options(**{name: value})
    assert repr(value) in str(caught.value)


def test_steps_beyond_fp32_integers_are_counted():
    h = options(t0=0.0, lambd=1.0)
    assert next_scalars(h, 2**24 + 1).step == 2**24 + 1
