"""Steps whose collectives are NCCL's, by one rank that sends to itself."""

import pytest
import torch

from tests.support.one_rank import CASES, trains_as_torch
from tests.support.ranks import run_alone

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True, scope="module")
def _gpu() -> None:
    if not run_alone(torch.cuda.is_available):  # in a child: CUDA does not survive a fork
        pytest.skip("there is no CUDA GPU")


@pytest.mark.parametrize("case", CASES)
def test_steps_have_the_bits_of_torch(case: str) -> None:
    assert run_alone(trains_as_torch, torch.device("cuda", 0), case, timeout=300) >= 1
