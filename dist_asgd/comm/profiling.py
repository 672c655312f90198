"""Names in traces of ``torch.profiler`` what the library spends time on."""

from __future__ import annotations

import contextlib
from typing import Literal

from torch.profiler import record_function

from dist_asgd._torch_private import is_profiling

NOTHING = contextlib.nullcontext()


def profiled(
    name: Literal["reduce", "update", "gather", "swap", "stage", "write"],
) -> contextlib.AbstractContextManager[object]:
    """Returns a context that traces show as ``dist_asgd.<name>``, and that does nothing where no profiler runs.

    torch's own range takes some microseconds without a profiler too, and a step has several for each bucket.
    """
    return record_function(f"dist_asgd.{name}") if is_profiling() else NOTHING
