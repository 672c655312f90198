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
from collections.abc import Iterable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from dist_asgd.asgd.rounding import compute_dtype
from dist_asgd.asgd.schedule import AnyScalars, DeviceScalars, Hyperparameters
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
def place_of_block(
    param: tl.tensor, numel: tl.tensor, start: tl.tensor,
    PARAM: tl.constexpr, MANY: tl.constexpr, BLOCK: tl.constexpr,
) -> tuple:  # fmt: skip
    """Locates the block of this program.

    Returns:
        The index of its part and of its first element in the part; the address of that element in the parameter, its
        index in the averages, and the number of elements from there to the end of the part.
    """
    program = tl.program_id(0).to(tl.int64)
    if MANY:
        work = tl.load(param + 3 * numel + program)
        part = work >> 32
        first = (work & 0xFFFFFFFF) * BLOCK
        address = tl.load(param + part)
        place = tl.load(param + numel + part) + first
        left = tl.load(param + 2 * numel + part) - first
    else:
        part = program * 0
        first = program * BLOCK
        address = param.to(tl.int64)
        place = start + first
        left = numel - first
    return part, first, address + first * (PARAM.primitive_bitwidth // 8), place, left


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
def address_of(coded: tl.tensor, place: tl.tensor, TYPE: tl.constexpr) -> tl.tensor:
    """Returns the address of element ``place`` of a tensor whose address is ``coded`` (see ``coded``)."""
    return (coded.to(tl.int64) >> 1) + place * (TYPE.primitive_bitwidth // 8)


@jit()
def _current_mu(mu: tl.tensor, device_mu: tl.tensor) -> tl.tensor:
    """Returns mu as a double: ``device_mu``, or if that is None the ``coded`` bits ``mu``."""
    if device_mu is None:
        return double(mu.to(tl.int64) >> 1)
    else:
        return tl.load(device_mu).to(tl.float64)


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
def pointers_to(
    address: tl.tensor, first: tl.tensor, TYPE: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr
) -> tl.tensor:
    """Returns pointers to ``BLOCK`` elements of type ``TYPE`` from index ``first`` on, counted from ``address``."""
    pointer = address.to(tl.pointer_type(TYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)  # bytes: loads and stores become vector instructions
    return pointer + first + tl.arange(0, BLOCK)


@jit()
def load(pointers: tl.tensor, left: tl.tensor, BLOCK: tl.constexpr, ALIGNED: tl.constexpr) -> tl.tensor:
    if ALIGNED:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=tl.arange(0, BLOCK) < left)


@jit()
def store(pointers: tl.tensor, values: tl.tensor, left: tl.tensor, BLOCK: tl.constexpr, ALIGNED: tl.constexpr) -> None:
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
def move_block(
    address: tl.tensor, iterate: tl.tensor, mu: tl.tensor, left: tl.tensor, first: tl.tensor,
    REAL: tl.constexpr, MOVES: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
) -> None:  # fmt: skip
    """Moves ``BLOCK`` elements, from index ``first`` on, of the average at ``address`` towards ``iterate``.

    Args:
        mu: a double.
        left: the number of elements from index 0 to the end of the parameter.
        MOVES: "becomes" if mu is 1, "moves" if it is not, "asks" if that is not known when this is compiled.
    """
    averages = pointers_to(address, first, REAL, BLOCK, ALIGNED)
    average = iterate
    if MOVES != "becomes":
        old = load(averages, left - first, BLOCK, ALIGNED)
        average = old + (iterate - old) * mu.to(REAL)
    if MOVES == "asks":
        average = tl.where(mu == 1, iterate, average)
    store(averages, average, left - first, BLOCK, ALIGNED)


@jit()
def _update_block(
    param_address: tl.tensor, grad_address: tl.tensor, averages: tl.tuple, mus: tl.tuple, device_mu: tl.tensor,
    place: tl.tensor, master_address: tl.tensor,
    left: tl.tensor, first: tl.tensor, shrink: tl.tensor, minus_eta: tl.tensor, decay: tl.tensor,
    inverse_scale: tl.tensor, seed: tl.tensor, number: tl.tensor,
    PARAM: tl.constexpr, GRAD: tl.constexpr, REAL: tl.constexpr, ROUNDED: tl.constexpr,
    MAXIMIZE: tl.constexpr, DECAYS: tl.constexpr, MOVES: tl.constexpr, STOCHASTIC: tl.constexpr,
    BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
) -> None:  # fmt: skip
    """Updates ``BLOCK`` elements from index ``first`` on by the rule, operation by operation as in asgd/rule.py.

    ``left`` is the number of elements from index 0 to the end of the parameter.
    """
    params = pointers_to(param_address, first, PARAM, BLOCK, ALIGNED)
    p = load(params, left - first, BLOCK, ALIGNED).to(REAL)
    if master_address is not None:
        masters = pointers_to(master_address, first, REAL, BLOCK, ALIGNED)
        master = load(masters, left - first, BLOCK, ALIGNED)
        p = tl.where(master.to(ROUNDED).to(REAL) == p, master, p)
    g = load(pointers_to(grad_address, first, GRAD, BLOCK, ALIGNED), left - first, BLOCK, ALIGNED).to(REAL)
    if inverse_scale is not None:
        g = g * tl.load(inverse_scale).to(REAL)
    if MAXIMIZE:
        g = g * -1.0  # Triton computes -g as 0 - g, which gives another sign of zero
    if DECAYS:
        g = tl.fma(p, decay, g)
    p = p * shrink
    p = tl.fma(g, minus_eta, p)
    if averages is not None:
        for k in tl.static_range(len(averages)):
            mu = _current_mu(mus[k], device_mu)
            move_block(address_of(averages[k], place, REAL), p, mu, left, first, REAL, MOVES, BLOCK, ALIGNED)
    if master_address is not None:
        store(masters, p, left - first, BLOCK, ALIGNED)
    if STOCHASTIC:
        store(params, _round_stochastically(p, seed, number + first, BLOCK), left - first, BLOCK, ALIGNED)
    else:
        store(params, p.to(ROUNDED).to(PARAM), left - first, BLOCK, ALIGNED)


@jit(
    ("numel", "start", "lambd", "eta", "weight_decay", "seed", "number"),
    ("param", "grad", "master", *SCALARS),
)
def update_kernel(
    param: tl.tensor, grad: tl.tensor, averages: tl.tuple, mus: tl.tuple, master: tl.tensor,
    numel: tl.int64, start: tl.int64, lambd: tl.int64, eta: tl.int64, weight_decay: tl.int64,
    seed: tl.int64, number: tl.int64,
    device_step: tl.tensor, device_eta: tl.tensor, device_mu: tl.tensor, device_lr: tl.tensor,
    inverse_scale: tl.tensor, found_inf: tl.tensor,
    PARAM: tl.constexpr, GRAD: tl.constexpr, REAL: tl.constexpr, ROUNDED: tl.constexpr, MANY: tl.constexpr,
    MAXIMIZE: tl.constexpr, DECAYS: tl.constexpr, MOVES: tl.constexpr, STOCHASTIC: tl.constexpr,
    BLOCK: tl.constexpr, SMALL: tl.constexpr,
) -> None:  # fmt: skip
    """Updates the block of this program, unless ``found_inf`` points to a value other than 0.

    Args:
        param, grad: the parameter and its gradient; with MANY, the two tables of ``DeviceTables``.
        averages, mus: the ``coded`` addresses of averages, and the ``coded`` bits of the mu of each; or None.
        master: as ``FusedUpdate`` takes it, or None.
        numel: the number of elements of the parameter; with MANY, the number of parameters.
        start: the index of the parameter in averages and master; ignored with MANY.
        lambd, eta, weight_decay: the bits of doubles. With scalars on the device ``eta`` is the lr.
        seed, number: ``Rounding.seed`` and ``Rounding.first``.
        device_step, device_eta, device_mu: the tensors of ``DeviceScalars``, instead of ``eta`` and ``mus``; or None.
        device_lr: a tensor that replaces the lr, or None.
        inverse_scale, found_inf: the tensors of ``Scaling``, or None.
        MOVES: as ``move_block`` takes it.
    """
    if found_inf is not None:  # noqa: SIM102 (two kinds of condition: Triton decides this one when it compiles)
        if tl.load(found_inf) != 0:
            return
    part, of_part, param_address, place, left = place_of_block(param, numel, start, PARAM, MANY, BLOCK)
    grad_address = (tl.load(grad + part) if MANY else grad.to(tl.int64)) + of_part * (GRAD.primitive_bitwidth // 8)
    addresses = param_address | grad_address
    if averages is not None:
        for k in tl.static_range(len(averages)):
            addresses |= address_of(averages[k], place, REAL)
    master_address = master
    if master is not None:
        master_address = master.to(tl.int64) + place * (REAL.primitive_bitwidth // 8)
        addresses |= master_address
    eta_now = _current_eta(eta, device_step, device_eta, device_lr)
    shrink = (1.0 - double(lambd) * eta_now).to(REAL)
    minus_eta = (eta_now * -1.0).to(REAL)
    decay = double(weight_decay).to(REAL)
    seed_now = _current_seed(seed, device_step)
    if (left >= BLOCK) & (addresses & 15 == 0):
        _update_block(
            param_address, grad_address, averages, mus, device_mu, place, master_address, left, 0, shrink, minus_eta,
            decay, inverse_scale, seed_now, number + place,
            PARAM, GRAD, REAL, ROUNDED, MAXIMIZE, DECAYS, MOVES, STOCHASTIC, BLOCK, True,
        )  # fmt: skip
    else:  # in pieces of another size, or else Triton would lay these out for vectors too
        for first in range(0, tl.minimum(left, BLOCK).to(tl.int32), SMALL):
            _update_block(
                param_address, grad_address, averages, mus, device_mu, place, master_address, left, first, shrink,
                minus_eta, decay, inverse_scale, seed_now, number + place,
                PARAM, GRAD, REAL, ROUNDED, MAXIMIZE, DECAYS, MOVES, STOCHASTIC, SMALL, False,
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
        self._types = {name: triton_dtype(dtype) for name, dtype in names.items()}
        self._tables: WeakKeyDictionary[TensorList, DeviceTables] = WeakKeyDictionary()

    def __call__(self, parts: TensorList, grads: Gradients, step: SliceStep) -> None:
        """Launches the kernel. It reads scalars on the device there, so a CUDA graph reads them when it is replayed."""
        h, rounding = step.h, step.rounding
        with torch.cuda.device_of(parts.tensors[0]):
            where, programs = launch_of(parts, self._tables)
            gradient = self._tables[parts].of_grads(grads.addresses) if where["MANY"] else grads.tensors[0]
            if programs:
                update_kernel[(programs,)](
                    grad=gradient, **where, averages=coded(map(Tensor.data_ptr, step.averages)), master=step.master,
                    **_numbers(h, step.scalars), seed=rounding.seed or 0, number=rounding.first, **self._types,
                    MAXIMIZE=h.maximize, DECAYS=h.weight_decay != 0, STOCHASTIC=rounding.seed is not None,
                    SMALL=SMALL, **OPTIONS,
                )  # fmt: skip


def launch_of(parts: TensorList, tables: WeakKeyDictionary[TensorList, DeviceTables]) -> tuple[dict[str, Any], int]:
    """Returns the arguments that tell a kernel of ``parts`` where they lie, and the number of programs.

    Args:
        tables: where the tables of several parts are kept for the next launch.
    """
    if len(parts.tensors) == 1:
        where = {"param": parts.tensors[0], "numel": parts.numel, "start": parts.starts[0]}
        return where | {"MANY": False, "BLOCK": BLOCK}, -(-parts.numel // BLOCK)
    own = tables.get(parts) or tables.setdefault(parts, DeviceTables(parts, BLOCK))
    where = {"param": own.of_parts, "numel": len(parts.tensors), "start": 0}
    return where | {"MANY": True, "BLOCK": BLOCK}, own.programs


def triton_dtype(dtype: torch.dtype) -> Any:
    """Returns Triton's dtype, which has the name of torch's."""
    return getattr(tl, str(dtype).removeprefix("torch."))


def coded(numbers: Iterable[int]) -> tuple[int, ...] | None:
    """Returns a tuple for a kernel, or None for no numbers. The kernel divides each by 2 to get it back.

    All are odd, or else Triton would compile again for numbers that are 1 or multiples of 16: in tuples it cannot be
    told not to.

    Args:
        numbers: from 1 to 2**62 - 1, such as addresses and ``double_bits`` up to 1.0.
    """
    return tuple(2 * number + 1 for number in numbers) or None


def double_bits(*numbers: float) -> list[int]:
    """Returns the bits of doubles as int64, because Triton rounds floats that it is passed to fp32."""
    return array("q", array("d", numbers).tobytes()).tolist()


def _numbers(h: Hyperparameters, scalars: AnyScalars) -> dict[str, Any]:
    """Returns the arguments of ``update_kernel`` that differ from step to step."""
    arguments: dict[str, Any] = dict.fromkeys(SCALARS)
    mus: tuple[float, ...] = (1.0,)
    if isinstance(scalars, DeviceScalars):
        eta, moves, scaling = 0.0 if h.device_lr is not None else float(h.lr), "asks", scalars.scaling
        arguments |= {"device_step": scalars.step, "device_eta": scalars.eta, "device_mu": scalars.mu}
        arguments |= {"device_lr": h.device_lr}
        if scaling is not None:
            arguments |= {"inverse_scale": scaling.inverse_scale, "found_inf": scaling.found_inf}
    else:
        eta, mus = scalars.eta, scalars.mus
        # Compiled once for several averages, whichever of them have just started.
        moves = "asks" if len(mus) > 1 else "becomes" if mus == (1.0,) else "moves"
    arguments |= zip(("lambd", "eta", "weight_decay"), double_bits(h.lambd, eta, h.weight_decay), strict=True)
    return arguments | {"mus": coded(double_bits(*mus)), "MOVES": moves}


@functools.cache
def triton_update(param: torch.dtype, grad: torch.dtype, rounded: torch.dtype) -> TritonUpdate | None:
    """Returns the update of these dtypes, or None if Triton is not installed or has no such update.

    The arguments are those of ``TritonUpdate``. Compiling happens at the first launch.
    """
    if triton is None or not {param, rounded} <= DTYPES or grad not in (param, compute_dtype(param)):
        return None
    return TritonUpdate(param, grad, rounded)
