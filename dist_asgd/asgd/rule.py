"""The update rule of averaged SGD, by PyTorch's operators: the reference for every faster form.

The rule is ``torch.optim.ASGD(foreach=False)``, operation by operation, so that fp32 and fp64 results equal torch's bit
for bit (Polyak and Juditsky, "Acceleration of stochastic approximation by averaging", 1992; Bottou, "Large-scale
machine learning with stochastic gradient descent", 2010). At step s of one parameter::

    g   = -g                     if maximize
    g   = g + weight_decay * p   with p before the shrink
    p   = p * (1 - lambd * eta)
    p   = p - eta * g            one rounding, as torch's add(alpha=)
    ax  = p                      if mu == 1
    ax  = ax                     if mu == 0, which torch never has
    ax  = ax + (p - ax) * mu     else; three roundings: lerp or addcmul would change 16 % of the elements
    eta = lr / (1 + lambd * lr * s) ** alpha      used at step s + 1
    mu  = 1 / max(1, s - t0)                      used at step s + 1; averages/kinds.py has mu of other averages

``eta`` and ``mu`` are computed in double at the end of a step and rounded to fp32, as torch stores them. So an ``lr``
that is set between two steps takes effect one step late. With ``lr_on_time``, ``eta`` is computed when its step begins.
With ``eta_decay``, the formula of ``eta`` has ``eta_decay`` in the place of ``lambd``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dist_asgd.asgd.rounding import Rounding, compute_dtype, current_master
from dist_asgd.asgd.schedule import Hyperparameters, Scalars


def asgd_step_(
    param: Tensor,  # any shape, real; updated in place
    grad: Tensor,  # same shape and dtype; only read
    averages: Sequence[Tensor],  # one for each of scalars.mus; same shape, any real dtype, updated in place
    h: Hyperparameters,
    scalars: Scalars,
) -> None:
    """Performs one step of the rule on ``param`` and its averages in the dtype of ``param``."""
    if h.maximize:
        grad = -grad
    if h.weight_decay != 0:
        grad = grad.add(param, alpha=h.weight_decay)
    shrink = 1 - h.lambd * scalars.eta
    if shrink != 1:
        param.mul_(shrink)
    param.add_(grad, alpha=-scalars.eta)
    for average, mu in zip(averages, scalars.mus, strict=True):
        average_step_(average, param, mu)


def low_precision_step_(
    param: Tensor,  # 1-D, of any real dtype; updated in place
    grad: Tensor,  # same length, any real dtype; only read
    averages: Sequence[Tensor],  # one for each of scalars.mus; same length, any real dtype; updated in place
    master: Tensor | None,  # same length, in compute_dtype; updated in place. None for no master
    h: Hyperparameters,
    scalars: Scalars,
    rounding: Rounding,
) -> None:
    """Performs one step of the rule in ``compute_dtype`` and rounds the result into ``param``.

    Averages move towards the result before it is rounded.
    It updates ``master`` if there is one, and otherwise a copy of ``param``. A master whose rounding is not the
    parameter (somebody has written the parameter) first takes the parameter's value.
    """
    dtype = compute_dtype(param.dtype)
    work = param.to(dtype) if master is None else current_master(master, param, rounding.dtype, out=master)
    asgd_step_(work, grad.to(dtype), averages, h, scalars)
    if work is not param:
        param.copy_(rounding(work))


def average_step_(average: Tensor, iterate: Tensor, mu: float) -> None:
    """Moves ``average`` in place towards ``iterate`` by the fraction ``mu``, computed in the wider of their dtypes.

    With a ``mu`` of 0 neither is read.
    """
    if mu == 0:
        return
    if mu == 1:
        average.copy_(iterate)
        return
    wide = average.to(torch.promote_types(average.dtype, iterate.dtype))
    wide.add_(iterate.to(wide.dtype).sub(wide).mul_(mu))
    if wide is not average:
        average.copy_(wide)
