"""The update rule in one pass over memory on a GPU: one launch of a Triton kernel for any number of tensors.

Each program of the kernel updates one block of one tensor. Tables in device memory say where the block lies
(kernels/pointer_tables.py); a single tensor needs no table.

The bits are those of PyTorch's CUDA operators. They compute ``add(alpha=)`` as an FMA, because nvcc contracts
``a + alpha * b`` (pytorch#175838), and round after every other operation. So the kernel asks for these FMAs explicitly
and is compiled without any other contraction.
"""

from __future__ import annotations

import functools
from array import array
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch

from dist_asgd.asgd.rounding import compute_dtype
from dist_asgd.asgd.schedule import AnyScalars, DeviceScalars, Hyperparameters, Scalars
from dist_asgd.kernels.pointer_tables import DeviceTables
from dist_asgd.kernels.tensor_list import Gradients, SliceStep, TensorList

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

# Elements of a block: 16 for each thread, which then has 4 vector loads of fp32 under way for each tensor.
BLOCK = 2048
SMALL = 512  # elements that are updated at once where the tensor ends within the block, or is not aligned
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}

DTYPES = {torch.float32, torch.float64, torch.bfloat16, torch.float16}
SCALARS = ("device_step", "device_eta", "device_mu", "device_lr", "inverse_scale", "found_inf")  # 1 element each


def jit(numbers: Sequence[str] = (), pointers: Sequence[str] = ()) -> Any:
    """Returns a decorator that makes a Triton function, or that changes nothing if Triton is not installed.

    Args:
        numbers: arguments for all of whose values one compilation is enough. Triton would compile again for values of 1
            and multiples of 16.
        pointers: arguments for all of whose alignments one compilation is enough.
    """
    if triton is None:
        return lambda function: function
    return triton.jit(do_not_specialize=numbers, do_not_specialize_on_alignment=pointers)


@jit()
def _place(
    param: tl.tensor, grad: tl.tensor, numel: tl.tensor,
    PARAM: tl.constexpr, GRAD: tl.constexpr, MANY: tl.constexpr, BLOCK: tl.constexpr,
) -> tuple:  # fmt: skip
    """Locates the block of this program.

    Returns:
        The addresses of its first element in the parameter and in the gradient, the index of that element in the
        averages, and the number of elements from there to the end of the parameter.
    """
    program = tl.program_id(0).to(tl.int64)
    if MANY:
        work = tl.load(param + 3 * numel + program)
        part = work >> 32
        first = (work & 0xFFFFFFFF) * BLOCK
        param_address = tl.load(param + part)
        grad_address = tl.load(grad + part)
        place = tl.load(param + numel + part) + first
        left = tl.load(param + 2 * numel + part) - first
    else:
        first = program * BLOCK
        param_address = param.to(tl.int64)
        grad_address = grad.to(tl.int64)
        place = first
        left = numel - first
    param_address += first * (PARAM.primitive_bitwidth // 8)
    grad_address += first * (GRAD.primitive_bitwidth // 8)
    return param_address, grad_address, place, left


@jit()
def double(bits: tl.tensor) -> tl.tensor:
    """Returns the double whose bits are ``bits``; the host makes them by ``double_bits``."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@jit()
def loaded(value: tl.tensor, instead: tl.tensor, TYPE: tl.constexpr) -> tl.tensor:
    """Returns what the pointer ``instead`` points to, as ``TYPE``, or ``value`` if that is None."""
    if instead is None:
        return value
    else:
        return tl.load(instead).to(TYPE)


@jit()
def _current_eta(eta: tl.tensor, device_step: tl.tensor, device_eta: tl.tensor, device_lr: tl.tensor) -> tl.tensor:
    """Returns the eta of this step as a double: ``eta``, or ``device_eta`` if given.

    In the first step with scalars on the device it is the lr: ``device_lr``, or ``eta`` if that is None.
    """
    if device_eta is None:
        return double(eta)
    else:
        first = loaded(double(eta), device_lr, tl.float64).to(device_eta.dtype.element_ty)
        return tl.where(tl.load(device_step) == 0, first, tl.load(device_eta)).to(tl.float64)


@jit()
def _scramble(number: tl.tensor) -> tl.tensor:
    """Returns ``scramble`` (asgd/rounding.py) of uint32 numbers."""
    number = (number ^ number >> 16) * 0x85EBCA6B
    number = (number ^ number >> 13) * 0xC2B2AE35
    return number ^ number >> 16


@jit()
def _current_seed(seed: tl.tensor, device_step: tl.tensor) -> tl.tensor:
    """Returns the seed of this step. ``Rounding.at`` computes it on the host unless the device holds the step."""
    if device_step is None:
        return seed
    else:
        return _scramble((seed + tl.load(device_step)).to(tl.uint32))


@jit()
def _block(
    address: tl.tensor, first: tl.tensor, TYPE: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr
) -> tl.tensor:
    """Returns pointers to ``BLOCK`` elements of type ``TYPE`` from index ``first`` on, counted from ``address``."""
    pointer = address.to(tl.pointer_type(TYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)  # bytes: loads and stores become vector instructions
    return pointer + first + tl.arange(0, BLOCK)


@jit()
def _load(pointers: tl.tensor, left: tl.tensor, BLOCK: tl.constexpr, ALIGNED: tl.constexpr) -> tl.tensor:
    if ALIGNED:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=tl.arange(0, BLOCK) < left)


@jit()
def _store(pointers: tl.tensor, values: tl.tensor, left: tl.tensor, BLOCK: tl.constexpr, ALIGNED: tl.constexpr) -> None:
    if ALIGNED:
        tl.store(pointers, values)
    else:
        tl.store(pointers, values, mask=tl.arange(0, BLOCK) < left)


@jit()
def _round_stochastically(values: tl.tensor, seed: tl.tensor, number: tl.tensor, BLOCK: tl.constexpr) -> tl.tensor:
    """Rounds fp32 to bf16 with the bits of ``round_stochastically`` in asgd/rounding.py.

    ``number`` is the number of the first value.
    """
    noise = _scramble((number + tl.arange(0, BLOCK)).to(tl.uint32) * 0x9E3779B1 ^ seed.to(tl.uint32)) & 0xFFFF
    bits = values.to(tl.uint32, bitcast=True) + noise
    rounded = (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return tl.where(values - values == 0, rounded, values.to(tl.bfloat16))  # infinities and NaNs stay


@jit()
def _update_block(
    param_address: tl.tensor, grad_address: tl.tensor, average_address: tl.tensor, master_address: tl.tensor,
    left: tl.tensor, first: tl.tensor, shrink: tl.tensor, minus_eta: tl.tensor, mu: tl.tensor, decay: tl.tensor,
    inverse_scale: tl.tensor, seed: tl.tensor, number: tl.tensor,
    PARAM: tl.constexpr, GRAD: tl.constexpr, REAL: tl.constexpr, ROUNDED: tl.constexpr,
    MAXIMIZE: tl.constexpr, DECAYS: tl.constexpr, AVERAGES: tl.constexpr, STOCHASTIC: tl.constexpr,
    BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
) -> None:  # fmt: skip
    """Updates ``BLOCK`` elements from index ``first`` on by the rule, operation by operation as in asgd/rule.py.

    ``left`` is the number of elements from index 0 to the end of the parameter.
    """
    params = _block(param_address, first, PARAM, BLOCK, ALIGNED)
    p = _load(params, left - first, BLOCK, ALIGNED).to(REAL)
    if master_address is not None:
        masters = _block(master_address, first, REAL, BLOCK, ALIGNED)
        master = _load(masters, left - first, BLOCK, ALIGNED)
        p = tl.where(master.to(ROUNDED).to(REAL) == p, master, p)
    g = _load(_block(grad_address, first, GRAD, BLOCK, ALIGNED), left - first, BLOCK, ALIGNED).to(REAL)
    if inverse_scale is not None:
        g = g * tl.load(inverse_scale).to(REAL)
    if MAXIMIZE:
        g = g * -1.0  # Triton computes -g as 0 - g, which gives another sign of zero
    if DECAYS:
        g = tl.fma(p, decay, g)
    p = p * shrink
    p = tl.fma(g, minus_eta, p)
    if average_address is not None:
        averages = _block(average_address, first, REAL, BLOCK, ALIGNED)
        average = p
        if AVERAGES != "becomes":
            old = _load(averages, left - first, BLOCK, ALIGNED)
            average = old + (p - old) * mu
        if AVERAGES == "asks":
            average = tl.where(mu == 1, p, average)
        _store(averages, average, left - first, BLOCK, ALIGNED)
    if master_address is not None:
        _store(masters, p, left - first, BLOCK, ALIGNED)
    if STOCHASTIC:
        _store(params, _round_stochastically(p, seed, number + first, BLOCK), left - first, BLOCK, ALIGNED)
    else:
        _store(params, p.to(ROUNDED).to(PARAM), left - first, BLOCK, ALIGNED)


@jit(
    ("numel", "lambd", "eta", "mu", "weight_decay", "seed", "number"),
    ("param", "grad", "average", "master", *SCALARS),
)
def update_kernel(
    param: tl.tensor, grad: tl.tensor, average: tl.tensor, master: tl.tensor,
    numel: tl.int64, lambd: tl.int64, eta: tl.int64, mu: tl.int64, weight_decay: tl.int64,
    seed: tl.int64, number: tl.int64,
    device_step: tl.tensor, device_eta: tl.tensor, device_mu: tl.tensor, device_lr: tl.tensor,
    inverse_scale: tl.tensor, found_inf: tl.tensor,
    PARAM: tl.constexpr, GRAD: tl.constexpr, REAL: tl.constexpr, ROUNDED: tl.constexpr, MANY: tl.constexpr,
    MAXIMIZE: tl.constexpr, DECAYS: tl.constexpr, AVERAGES: tl.constexpr, STOCHASTIC: tl.constexpr,
    BLOCK: tl.constexpr, SMALL: tl.constexpr,
) -> None:  # fmt: skip
    """Updates the block of this program, unless ``found_inf`` points to a value other than 0.

    Args:
        param, grad: the parameter and its gradient; with MANY, the two tables of ``DeviceTables``.
        average, master: as ``FusedUpdate`` takes them, or None.
        numel: the number of elements of the parameter; with MANY, the number of parameters.
        lambd, eta, mu, weight_decay: the bits of doubles. With scalars on the device ``eta`` is the lr.
        seed, number: ``Rounding.seed`` and ``Rounding.first``.
        device_step, device_eta, device_mu: the tensors of ``DeviceScalars``, which replace ``eta`` and ``mu``, or None.
        device_lr: a tensor that replaces the lr, or None.
        inverse_scale, found_inf: the tensors of ``Scaling``, or None.
        AVERAGES: "becomes" if mu is 1, "moves" if it is not, "asks" if only the device knows mu.
    """
    if found_inf is not None:  # noqa: SIM102 (two kinds of condition: Triton decides this one when it compiles)
        if tl.load(found_inf) != 0:
            return
    param_address, grad_address, place, left = _place(param, grad, numel, PARAM, GRAD, MANY, BLOCK)
    addresses = param_address | grad_address
    average_address = average
    if average is not None:
        average_address = average.to(tl.int64) + place * (REAL.primitive_bitwidth // 8)
        addresses |= average_address
    master_address = master
    if master is not None:
        master_address = master.to(tl.int64) + place * (REAL.primitive_bitwidth // 8)
        addresses |= master_address
    eta_now = _current_eta(eta, device_step, device_eta, device_lr)
    mu_now = loaded(double(mu), device_mu, tl.float64).to(REAL)
    shrink = (1.0 - double(lambd) * eta_now).to(REAL)
    minus_eta = (eta_now * -1.0).to(REAL)
    decay = double(weight_decay).to(REAL)
    seed_now = _current_seed(seed, device_step)
    if (left >= BLOCK) & (addresses & 15 == 0):
        _update_block(
            param_address, grad_address, average_address, master_address, left, 0, shrink, minus_eta, mu_now, decay,
            inverse_scale, seed_now, number + place,
            PARAM, GRAD, REAL, ROUNDED, MAXIMIZE, DECAYS, AVERAGES, STOCHASTIC, BLOCK, True,
        )  # fmt: skip
    else:  # in pieces of another size, or else Triton would lay these out for vectors too
        for first in range(0, tl.minimum(left, BLOCK).to(tl.int32), SMALL):
            _update_block(
                param_address, grad_address, average_address, master_address, left, first, shrink, minus_eta, mu_now,
                decay, inverse_scale, seed_now, number + place,
                PARAM, GRAD, REAL, ROUNDED, MAXIMIZE, DECAYS, AVERAGES, STOCHASTIC, SMALL, False,
            )  # fmt: skip


class TritonUpdate:
    """Updates several tensors that share ``scalars`` in one launch. See ``FusedUpdate`` in kernels/dispatch.py.

    Args:
        param, grad: real dtypes of parameters and gradients.
        rounded: the dtype to which parameters are rounded (``Rounding.dtype``).
    """

    takes_device_scalars = True

    def __init__(self, param: torch.dtype, grad: torch.dtype, rounded: torch.dtype) -> None:
        names = {"PARAM": param, "GRAD": grad, "REAL": compute_dtype(param), "ROUNDED": rounded}
        # Triton has torch's names of dtypes.
        self._types = {name: getattr(tl, str(dtype).removeprefix("torch.")) for name, dtype in names.items()}
        self._tables: WeakKeyDictionary[TensorList, DeviceTables] = WeakKeyDictionary()

    def __call__(self, parts: TensorList, grads: Gradients, step: SliceStep) -> None:
        """Launches the kernel. It reads scalars on the device there, so a CUDA graph reads them when it is replayed."""
        average, master, h, rounding = step.average, step.master, step.h, step.rounding
        with torch.cuda.device_of(parts.tensors[0]):
            if len(grads.tensors) == 1:
                programs, numel, start = -(-parts.numel // BLOCK), parts.numel, parts.starts[0]
                number = rounding.first + start
                read = (parts.tensors[0], grads.tensors[0], *(t if t is None else t[start:] for t in (average, master)))
            else:
                tables = self._tables.get(parts) or self._tables.setdefault(parts, DeviceTables(parts, BLOCK))
                programs, numel, number = tables.programs, len(grads.tensors), rounding.first
                read = (tables.of_parts, tables.of_grads(grads.addresses), average, master)
            if programs:
                update_kernel[(programs,)](
                    *read, numel, **_numbers(h, step.scalars), seed=rounding.seed or 0, number=number,
                    **self._types, MANY=len(grads.tensors) > 1, MAXIMIZE=h.maximize, DECAYS=h.weight_decay != 0,
                    STOCHASTIC=rounding.seed is not None, BLOCK=BLOCK, SMALL=SMALL, **OPTIONS,
                )  # fmt: skip


def double_bits(*numbers: float) -> list[int]:
    """Returns the bits of doubles as int64, because Triton rounds floats that it is passed to fp32."""
    return array("q", array("d", numbers).tobytes()).tolist()


def _numbers(h: Hyperparameters, scalars: AnyScalars) -> dict[str, Any]:
    """Returns the arguments of ``update_kernel`` that differ from step to step."""
    arguments: dict[str, Any] = dict.fromkeys(SCALARS)
    if isinstance(scalars, DeviceScalars):
        lr = 0.0 if h.device_lr is not None else float(h.lr)
        known, averages, scaling = Scalars(0, lr, 0.0), "asks", scalars.scaling
        arguments |= {"device_step": scalars.step, "device_eta": scalars.eta, "device_mu": scalars.mu}
        arguments |= {"device_lr": h.device_lr}
        if scaling is not None:
            arguments |= {"inverse_scale": scaling.inverse_scale, "found_inf": scaling.found_inf}
    else:
        known, averages = scalars, "becomes" if scalars.mu == 1 else "moves"
    numbers = double_bits(h.lambd, known.eta, known.mu, h.weight_decay)
    arguments |= zip(("lambd", "eta", "mu", "weight_decay"), numbers, strict=True)
    return arguments | {"AVERAGES": averages}


@functools.cache
def triton_update(param: torch.dtype, grad: torch.dtype, rounded: torch.dtype) -> TritonUpdate | None:
    """Returns the update of these dtypes, or None if Triton is not installed or has no such update.

    The arguments are those of ``TritonUpdate``. Compiling happens at the first launch.
    """
    if triton is None or not {param, rounded} <= DTYPES or grad not in (param, compute_dtype(param)):
        return None
    return TritonUpdate(param, grad, rounded)
