"""Settings every test needs. The parent of forked ranks stays single-threaded: see ranks.py."""

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
pytest.register_assert_rewrite("tests.support.ranks", "tests.support.oracle")

import torch  # noqa: E402

torch.set_num_threads(1)

from dist_asgd.kernels.cpu import native_update  # noqa: E402
from dist_asgd.kernels.scan import LayoutScan  # noqa: E402
from dist_asgd.kernels.tensor_list import UpdateKind  # noqa: E402

# Compiled once, here: forked ranks have it, and need not compile it each for itself.
for dtype in (torch.float32, torch.float64):
    native_update(UpdateKind(dtype, dtype, False, dtype, False))
for dtype in (torch.bfloat16, torch.float16):
    for gradient in (dtype, torch.float32):
        native_update(UpdateKind(dtype, gradient, True, dtype, False))
        native_update(UpdateKind(dtype, gradient, False, dtype, False))
LayoutScan.of([], [], torch.zeros(0))
