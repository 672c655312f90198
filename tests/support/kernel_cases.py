"""What test_kernels.py runs in processes of its own.

    TRITON_INTERPRET=1 python kernel_cases.py interpret
    python kernel_cases.py compile FOLDER

Triton decides on its import whether kernels are interpreted, so that is nothing for the process of the other tests.
"""

import itertools
import json
import math
import sys
import traceback
from dataclasses import replace
from pathlib import Path

import torch

from dist_asgd.asgd.rounding import Rounding, compute_dtype
from dist_asgd.asgd.rule import average_step_, low_precision_step_
from dist_asgd.asgd.schedule import DeviceScalars, Hyperparameters, Scalars, Scaling, first_scalars, next_scalars
from dist_asgd.buckets.packing import Packer
from dist_asgd.kernels import averaging, dispatch, packing, selfcheck
from dist_asgd.kernels.dispatch import advance_
from dist_asgd.kernels.tensor_list import Gradients, SliceStep, TensorList
from dist_asgd.sharding.layout import plan_buckets
from dist_asgd.sharding.placement import Placement
from tests.support import capturable_cases

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
# parameter, gradient, master, and what parameters are rounded to
DTYPES = {
    "float32": (F32, F32, False, F32),
    "float64": (F64, F64, False, F64),
    "float32 that travels as bfloat16": (F32, F32, True, BF16),
    "bfloat16 with master": (BF16, BF16, True, BF16),
    "bfloat16 with master, float32 gradient": (BF16, F32, True, BF16),
    "bfloat16": (BF16, BF16, False, BF16),
    "bfloat16, float32 gradient": (BF16, F32, False, BF16),
    "float16 with master": (F16, F16, True, F16),
    "float16, float32 gradient": (F16, F32, False, F16),
}
# Parts as (start, stop) in the shard. With blocks of 2048: full ones, a rest, several blocks and parts of every size,
# one that is empty, and one that is cut so that it begins off any bound of 16 bytes.
LAYOUTS = {
    "one": [(0, 4101)],
    "one, not aligned": [(3, 2060)],
    "one, empty": [(0, 0)],
    "many": [(0, 1), (8, 2100), (2104, 2104), (2104, 4152), (4155, 4700), (4704, 6801)],
}
NUMEL = 6801
MUS = ((), (1.0,), (0.3,), (0.3, 1.0, 0.7))  # of each average
DEVICE = "cpu"  # the tests on a GPU change it
COMPILED = {name: DTYPES[name] for name in ("float32", "bfloat16 with master")}
AVERAGED = {"float32": F32, "bfloat16": BF16}
TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}


def options(**changed):
    values = {"lr": 0.1, "lambd": 0.1, "alpha": 0.75, "t0": 0.0, "weight_decay": 0.0, "maximize": False}
    return Hyperparameters(**(values | changed))


class Case:
    """Random parameters of one kind of dtypes, laid out in parts, updated by the kernel and by the eager rule."""

    def __init__(self, dtypes, layout, averages=1, seed=0):
        self.param_dtype, self.grad_dtype, self.has_master, rounded = dtypes
        self.rounding = Rounding(rounded)
        self.dtype, self.spans = compute_dtype(self.param_dtype), LAYOUTS[layout]
        generator = torch.Generator().manual_seed(seed)
        p, g, other, *own = torch.randn(3 + averages, NUMEL, dtype=F64, generator=generator)
        self.param, self.grad = p.to(rounded).to(self.param_dtype), g.to(self.grad_dtype).to(DEVICE)
        self.averages = [average.to(self.dtype) for average in own]
        # Half of the masters are those of the parameters, half out of date.
        rest = 1 + 1e-4 * torch.rand(NUMEL, dtype=F64, generator=generator)
        master = (p * rest).to(self.dtype)
        stale = master.to(rounded).to(self.param_dtype) != self.param
        master = torch.where(stale, self.param.to(self.dtype), master)
        master = torch.where(other > 0, master, other.to(self.dtype)) if self.has_master else None
        self.param, self.master, *self.averages = (
            None if t is None else t.to(DEVICE) for t in (self.param, master, *self.averages)
        )

    def tensors(self):
        return [None if t is None else t.clone() for t in (self.param, self.master, *self.averages)]

    def parts(self, param):
        return TensorList.of([param[a:b] for a, b in self.spans], [a for a, _ in self.spans])

    def by_kernel(self, h, scalars):
        from dist_asgd.kernels.gpu import triton_update

        own, master, *averages = tensors = self.tensors()
        grads = [self.grad[a:b] for a, b in self.spans]
        update = triton_update(self.param_dtype, self.grad_dtype, self.rounding.dtype)
        update(self.parts(own), Gradients.of(grads), SliceStep(averages, master, h, scalars, self.rounding))
        return tensors

    def by_rule(self, h, scalars, scale=None):
        own, master, *averages = tensors = self.tensors()
        grad = self.grad if scale is None else self.grad.to(self.dtype) * scale
        for a, b in self.spans:
            cut, master_of = [average[a:b] for average in averages], None if master is None else master[a:b]
            rounding = replace(self.rounding, first=self.rounding.first + a)
            low_precision_step_(own[a:b], grad[a:b], cut, master_of, h, scalars, rounding)
        return tensors


def check(ours, expected, what):
    for index, (mine, theirs) in enumerate(zip(ours, expected, strict=True)):
        if theirs is not None:
            differ = int((bits(mine) != bits(theirs)).sum())
            name = ("parameter", "master", "first average", "second average", "third average")[index]
            assert differ == 0, f"{what}: {differ} elements of the {name} differ"


def bits(tensor):
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def equals_the_rule(dtypes, turn):
    """All options, and with one of them all layouts."""
    every = 3 if DEVICE == "cpu" else 1  # the interpreter is slow: three dtypes share the options
    flags = list(enumerate(itertools.product((False, True), (0.0, 0.1), MUS)))[turn % every :: every]
    for number, (maximize, weight_decay, mus) in flags:
        h = options(maximize=maximize, weight_decay=weight_decay, lambd=0.1 * (number % 4 != 1))
        scalars = Scalars(3, 0.07, mus)
        for layout in LAYOUTS if number == flags[turn % 4][0] else ("many",):
            case = Case(dtypes, layout, averages=len(mus), seed=number)
            check(case.by_kernel(h, scalars), case.by_rule(h, scalars), (layout, h, scalars))


def averages_equal_the_rule(param, average):
    """Without gradients, beside any optimizer: every layout, one average and three."""
    assert averaging.FORMS[DEVICE](torch.device(DEVICE), param, average) is not None
    for layout, mus in itertools.product(LAYOUTS, ((0.3,), (1.0, 0.0, 1 / 3))):
        case = Case((param, param, False, param), layout, averages=len(mus))
        own, averages = ([t.to(average, copy=True) for t in case.averages] for _ in range(2))
        averaging.move_averages_(case.parts(case.param), own, mus)
        for (a, b), (wanted, mu) in itertools.product(case.spans, zip(averages, mus, strict=True)):
            average_step_(wanted[a:b], case.param[a:b], mu)
        check([None, None, *own], [None, None, *averages], (layout, mus))


def packs_as_operators(grad, wire):
    """Gradients of every kind: missing, transposed, of another dtype, of parameters with gaps between them."""
    assert packing.fused_packing(torch.device(DEVICE), grad, wire) is not None
    generator = torch.Generator().manual_seed(0)
    shapes = ((1,), (2092,), (0,), (64, 33), (545,), (), (2048, 2))
    for count in (len(shapes), 1):
        params = [torch.randn(shape, generator=generator).to(DEVICE, grad) for shape in shapes[-count:]]
        layout = plan_buckets([param.numel() for param in params], world_size=3, max_numel=2**30)[0]
        params = [params[span.index] for span in layout.spans]
        packer = Packer(layout, list(map(Placement.of, params)), params[0].new_empty(0))
        buffer = torch.empty(layout.numel, dtype=grad, device=DEVICE)
        parts = TensorList.of([buffer[s.start : s.stop] for s in layout.spans], [s.start for s in layout.spans])
        fused = packing.fused_packing(torch.device(DEVICE), grad, wire)
        plain = list(map(torch.clone, params))
        others = [
            None if t.numel() == 545 else t.double() if t.numel() == 2092 else t.t().contiguous().t() for t in plain
        ]
        for grads in (plain, others, [None] * count):
            ours, expected = (torch.full((layout.numel,), math.nan, dtype=wire, device=DEVICE) for _ in range(2))
            packer.convert(grads, ours, fused, parts)
            packer.pack(range(count), grads, 0, expected)
            assert torch.equal(ours, expected), (grad, wire, count)


def on_device(scalars, **scaling):
    given = {name: None if value is None else torch.tensor(value, device=DEVICE) for name, value in scaling.items()}
    return DeviceScalars.of(scalars, torch.device(DEVICE)).scaled(Scaling(**given) if given else None)


def scalars_of(step, *values):
    """Scalars of one average, which a device keeps in fp32."""
    eta, mu = torch.tensor(values, dtype=F32).tolist()
    return Scalars(step, eta, (mu,))


def unscales_and_sees_inf():
    h, scalars = options(weight_decay=0.1), scalars_of(3, 0.07, 0.3)
    dtypes = (DTYPES["float32"], DTYPES["float16 with master"])
    for kind, layout, scale, found in itertools.product(dtypes, ("one", "many"), (0.3, None), (0.0, 1.0)):
        case = Case(kind, layout)
        ours = case.by_kernel(h, on_device(scalars, inverse_scale=scale, found_inf=found))
        factor = None if scale is None else torch.tensor(scale, device=DEVICE)
        check(ours, case.tensors() if found else case.by_rule(h, scalars, factor), (layout, scale, found))


def reads_scalars_on_the_device():
    h = options(weight_decay=0.1)
    for name, layout, mu in itertools.product(("float32", "float64", "bfloat16"), ("one", "many"), (1.0, 0.3)):
        scalars, case = scalars_of(3, 0.07, mu), Case(DTYPES[name], layout)
        check(case.by_kernel(h, on_device(scalars)), case.by_rule(h, scalars), (name, layout, mu))


def begins_with_the_lr():
    """On the device, ``eta`` is the ``lr`` at the first step, rounded as always, whatever stands there."""
    case = Case(DTYPES["float64"], "one")
    for lr in (0.3, torch.tensor(0.3, device=DEVICE), torch.tensor(0.3, dtype=F64, device=DEVICE)):
        h = options(lr=lr, capturable=True)
        check(case.by_kernel(h, on_device(Scalars(0, 7.0, (1.0,)))), case.by_rule(h, first_scalars(h)), lr)


def advances():
    """As ``next_scalars``, bit for bit; and as a capturable torch, which computes in fp32."""
    for number, (lr, lambd, alpha, t0) in enumerate(
        itertools.product((0.3, 1e-3), (0.0, 0.37), (0.0, 0.75, 2.0), (0.0, 5.0, math.inf))
    ):
        h = options(lr=lr, lambd=lambd, alpha=alpha, t0=t0, eta_decay=(None, 0.02)[number % 2])
        scalars = on_device(Scalars(0, 0.0, (1.0,)))
        first = 10 ** (number % 8)  # 10,000,000: where fp32 could hardly count
        scalars.set_(Scalars(first, 0.0, (1.0,)))
        for step in range(first + 1, first + 7):
            advance_(scalars, h)
            assert scalars.read() == next_scalars(h, step), (h, step, scalars.read(), next_scalars(h, step))


def advances_as_torch():
    # Torch refuses capturable=True on the CPU, where its arithmetic is the same.
    module = sys.modules[torch.optim.ASGD.__module__]
    module._get_capturable_supported_devices = lambda **_: ["cpu", "cuda"]
    theirs = torch.nn.Parameter(torch.ones(1, device=DEVICE))
    lr = torch.tensor(0.3, device=DEVICE)
    optimizer = torch.optim.ASGD([theirs], lr, lambd=0.37, t0=5, foreach=False, capturable=True)
    ours = on_device(Scalars(0, 0.0, (1.0,)))
    for step in range(30):
        theirs.grad = torch.ones_like(theirs)
        lr.fill_(0.3 / (1 + step))
        optimizer.step()
        advance_(ours, options(lr=lr, lambd=0.37, t0=5.0, capturable=True))
        state = optimizer.state[theirs]
        assert ours.step == state["step"]
        torch.testing.assert_close(torch.stack([ours.eta, ours.mu]), torch.stack([state["eta"], state["mu"]]))


def stands_still_where_an_inf_was_found():
    scalars = on_device(scalars_of(3, 0.07, 0.3), inverse_scale=None, found_inf=1.0)
    before = scalars.read()
    advance_(scalars, options())
    assert scalars.read() == before


def advances_in_double_where_that_is_the_default():
    torch.set_default_dtype(F64)
    try:
        scalars, h = on_device(Scalars(0, 0.0, (1.0,))), options(lr=0.3, lambd=0.37)
        advance_(scalars, h)
        eta, mu, expected = scalars.eta.item(), scalars.mu.item(), next_scalars(h, 1)
        assert abs(eta / expected.eta - 1) < 1e-14 and (mu,) == expected.mus and scalars.eta.dtype == F64
    finally:
        torch.set_default_dtype(F32)


def keeps_zeros_infinities_and_nans():
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-45, 3e38, -1.0], device=DEVICE)
    for dtypes, maximize, mu in itertools.product(DTYPES.values(), (False, True), (1.0, 0.3)):
        case, h = Case(dtypes, "one"), options(maximize=maximize)
        case.param[:64] = special.repeat(8)
        case.grad[:64] = special.repeat_interleave(8)
        ours, theirs = (by(h, Scalars(3, 0.07, (mu,))) for by in (case.by_kernel, case.by_rule))
        for mine, expected in zip(ours, theirs, strict=True):
            if expected is not None:  # which NaN it is may differ
                same = (mine == expected) & (mine.signbit() == expected.signbit()) | mine.isnan() & expected.isnan()
                assert same.all(), (dtypes, mine[~same], expected[~same])


def is_one_launch():
    from dist_asgd.kernels import gpu

    class Counting:
        launches = 0

        def __getitem__(self, grid):
            self.launches += 1
            return kernel[grid]

    kernel, gpu.update_kernel = gpu.update_kernel, Counting()
    try:
        for layout, expected in (("one", 1), ("many", 1), ("one, empty", 0)):
            gpu.update_kernel.launches = 0
            Case(DTYPES["float32"], layout).by_kernel(options(), Scalars(3, 0.07, (0.3,)))
            assert gpu.update_kernel.launches == expected, layout
    finally:
        gpu.update_kernel = kernel


def rounds_by_chance():
    """By the choices of the rule, so that a run has the same bits on a GPU."""
    for layout, seed, first in (("one", 5, 0), ("one, not aligned", 2**31, 77), ("many", 2**32 - 1, 2**32 - 1000)):
        case = Case(DTYPES["bfloat16"], layout)
        case.rounding = Rounding(BF16, seed, first)
        case.grad[100:103] = torch.tensor([float("inf"), -float("inf"), 1e38])
        h, scalars = options(weight_decay=0.1), Scalars(3, 0.07, (0.3,))
        check(case.by_kernel(h, scalars), case.by_rule(h, scalars), layout)
        scalars = scalars_of(2**31, 0.07, 0.3)
        ours, case.rounding = case.by_kernel(h, on_device(scalars)), case.rounding.at(first, scalars)
        check(ours, case.by_rule(h, scalars), layout)


INTERPRETED = {name: (equals_the_rule, dtypes, turn) for turn, (name, dtypes) in enumerate(DTYPES.items())}
for param, average in ((F32, F32), (F32, F64), (F64, F64), (BF16, F32), (F16, F32)):
    INTERPRETED[f"averages in {average} of {param}"] = (averages_equal_the_rule, param, average)
for grad, wire in ((F32, BF16), (F32, F16), (BF16, F32)):
    INTERPRETED[f"{grad} gradients sent in {wire}"] = (packs_as_operators, grad, wire)
for function in (
    unscales_and_sees_inf,
    reads_scalars_on_the_device,
    begins_with_the_lr,
    advances,
    advances_as_torch,
    stands_still_where_an_inf_was_found,
    advances_in_double_where_that_is_the_default,
    keeps_zeros_infinities_and_nans,
    is_one_launch,
    rounds_by_chance,
):
    INTERPRETED[function.__name__] = (function,)


def of_an_optimizer(function):
    function(DEVICE)


INTERPRETED |= {function.__name__: (of_an_optimizer, function) for function in capturable_cases.CASES}


def repair_interpreter():
    """Makes the interpreter round as devices do.

    It truncates what is rounded to bf16, where every device rounds to the nearest; and up to Triton 3.6 it computes an
    FMA with two roundings. PyTorch's ``add(alpha=)`` has one; in the kernel, the second factor is one number.
    """
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def to_bfloat16(data, source, target, rounding):
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(data, source, target, rounding)
        return torch.from_numpy(np.array(data)).to(BF16).view(torch.int16).numpy().view(np.uint16)

    interpreter._convert_float = to_bfloat16

    def fma(self, x, y, z):
        factor = np.unique(y.data)
        assert len(factor) == 1
        total = torch.from_numpy(np.array(z.data)).add(torch.from_numpy(np.array(x.data)), alpha=float(factor[0]))
        return interpreter.TensorHandle(total.numpy(), z.dtype.scalar)

    one = interpreter.TensorHandle(np.array([1 + 2.0**-23], np.float32), tl.float32)
    minus = interpreter.TensorHandle(-np.array([1 + 2.0**-22], np.float32), tl.float32)
    if interpreter.interpreter_builder.create_fma(one, one, minus).data[0] == 0:
        interpreter.InterpreterBuilder.create_fma = fma


def interpret():
    """Prints, as JSON, what went wrong in each case; None for nothing."""
    torch.set_num_threads(1)
    repair_interpreter()
    # Tensors on the CPU stand for those on a device.
    Hyperparameters.device_lr = property(lambda h: h.lr if h.capturable and isinstance(h.lr, torch.Tensor) else None)
    for forms in (dispatch.FORMS, averaging.FORMS, packing.FORMS):
        forms["cpu"] = forms["cuda"]
    # The check before a kernel is used would take most of the time; the cases have parts of all sizes themselves.
    selfcheck.PART, selfcheck.STARTS, selfcheck.CHECKED = 211, (0, 225, 448), 672
    results = {}
    for name, (function, *arguments) in INTERPRETED.items():
        try:
            function(*arguments)
            results[name] = None
        except Exception:
            results[name] = traceback.format_exc()
    print(json.dumps(results))


def build(target, dtypes, many, averages=1, scalars_on_device=False):
    """The kernel for averages and weight decay, compiled."""
    from dist_asgd.kernels import gpu

    param, grad, has_master, rounded = dtypes
    pointers = {"param": "*i64" if many else pointer_to(param), "grad": "*i64" if many else pointer_to(grad)}
    pointers |= {"averages": ("i64",) * averages} | ({"master": "*fp32"} if has_master else {})
    absent = set() if has_master else {"master"}
    if scalars_on_device:
        pointers |= dict.fromkeys(gpu.SCALARS, "*fp32") | {"device_step": "*i64"}
    else:
        absent |= set(gpu.SCALARS)
    pointers |= {"mus": ("i64",) * averages}
    names = {"PARAM": param, "GRAD": grad, "REAL": F32, "ROUNDED": rounded}
    constants = {name: gpu.triton_dtype(dtype) for name, dtype in names.items()}
    constants |= {"MANY": many, "MAXIMIZE": False, "DECAYS": True, "STOCHASTIC": False}
    constants |= {"MOVES": "asks" if scalars_on_device or averages > 1 else "moves"}
    constants |= {"BLOCK": gpu.BLOCK, "SMALL": gpu.SMALL} | dict.fromkeys(absent)
    return compiled_for(target, gpu.update_kernel, pointers, constants)


def build_averaging(target, param, averages):
    """The pass for averages beside any optimizer, of many parameters, compiled."""
    from dist_asgd.kernels import gpu, gpu_averaging

    pointers = {"param": "*i64", "averages": ("i64",) * averages, "mus": ("i64",) * averages}
    constants = {"PARAM": gpu.triton_dtype(param), "REAL": gpu.triton_dtype(F32), "MANY": True}
    constants |= {"BLOCK": gpu.BLOCK, "SMALL": gpu.SMALL}
    return compiled_for(target, gpu_averaging.averaging_kernel, pointers, constants)


def build_packing(target):
    """The packing of many fp32 gradients that are sent in bf16, compiled."""
    from dist_asgd.kernels import gpu, gpu_packing

    pointers = {"param": "*i64", "grad": "*i64", "out": "*bf16"}
    constants = {"GRAD": gpu.triton_dtype(F32), "WIRE": gpu.triton_dtype(BF16), "MANY": True}
    constants |= {"BLOCK": gpu.BLOCK, "SMALL": gpu.SMALL}
    return compiled_for(target, gpu_packing.packing_kernel, pointers, constants)


def pointer_to(dtype):
    return {F32: "*fp32", BF16: "*bf16"}[dtype]


def build_advance(target):
    from dist_asgd.kernels.gpu_schedule import advance_kernel

    pointers = {"step": "*i64", "eta": "*fp32", "mu": "*fp32", "device_lr": "*fp32", "found_inf": "*fp32"}
    return compiled_for(target, advance_kernel, pointers, {})


def compiled_for(target, kernel, pointers, constants):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from dist_asgd.kernels import gpu

    signature = {n: "constexpr" if n in constants else pointers.get(n, "i64") for n in kernel.arg_names}
    source = ASTSource(kernel, signature, constants)
    return triton.compile(source, target=GPUTarget(*target), options=gpu.OPTIONS)


def count_compilations():
    """As on a GPU, by Triton's own launcher up to the launch: how often steps with different numbers compile."""
    import triton
    from triton.backends.compiler import GPUTarget

    from dist_asgd.kernels import gpu

    class Driver:
        def get_current_target(self):
            return GPUTarget(*TARGETS["sm_90"])

        def get_current_device(self):
            return 0

        def get_current_stream(self, device=0):
            return 0

    class Compiling:
        def __getitem__(self, grid):
            return lambda *arguments, **options: compiled.add(kernel.warmup(*arguments, grid=grid, **options).hash)

    triton.runtime.driver.set_active(Driver())
    counts = []
    kernel, gpu.update_kernel = gpu.update_kernel, Compiling()
    # The last mus have bits that are no multiples of 16.
    several = ((0.5, 1.0), (1.0, 0.5), (1 / 3, 0.1))
    for layouts, choices in ((("one", "one, not aligned"), [(0.5,)]), (("many",), [(0.5,)]), (("many",), several)):
        compiled = set()
        for layout, eta, step, mus in itertools.product(layouts, (0.0, 0.07, 1.0), (1, 2, 16), choices):
            case = Case(DTYPES["float32"], layout, averages=len(mus))
            case.by_kernel(options(lambd=eta), Scalars(step, eta, mus))
        counts.append(len(compiled))
    gpu.update_kernel = kernel
    return counts


def compile_into(folder):
    """Writes assembly, and the binary for NVIDIA's, into files named by target, dtypes and number of parts."""
    print(json.dumps(count_compilations()))
    for (target, facts), (name, dtypes), many in itertools.product(TARGETS.items(), COMPILED.items(), (False, True)):
        if not many and target != "sm_90":
            continue
        result = build(facts, dtypes, many)
        write(result, facts, Path(folder, f"{target}, {name}, {'many' if many else 'one'}"))
    for target, facts in TARGETS.items():
        on_device = build(facts, DTYPES["float32"], True, scalars_on_device=True)
        write(on_device, facts, Path(folder, f"{target}, float32, scalars on the device"))
        write(build_advance(facts), facts, Path(folder, f"{target}, advance"))
        write(build_packing(facts), facts, Path(folder, f"{target}, float32, sent in bfloat16"))
        three = build(facts, DTYPES["float32"], True, averages=3)
        write(three, facts, Path(folder, f"{target}, float32, three averages"))
        for name, param in AVERAGED.items():
            write(build_averaging(facts, param, 2), facts, Path(folder, f"{target}, {name}, two averages alone"))


def write(result, target, file):
    file.with_suffix(".s").write_text(result.asm["ptx" if target[0] == "cuda" else "amdgcn"])
    if target[0] == "cuda":
        file.with_suffix(".cubin").write_bytes(result.asm["cubin"])


if __name__ == "__main__":
    if sys.argv[1] == "interpret":
        interpret()
    else:
        compile_into(sys.argv[2])
