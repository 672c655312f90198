"""``step``, ``eta`` and ``mu`` in the memory of a GPU go on to the next step: one launch of one program.

In the double arithmetic of ``next_scalars``, and rounded as there, so that steps with scalars on the device have the
bits of those with scalars on the host. (``torch.optim.ASGD(capturable=True)`` computes them in fp32.) A power is made
of a logarithm, whose error is some 1e-15: after rounding to fp32, it is the host's but for one time in millions.
"""

from __future__ import annotations

import torch

from dist_asgd.asgd.schedule import DeviceScalars, Hyperparameters
from dist_asgd.kernels.gpu import OPTIONS, bits, compiled, double, loaded, tl

NUMBERS = ("lr", "lambd", "alpha", "t0")


@compiled(NUMBERS, ("step", "eta", "mu", "device_lr", "found_inf"))
def advance_kernel(
    step: tl.tensor, eta: tl.tensor, mu: tl.tensor,
    lr: tl.int64, lambd: tl.int64, alpha: tl.int64, t0: tl.int64,
    device_lr: tl.tensor, found_inf: tl.tensor,
) -> None:  # fmt: skip
    """The numbers are doubles, as bits; ``device_lr`` is read instead of ``lr``, if not None."""
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
    """After a step: the ``Scalars`` of the next one, unless ``scaling`` says that there was no step."""
    lr = 0.0 if h.device_lr is not None else float(h.lr)
    found_inf = None if scalars.scaling is None else scalars.scaling.found_inf
    with torch.cuda.device_of(scalars.step):
        advance_kernel[(1,)](
            scalars.step, scalars.eta, scalars.mu, *bits(lr, h.decay, h.alpha, h.t0), h.device_lr, found_inf, **OPTIONS
        )
