"""What tests of training frameworks share: runs with and without a launcher, and tensors by name."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from tests.support.ranks import run_alone, run_launched


def on(ranks: int, work: Callable[..., Any], *args: Any) -> Any:
    """Returns what `work` returns on rank 0; 0 ranks: one process without a launcher."""
    run = run_alone if ranks == 0 else partial(run_launched, ranks)
    found = run(work, *args, timeout=300)
    return found if ranks == 0 else found[0]


def assert_same(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name
