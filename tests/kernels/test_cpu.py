"""The update in one pass over memory: its bits, and what happens where it cannot be had."""

import itertools
import re
import shutil
import stat
import subprocess
import sys
import textwrap
from array import array
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dist_asgd import ShardedASGD
from dist_asgd.asgd.rounding import Rounding, compute_dtype
from dist_asgd.asgd.rule import low_precision_step_
from dist_asgd.asgd.schedule import Hyperparameters, Scalars
from dist_asgd.kernels.cpu import native_update
from dist_asgd.kernels.tensor_list import Gradients, SliceStep, TensorList, UpdateKind
from tests.support.oracle import MIXED, PLAIN, Pair, make_parameters, random_gradients
from tests.support.ranks import run_alone, run_ranks

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
CASES = [
    (param, grad, has_master, Rounding(param))
    for param in DTYPES
    for grad in dict.fromkeys((param, compute_dtype(param)))
    for has_master in ((False, True) if compute_dtype(param) != param else (False,))
]
# Parameters that travel in a narrower dtype, and those that are rounded by chance.
CASES += [(torch.float32, torch.float32, True, Rounding(wire)) for wire in (torch.bfloat16, torch.float16)]
CASES += [(torch.float64, torch.float64, True, Rounding(wire)) for wire in (torch.bfloat16, torch.float32)]
BY_CHANCE = Rounding(torch.bfloat16, 77, 2**32 - 50)
CASES += [(torch.bfloat16, grad, False, BY_CHANCE) for grad in (torch.bfloat16, torch.float32)]
MUS = ((), (1.0,), (0.3,), (0.3, 1.0, 0.7))  # of each average
# By threads. Of two, one part lies across the middle of all, where their work meets. Some parts are empty, some no
# multiple of a vector.
SIZES = {1: [1, 0, 33, 64, 4001, 7, 31, 0, 4096, 300], 2: [1, 0, 33, 64, 40_001, 7, 31, 0, 4096, 30_000]}


def scattered(sizes: list[int], dtype: torch.dtype, generator: torch.Generator) -> list[torch.Tensor]:
    """Parts that lie in tensors of their own, every other one not at a multiple of 16 bytes."""
    whole = [torch.randn(n + 1, generator=generator).to(dtype) for n in sizes]
    return [tensor[1:] if index % 2 else tensor[:-1] for index, tensor in enumerate(whole)]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("param", "grad", "has_master", "rounding"), CASES, ids=str)
def test_one_pass_has_the_bits_of_the_operators(
    param: torch.dtype, grad: torch.dtype, has_master: bool, rounding: Rounding, threads: int
) -> None:
    update = native_update(UpdateKind(param, grad, has_master, rounding.dtype, rounding.seed is not None))
    if update is None:
        pytest.skip("NO C COMPILER HERE, or one that makes other bits: the update in one pass was not tested")

    def alone() -> None:
        torch.set_num_threads(threads)
        generator, wide = torch.Generator().manual_seed(1), compute_dtype(param)
        starts = list(itertools.accumulate((n + 8 for n in SIZES[threads]), initial=0))
        options = list(itertools.product((False, True), (0.0, 0.1), MUS, (0.0, 1e-2)))
        for maximize, decay, mus, lambd in options[:: {1: 3, 2: 5}[threads]]:
            h = Hyperparameters(lr=0.1, lambd=lambd, alpha=0.75, t0=0.0, weight_decay=decay, maximize=maximize)
            scalars = Scalars(3, 0.07, mus)
            params, grads = (scattered(SIZES[threads], dtype, generator) for dtype in (param, grad))
            for p in params[::3]:  # what the last step has left
                p.copy_(p.to(rounding.dtype))
            master, *averages = torch.randn(1 + len(mus), starts[-1], generator=generator).to(wide)
            for p, start in zip(params, starts, strict=False):  # some follow their parameters, some are out of date
                master[start : start + len(p) // 2 * 2 : 2] = p[: len(p) // 2 * 2 : 2].to(wide)
            expected_params = [p.clone() for p in params]
            expected_master, *expected_averages = (tensor.clone() for tensor in (master, *averages))
            for p, g, start in zip(expected_params, grads, starts, strict=False):
                where = slice(start, start + len(p))
                own = [average[where] for average in expected_averages]
                master_of = expected_master[where] if has_master else None
                low_precision_step_(p, g, own, master_of, h, scalars, replace(rounding, first=rounding.first + start))
            parts = TensorList.of(params, starts[:-1])
            step = SliceStep(averages, master if has_master else None, h, scalars, rounding)
            update(parts, Gradients.of(grads), step)
            own, expected = [*params, master, *averages], [*expected_params, expected_master, *expected_averages]
            assert all(map(torch.equal, own, expected)), (h, mus)

    run_alone(alone)


def test_without_a_fitting_dtype_there_is_none() -> None:
    assert native_update(UpdateKind(torch.float32, torch.float16, False, torch.float32, False)) is None
    assert native_update(UpdateKind(torch.complex64, torch.complex64, False, torch.complex64, False)) is None


def test_addresses_are_those_of_the_elements() -> None:
    complex_one = torch.zeros(6, dtype=torch.complex64)[2:5]
    parts = TensorList.of([complex_one], [4])
    assert parts.numels == array("q", [6]) and parts.starts == array("q", [8])
    assert parts.addresses == array("q", [complex_one.data_ptr()])


PROGRAM = textwrap.dedent("""
    import logging, os, sys, torch
    logging.basicConfig(format="%(levelname)s %(message)s")
    from dist_asgd import ShardedASGD

    def trained(make):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(n).to(dtype)) for n in (5, 300, 70_000) for dtype in DTYPES]
        optimizer = make(params)
        for step in range(6):
            for p in params:
                p.grad = torch.randn(p.shape).to(p.dtype)
            optimizer.step()
        return params

    DTYPES = (torch.float32, torch.float64)
    torchs = trained(lambda params: torch.optim.ASGD(params, lr=0.1, t0=2, foreach=False))
    for path in sys.argv[1:]:  # in a child, which has compiled nothing so far
        pid = os.fork()
        if pid == 0:
            os.environ["PATH"] = path
            ours = trained(lambda params: ShardedASGD(params, lr=0.1, t0=2))
            os._exit(0 if all(map(torch.equal, ours, torchs)) else 1)
        print("exit status", os.waitpid(pid, 0)[1], file=sys.stderr, flush=True)
""")

COMPILERS = {
    "none": (None, "no C compiler found (cc, gcc, clang)"),
    "fails": ("echo it is broken >&2; exit 1", "cc failed"),
    "makes no library": ("for last; do :; done; : >$last", "cc failed"),
    # Other bits: it contracts what PyTorch's operators round twice.
    "contracts": ('exec gcc "$@" -ffp-contract=fast', "differs from PyTorch's operators"),
}


@pytest.fixture(scope="module")
def stderr_of(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What training says, by compiler; one process imports torch for all of them."""
    paths = []
    for compiler, _ in COMPILERS.values():
        folder = tmp_path_factory.mktemp("compiler")
        if compiler is not None:
            (folder / "cc").write_text(f"#!/bin/sh\n{compiler}\n")
            (folder / "cc").chmod(stat.S_IRWXU)
        paths.append(str(folder) if compiler is None or "gcc" not in compiler else f"{folder}:/usr/bin:/bin")
    environment = {"PATH": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", PROGRAM, *paths]
    done = subprocess.run(
        command,
        cwd=tmp_path_factory.mktemp("work"),  # a compiler may write there
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
        check=True,
    )
    parts = re.split(r"(?<=exit status )(\d+)\n", done.stderr)
    return dict(zip(COMPILERS, map("".join, zip(parts[::2], parts[1::2], strict=False)), strict=True))


@pytest.mark.parametrize("compiler", COMPILERS)
def test_without_a_compiler_that_does_it_operators_do_and_it_is_said_once(
    compiler: str, stderr_of: dict[str, str]
) -> None:
    if compiler == "contracts" and shutil.which("gcc") is None:
        pytest.skip("NO C COMPILER HERE")
    stderr, said = stderr_of[compiler], COMPILERS[compiler][1]
    assert stderr.endswith("exit status 0"), "other bits than torch's"
    assert said in stderr and "PyTorch's operators are used instead" in stderr
    assert stderr.count(said) == (2 if "differs" in said else 1), "once; what differs, for each dtype"


CONSTRUCTION = textwrap.dedent("""
    import logging, torch
    logging.basicConfig(format="%(levelname)s %(name)s %(message)s", level=logging.INFO)
    from dist_asgd import ShardedASGD
    logging.info("imported")
    for _ in range(2):
        ShardedASGD([torch.nn.Parameter(torch.ones(5))], lr=0.1)
""")


def test_a_compiler_that_runs_is_told_in_the_log(tmp_path: Path) -> None:
    """The optimizer's constructor starts it: once for each file, by name, with what it is for and how long it took."""
    if shutil.which("gcc") is None:
        pytest.skip("NO C COMPILER HERE")
    (tmp_path / "cc").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\nexec gcc "$@"\n')
    (tmp_path / "cc").chmod(stat.S_IRWXU)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", CONSTRUCTION]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=True)
    before, after = done.stderr.split("imported")
    said = re.findall(rf"INFO dist_asgd compiled (\S+) by {tmp_path}/cc in \d+\.\d s for (.*)", after)
    files = sorted(file for file, _ in said)
    assert "compiled" not in before and files in (["cpu.c", "scan.c"], ["cpu.c"]), done.stderr
    assert all(purpose.endswith("; results have the same bits without it") for _, purpose in said)
    assert len((tmp_path / "calls").read_text().splitlines()) == len(said)


@pytest.mark.parametrize("gradients", ["local", "reduced"])
@pytest.mark.parametrize("world_size", [1, 3])
def test_operators_alone_have_the_same_bits(world_size: int, gradients: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All the rest of these tests runs the update in one pass, where there is a compiler."""
    monkeypatch.setattr("dist_asgd.kernels.dispatch.native_update", lambda *dtypes: None)

    def ranks(rank: int) -> None:
        for specs in (PLAIN, MIXED):
            pair = Pair(make_parameters(specs), lr=0.1, t0=3, weight_decay=0.1, gradients=gradients)
            for step in range(12):
                pair.backward(random_gradients(specs, world_size, step))
                pair.step()
                pair.zero_grad()
            pair.check(specs)

    run_ranks(world_size, ranks)


@pytest.mark.parametrize("lazily", ["conjugated", "negated", "expanded", "transposed"])
def test_gradients_that_are_views_are_read_as_what_they_show(lazily: str) -> None:
    """A lazily negated tensor, such as the imaginary part of a conjugate, has other values in memory."""

    def alone() -> None:
        torch.manual_seed(0)
        is_complex = lazily == "conjugated"
        dtype = torch.complex64 if is_complex else torch.float32
        params = [torch.nn.Parameter(torch.randn(6, 6, dtype=dtype)) for _ in range(3)]
        twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
        optimizer = ShardedASGD(params, lr=0.1, t0=0)
        oracle = torch.optim.ASGD(twins, lr=0.1, t0=0, foreach=False)
        for _ in range(4):
            for p, twin in zip(params, twins, strict=True):
                grad = {
                    "conjugated": lambda: torch.randn(6, 6, dtype=dtype).conj(),
                    "negated": lambda: torch.randn(6, 6, dtype=torch.complex64).conj().imag,
                    "expanded": lambda: torch.randn(1, 6).expand(6, 6),
                    "transposed": lambda: torch.randn(6, 6).t(),
                }[lazily]()
                assert lazily != "negated" or grad.is_neg()
                p.grad, twin.grad = grad, grad.clone()
            optimizer.step()
            oracle.step()
            assert all(map(torch.equal, params, twins))

    run_alone(alone)
