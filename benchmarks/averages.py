"""Time of moving averages of parameters, ours beside PyTorch's, and beside a plain pass over as many bytes.

    python -m benchmarks.averages --sizes 1x1e8 10000x64

A size is the number of parameters x the elements of each, fp32. The contestants take turns of five calls, so that a
disturbance of the machine meets all of them; the figure is the least. "plain pass" is a loop in C that adds one vector
to one or two others: it moves 12 bytes an element with one average, 20 with two. "foreach" is ``torch._foreach_lerp_``
for each average, "AveragedModel" is torch.optim.swa_utils.AveragedModel with ``get_ema_multi_avg_fn``. Ours is
``ShardedAverages.update()``; "its pass" is the pass over memory in it (``move_averages_``, kernels/averaging.py).

The second table is a training step: torch.optim.AdamW(fused=True) alone, and with ``ShardedAverages`` that follows it.
The third is the step of ShardedASGD with one average and with two. It moves 20 and 28 bytes an element.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from benchmarks.table import print_table, write_json_lines
from benchmarks.update import size
from dist_asgd import EMA, ShardedASGD, ShardedAverages, Uniform
from dist_asgd.kernels.averaging import move_averages_
from dist_asgd.kernels.tensor_list import TensorList

COLUMNS = {
    "size": "parameters x elements",
    "averages": "averages",
    "ours": "ours, ms",
    "ours_pass": "its pass, ms",
    "plain": "plain pass, ms",
    "foreach": "foreach, ms",
    "averaged_model": "AveragedModel, ms",
    "ours_over_plain": "ours/plain pass",
    "ours_over_foreach": "ours/foreach",
    "ours_over_averaged_model": "ours/AveragedModel",
}
BESIDE_COLUMNS = {
    "size": "parameters x elements",
    "adamw": "AdamW(fused), ms",
    "with_average": "with an average, ms",
    "plain": "plain pass, ms",
    "ratio": "with/without",
    "floor": "floor: (AdamW + plain pass)/AdamW",
}
STEP_COLUMNS = {
    "size": "parameters x elements",
    "one": "step with one average, ms",
    "two": "with two, ms",
    "two_over_one": "two/one",
}
TURN = 5  # calls
DECAY = 0.999
PLAIN = """
#include <stdint.h>
void plain(const float *restrict p, float *restrict a, float *restrict b, int64_t numel, int64_t threads) {
    if (b) {
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t i = 0; i < numel; i++) { a[i] += p[i]; b[i] += p[i]; }
    } else {
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t i = 0; i < numel; i++) a[i] += p[i];
    }
}
"""


def main() -> None:
    options = _arguments()
    torch.set_num_threads(options.threads)
    rows = [_row(*one, averages, options.turns) for one in options.sizes for averages in (1, 2)]
    beside = [_beside_row(*one, options.turns) for one in options.beside_sizes]
    steps = [_step_row(*one, options.turns) for one in options.step_sizes]
    print(f"\nfp32, {options.threads} threads, one process, least of {options.turns * TURN} calls\n")
    print_table(rows, COLUMNS)
    print("\nA step of AdamW\n")
    print_table(beside, BESIDE_COLUMNS)
    print("\nShardedASGD\n")
    print_table(steps, STEP_COLUMNS)
    write_json_lines(options.json, [*rows, *beside, *steps])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.averages", description=__doc__.splitlines()[0])
    sizes = [(1, 10**8), (300, 10**5), (10_000, 64)]
    parser.add_argument("--sizes", type=size, nargs="+", default=sizes, metavar="COUNTxELEMENTS")
    parser.add_argument("--beside-sizes", type=size, nargs="+", default=[(60, 10**6)], metavar="COUNTxELEMENTS")
    parser.add_argument("--step-sizes", type=size, nargs="+", default=[(1, 10**7)], metavar="COUNTxELEMENTS")
    parser.add_argument("--turns", type=int, default=8, help="timed ones of each contestant, of five calls")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, default=Path(__file__).with_name("averages.jsonl"), metavar="FILE")
    return parser.parse_args()


def _row(count: int, numel: int, averages: int, turns: int) -> dict[str, Any]:
    params = torch.nn.ParameterList([torch.randn(numel) for _ in range(count)])
    plain = [param.detach() for param in params]
    parts = TensorList.of(plain, range(0, count * numel, numel))
    own = [torch.randn(count * numel) for _ in range(averages)]
    listed = [list(average.view(count, numel)) for average in own]
    flat = torch.randn(count * numel)
    models = [AveragedModel(params, multi_avg_fn=get_ema_multi_avg_fn(DECAY)) for _ in range(averages)]
    pass_over = functools.partial(_plain_pass(), flat, own)

    def foreach() -> None:
        for average in listed:
            torch._foreach_lerp_(average, plain, 1 - DECAY)

    def averaged_model() -> None:
        for model in models:
            model.update_parameters(params)

    kinds = dict([("ema", EMA(DECAY)), ("mean", Uniform())][:averages])
    contestants = {
        "ours": ShardedAverages(params.named_parameters(), kinds).update,
        "ours_pass": lambda: move_averages_(parts, own, [1 - DECAY] * averages),
        "plain": pass_over,
        "foreach": foreach,
        "averaged_model": averaged_model,
    }
    times = _least(contestants, turns)
    ratios = {
        f"ours_over_{name}": round(times["ours"] / times[name], 2) for name in times if not name.startswith("ours")
    }
    milliseconds = {name: round(taken, 2) for name, taken in times.items()}
    return {"size": f"{count:,} x {numel:,}", "averages": averages, **milliseconds, **ratios}


def _beside_row(count: int, numel: int, turns: int) -> dict[str, Any]:
    alone, followed = (torch.optim.AdamW(_with_gradients(count, numel), lr=1e-3, fused=True) for _ in range(2))
    named = [(str(number), param) for number, param in enumerate(followed.param_groups[0]["params"])]
    _averages = ShardedAverages(named, EMA(DECAY), optimizer=followed)
    vectors = [torch.randn(count * numel) for _ in range(2)]
    pass_over = functools.partial(_plain_pass(), vectors[0], vectors[1:])
    times = _least({"adamw": alone.step, "with_average": followed.step, "plain": pass_over}, turns)
    milliseconds = {name: round(taken, 2) for name, taken in times.items()}
    ratio, floor = (times[key] / times["adamw"] for key in ("with_average", "plain"))
    return {"size": f"{count:,} x {numel:,}", **milliseconds, "ratio": round(ratio, 2), "floor": round(1 + floor, 2)}


def _with_gradients(count: int, numel: int) -> list[torch.nn.Parameter]:
    params = [torch.nn.Parameter(torch.randn(numel)) for _ in range(count)]
    for param in params:
        param.grad = torch.randn(numel)
    return params


def _step_row(count: int, numel: int, turns: int) -> dict[str, Any]:
    kinds = {"mean": Uniform(), "ema": EMA(DECAY)}
    contestants = {"one": _step({"mean": Uniform()}, count, numel), "two": _step(kinds, count, numel)}
    times = _least(contestants, turns)
    milliseconds = {name: round(taken, 2) for name, taken in times.items()}
    return {"size": f"{count:,} x {numel:,}", **milliseconds, "two_over_one": round(times["two"] / times["one"], 2)}


def _step(kinds: Mapping[str, Any], count: int, numel: int) -> Callable[[], None]:
    optimizer = ShardedASGD(_with_gradients(count, numel), lr=1e-3, average=kinds)

    def take_step() -> None:
        optimizer.step()

    return take_step


@functools.cache
def _plain_pass() -> Callable[[Tensor, list[Tensor]], None]:
    """Compiles the plain pass. It adds a vector to each of one or two others."""
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "plain.c"), Path(folder, "plain.so")
        source.write_text(PLAIN)
        command = ["cc", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", str(source), "-o", str(library)]
        subprocess.run(command, check=True)
        function = ctypes.CDLL(str(library)).plain
    function.argtypes = [*[ctypes.c_void_p] * 3, ctypes.c_int64, ctypes.c_int64]
    function.restype = None

    def run(vector: Tensor, others: list[Tensor]) -> None:
        first, second = [other.data_ptr() for other in others] + [None] * (2 - len(others))
        function(vector.data_ptr(), first, second, vector.numel(), torch.get_num_threads())

    return run


def _least(contestants: Mapping[str, Callable[[], None]], turns: int) -> dict[str, float]:
    """Returns the least time of a call of each contestant, in milliseconds."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(1 + turns):
        for name, call in contestants.items():
            taken = [_timed(call) for _ in range(TURN)]
            if turn:  # the first warms up: averages start in it
                seconds[name] += taken
    return {name: 1e3 * min(taken) for name, taken in seconds.items()}


def _timed(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
