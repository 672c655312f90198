"""Advances ``step``, ``eta`` and ``mu`` in the memory of a GPU to the next step, by one launch of one program.

It computes as ``next_scalars`` in asgd/schedule.py, in double and rounded to the same dtype, so that steps with scalars
on the device have the bits of steps with scalars on the host. (``torch.optim.ASGD(capturable=True)`` computes in fp32.)
The power is computed by a logarithm, with an error of about 1e-15: rounded to fp32, it differs from the host's once in
millions of times.
"""

from __future__ import annotations

import torch

from dist_asgd.asgd.schedule import DeviceScalars, Hyperparameters
from dist_asgd.kernels.gpu import OPTIONS, double, double_bits, jit, loaded, tl


@jit(("lr", "lambd", "alpha", "t0"), ("step", "eta", "mu", "device_lr", "found_inf"))
def advance_kernel(
    step: tl.tensor, eta: tl.tensor, mu: tl.tensor,
    lr: tl.int64, lambd: tl.int64, alpha: tl.int64, t0: tl.int64,
    device_lr: tl.tensor, found_inf: tl.tensor,
) -> None:  # fmt: skip
    """Writes ``step``, ``eta`` and ``mu`` of the next step, unless ``found_inf`` points to a value other than 0.

    Args:
        step, eta, mu: pointers to one element each, as ``DeviceScalars`` has them.
        lr, lambd, alpha, t0: the bits of doubles.
        device_lr: a pointer to the lr, or None to take ``lr``.
    """
    if found_inf is not None:  # noqa: SIM102 (two kinds of condition: this one is decided when it is compiled)
        if tl.load(found_inf) != 0:
            return
    following = tl.load(step) + 1
    count = following.to(tl.float64)
    rate = loaded(double(lr), device_lr, tl.float64)
    power = tl.exp2(double(alpha) * tl.log2(1.0 + double(lambd) * rate * count))
    steps = count - double(t0)
    tl.store(step, following)
    tl.store(eta, (rate / power).to(eta.dtype.element_ty))
    tl.store(mu, (1.0 / tl.where(steps > 1.0, steps, 1.0)).to(mu.dtype.element_ty))


def advance_(scalars: DeviceScalars, h: Hyperparameters) -> None:
    """Advances ``scalars`` in place, unless their ``scaling`` says that the step was skipped. Does not wait."""
    lr = 0.0 if h.device_lr is not None else float(h.lr)
    found_inf = None if scalars.scaling is None else scalars.scaling.found_inf
    numbers = double_bits(lr, h.decay, h.alpha, h.t0)
    with torch.cuda.device_of(scalars.step):
        advance_kernel[(1,)](scalars.step, scalars.eta, scalars.mu, *numbers, h.device_lr, found_inf, **OPTIONS)
