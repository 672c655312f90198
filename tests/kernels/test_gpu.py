"""The Triton kernel without a GPU: what it computes, by Triton's interpreter, and what it is compiled to."""

import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dist_asgd.asgd.rounding import Rounding
from dist_asgd.kernels.dispatch import fused_update
from dist_asgd.kernels.gpu import triton_update
from dist_asgd.kernels.pointer_tables import DeviceTables
from dist_asgd.kernels.tensor_list import Gradients, TensorList
from tests.support.kernel_cases import COMPILED, INTERPRETED, TARGETS

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="TRITON IS NOT INSTALLED: the GPU kernel is not tested at all"
)


def triton_version():
    return tuple(int(number) for number in importlib.metadata.version("triton").split(".")[:2])


CASES = Path(__file__).parents[1] / "support/kernel_cases.py"

# What a thread loads and stores: 16 of the 2048 elements of a block in vectors of 16 bytes, and 4 of 512 one by one.
# AMD's programs have 64 threads to a warp, so half as many.
VECTORS = {  # elements per thread / elements per vector: parameter, gradient and average; and masters
    "float32": (3 * 4, 2 * 4),
    "bfloat16 with master": (2 * 2 + 2 * 4, 2 + 2 * 4),
}
FMAS = 2 * (16 + 4)  # weight decay and the step itself; averages have none


def run_cases(*arguments, **environment):
    command = [sys.executable, str(CASES), *arguments]
    environment |= {"PYTHONPATH": str(CASES.parents[2])}
    result = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=1200, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def interpreted():
    if triton_version() < (3, 7) and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        pytest.skip("Triton before 3.7 interprets loops by int(array), which NumPy 2.4 refuses: install numpy<2.4")
    printed = run_cases("interpret", TRITON_INTERPRET="1").splitlines()
    return json.loads(printed[-1])  # gloo of torch 2.10 prints lines of its own before


@needs_triton
@pytest.mark.parametrize("name", INTERPRETED)
def test_by_the_interpreter(name, interpreted):
    assert interpreted[name] is None, interpreted[name]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("compiled")
    counts = run_cases("compile", str(path), TRITON_CACHE_DIR=str(path / "cache"))
    (path / "counts").write_text(counts)
    return path


SEVERAL = {  # loads and stores of 16 bytes, and FMAs, of averages beside the first, and beside any optimizer
    ("float32", "three averages"): (5 * 4, 4 * 4, FMAS),
    ("float32", "two averages alone"): (3 * 4, 2 * 4, 0),
    ("bfloat16", "two averages alone"): (2 + 2 * 4, 2 * 4, 0),
    ("float32", "sent in bfloat16"): (4, 2, 0),
}
FORMS = [(target, name, "many") for target in TARGETS for name in COMPILED] + [
    *(("sm_90", name, "one") for name in COMPILED),
    *((target, "float32", "scalars on the device") for target in TARGETS),
    *((target, *several) for target in TARGETS for several in SEVERAL),
]


@needs_triton
@pytest.mark.parametrize(("target", "name", "form"), FORMS)
def test_compiled_code(target, name, form, folder):
    """Loads and stores of 16 bytes, no spills, and no FMA but those of the rule."""
    file = folder / f"{target}, {name}, {form}.s"
    code, (load_count, store_count, fmas) = file.read_text(), SEVERAL.get((name, form)) or (*VECTORS[name], FMAS)
    if target == "gfx942":
        loads, stores = (re.findall(rf"(?:buffer|global)_{way}_dwordx4\b", code) for way in ("load", "store"))
        assert (2 * len(loads), 2 * len(stores)) == (load_count, store_count)
        packed = len(re.findall(r"\bv_pk_fma_f32\b", code))
        assert 2 * (2 * packed + len(re.findall(r"\bv_(?:fma|fmac)_f32", code))) == fmas
        assert re.findall(r"\.[sv]gpr_spill_count: +(\d+)", code) == ["0", "0"]
        assert "scratch_" not in code
        return
    loads, stores = (re.findall(rf"\b{way}\.global\.(?:v4\.b32|v2\.b64)\b", code) for way in ("ld", "st"))
    assert (len(loads), len(stores)) == (load_count, store_count)
    packed = len(re.findall(r"\bfma\.rn\.f32x2\b", code))
    assert 2 * packed + len(re.findall(r"\bfma\.rn\.f32\b", code)) == fmas
    assert not re.search(r"\b(?:fma|mad)\.(?!rn\.f32)\S*f(?:16|32|64)", code)
    assert ".local" not in code
    assert re.search(r"STACK:0 .*LOCAL:0 ", resources(file.with_suffix(".cubin")))


@needs_triton
@pytest.mark.parametrize("target", TARGETS)
def test_scalars_advance_in_double(target, folder):
    code = (folder / f"{target}, advance.s").read_text()
    assert re.search(r"\b(?:fma\.rn\.f64|v_fma_f64)", code)
    assert not re.search(r"\b(?:ex2|lg2|mul|add|sub|fma|div)\.\S*f32|\bv_(?:exp|log|mul|add|fma|rcp|div)\S*_f32", code)


@needs_triton
def test_one_compilation_serves_all_numbers_and_addresses(folder):
    assert json.loads((folder / "counts").read_text()) == [1, 1, 1]


def resources(cubin):
    """Of the machine code: registers, spills."""
    triton = Path(importlib.util.find_spec("triton").origin).parent
    command = [str(triton / "backends" / "nvidia" / "bin" / "cuobjdump"), "-res-usage", str(cubin)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_addresses_are_sent_only_when_they_change():
    parts = TensorList.of(list(torch.zeros(3, 5)), [0, 8, 16])
    tables = DeviceTables(parts, block=4)
    addresses = Gradients.of(list(torch.zeros(3, 5))).addresses
    first = tables.of_grads(addresses)
    assert first.tolist() == list(addresses)
    assert tables.of_grads(addresses[:]) is first
    assert tables.of_grads(addresses[::-1]).tolist() == first.tolist()[::-1]


def test_tables_say_where_every_block_is():
    parts = TensorList.of([torch.zeros(n) for n in (9, 0, 4)], [0, 16, 16])
    tables = DeviceTables(parts, block=4)
    of_parts = [*parts.addresses, 0, 16, 16, 9, 0, 4]
    assert tables.of_parts.tolist() == [
        *of_parts,
        *(part << 32 | block for part, block in ((0, 0), (0, 1), (0, 2), (2, 0))),
    ]
    assert tables.programs == 4


@needs_triton
def test_there_is_one_for_the_dtypes_it_has():
    f32, bf16, f64 = torch.float32, torch.bfloat16, torch.float64
    assert triton_update(f32, f32, f32) is not None and triton_update(f32, f32, bf16) is not None
    assert triton_update(bf16, f32, bf16) is not None
    assert triton_update(f32, f64, f32) is None and triton_update(torch.complex64, torch.complex64, f32) is None


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU that it runs on: see tests/gpu")
def test_where_it_does_not_run_operators_do(caplog):
    """The same call as on a GPU; here, its first tensor cannot be made."""
    f32 = torch.float32
    assert fused_update(torch.device("cuda"), f32, f32, f32, False, Rounding(f32)) is None
    assert "Triton's update does not run on cuda" in caplog.text
    assert fused_update(torch.device("meta"), f32, f32, f32, False, Rounding(f32)) is None
