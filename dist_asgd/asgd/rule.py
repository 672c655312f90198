"""The maths of averaged SGD, as functions over tensors and numbers. Knows no ranks, buckets or groups.

The rule is that of ``torch.optim.ASGD(foreach=False)``, operation by operation, so that fp32 and fp64 results are
equal to torch's bit for bit (Polyak and Juditsky, "Acceleration of stochastic approximation by averaging", 1992;
Bottou, "Large-scale machine learning with stochastic gradient descent", 2010). At step s of one parameter::

    g   = -g                     if maximize
    g   = g + weight_decay * p   with p before the shrink
    p   = p * (1 - lambd * eta)
    p   = p - eta * g            one rounding, as torch's add(alpha=)
    ax  = p                      if mu == 1
    ax  = ax + (p - ax) * mu     else; three roundings: lerp or addcmul would change 16 % of the elements
    eta = lr / (1 + lambd * lr * s) ** alpha      used at step s + 1
    mu  = 1 / max(1, s - t0)                      used at step s + 1; that of other averages: averages/kinds.py

``eta`` and ``mu`` are computed in double from the current ``lr`` and rounded to fp32, as torch stores them. So an
``lr`` that is set between two steps acts one step late. With ``lr_on_time``, ``eta`` is computed when its step begins,
by the same formula; with ``eta_decay``, that stands in the formula instead of ``lambd``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dist_asgd.asgd.rounding import Rounding, compute_dtype, followed
from dist_asgd.asgd.schedule import (
    Hyperparameters,
    Scalars,
)


def asgd_step_(
    param: Tensor,  # any shape, real; updated in place
    grad: Tensor,  # same shape and dtype; only read
    average: Tensor | None,  # same shape, any real dtype, updated in place; None where the average is the parameter
    h: Hyperparameters,
    scalars: Scalars,
) -> None:
    """One step of the rule on ``param`` and its ``average``, by plain operators: the reference for every other form."""
    if h.maximize:
        grad = -grad
    if h.weight_decay != 0:
        grad = grad.add(param, alpha=h.weight_decay)
    shrink = 1 - h.lambd * scalars.eta
    if shrink != 1:
        param.mul_(shrink)
    param.add_(grad, alpha=-scalars.eta)
    if average is not None:
        average_step_(average, param, scalars.mu)


def low_precision_step_(
    param: Tensor,  # 1-D, of any real dtype; updated in place
    grad: Tensor,  # same length, any real dtype; only read
    average: Tensor | None,
    master: Tensor | None,  # same length, in compute_dtype; updated in place. None for no master
    h: Hyperparameters,
    scalars: Scalars,
    rounding: Rounding,
) -> None:
    """The same in ``compute_dtype``: on the ``master``, of which ``param`` then is the rounding, or rounded once.

    A master whose rounding no longer is the parameter (somebody wrote the parameter) first takes the parameter's value.
    """
    dtype = compute_dtype(param.dtype)
    work = param.to(dtype) if master is None else followed(master, param, rounding.dtype, out=master)
    asgd_step_(work, grad.to(dtype), average, h, scalars)
    if work is not param:
        param.copy_(rounding(work))


def average_step_(average: Tensor, iterate: Tensor, mu: float) -> None:
    """``average`` moves towards ``iterate`` by the fraction ``mu``, computed in the wider dtype of the two."""
    if mu == 1:
        average.copy_(iterate)
        return
    wide = average.to(torch.promote_types(average.dtype, iterate.dtype))
    wide.add_(iterate.to(wide.dtype).sub(wide).mul_(mu))
    if wide is not average:
        average.copy_(wide)
