"""Every dtype of the installed torch comes back bit for bit, or is refused at the save, on every rank, by key."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

import dist_asgd
from dist_asgd.checkpoint import CheckpointError
from dist_asgd.checkpoint.format.dtypes import DTYPES
from dist_asgd.checkpoint.format.tensor_bytes import as_bits
from tests.support.ranks import message_of, run_alone, run_ranks

ALL = {value for value in vars(torch).values() if isinstance(value, torch.dtype)}
REFUSED = ALL - set(DTYPES.values())
BYTES = bytes(range(256)) * 256  # with every bit pattern of one byte


def patterned(dtype: torch.dtype) -> dict[str, Tensor]:
    """Returns tensors of a dtype with the bits of ``BYTES``: matrices, a scalar, a small tensor and an empty one."""
    flat = torch.frombuffer(bytearray(BYTES), dtype=torch.uint8).view(dtype)
    flat = flat & 1 > 0 if dtype is torch.bool else flat
    matrix = flat[: flat.numel() // 77 * 77].view(77, -1)
    return {"whole": matrix, "columns": matrix.t(), "scalar": flat[3], "none": flat[:0], "small": flat[:7]}


def same_bits(one: Tensor, other: Tensor) -> bool:
    sides = [as_bits(tensor).contiguous().view(-1).view(torch.uint8) for tensor in (one, other)]
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*sides)


def save_and_load(rank: int, folder: Any) -> None:
    state = {name: patterned(dtype) for name, dtype in DTYPES.items()}
    dist_asgd.save(f"{folder}/once", state)
    with dist_asgd.Checkpointer(f"{folder}/run") as checkpointer:
        checkpointer.save(1, state, wait=False)  # by way of a copy
    by_dcp = {name: {key: torch.empty_like(tensor) for key, tensor in part.items()} for name, part in state.items()}
    dcp.load(by_dcp, checkpoint_id=f"{folder}/once")
    into = {name: {key: torch.empty_like(tensor) for key, tensor in part.items()} for name, part in state.items()}
    dist_asgd.load(f"{folder}/once", into)
    fresh: dict[str, Any] = {}
    with dist_asgd.Checkpointer(f"{folder}/run") as checkpointer:
        checkpointer.load(fresh)
    for found in (by_dcp, into, fresh):
        for name, part in state.items():
            assert all(same_bits(tensor, found[name][key]) for key, tensor in part.items()), name


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_what_is_in_the_list_comes_back(tmp_path):
    run_ranks(2, save_and_load, tmp_path)


def refuse(rank: int, folder: Any) -> None:
    with dist_asgd.Checkpointer(f"{folder}/run") as checkpointer:
        for dtype in sorted(REFUSED, key=str):
            odd = torch.empty(4, dtype=dtype) if rank else torch.zeros(4)
            state = {"model": {"w": odd}}
            for act in (
                lambda state=state: checkpointer.save(1, state),
                lambda state=state: checkpointer.save(1, state, wait=False),
                lambda state=state: dist_asgd.save(f"{folder}/once", state),
            ):
                message = message_of(act, TypeError)
                assert "rank 1: model.w is a tensor of " + str(dtype) in message, message
                assert ("int_repr()" if "qu" in str(dtype) or "qi" in str(dtype) else "view(torch.uint8)") in message
        assert checkpointer.steps() == []
    dist.barrier()


@pytest.mark.filterwarnings("ignore:.*quantized tensor creation functions")
def test_all_others_are_refused_on_every_rank(tmp_path):
    assert {torch.int1, torch.uint7, torch.qint8, torch.quint2x4} <= REFUSED
    run_ranks(2, refuse, tmp_path)


def way_out(folder: Any) -> None:
    nibbles = torch.arange(8, dtype=torch.uint8).view(torch.int4)
    dist_asgd.save(folder, {"w": nibbles.view(torch.uint8)})
    found = torch.zeros(8, dtype=torch.uint8).view(torch.int4)
    dist_asgd.load(folder, {"w": found.view(torch.uint8)})
    assert torch.equal(found.view(torch.uint8), nibbles.view(torch.uint8))


def test_the_way_out_that_the_error_names(tmp_path):
    run_alone(way_out, tmp_path / "checkpoint")


class WithState(torch.nn.Module):
    def __init__(self, state: Any) -> None:
        super().__init__()
        self.state = state

    def get_extra_state(self) -> Any:
        return self.state

    def set_extra_state(self, state: Any) -> None:
        self.state = state


def refuse_names(rank: int, folder: Any) -> None:
    deep: Any = torch.zeros(1)
    for _ in range(250):
        deep = {"a": deep}
    circle: dict[str, Any] = {}
    circle["a"] = {"b": [circle]}
    for state in (deep, circle):
        message = message_of(lambda state=state: dist_asgd.save(f"{folder}/deep", state), ValueError)
        assert "contains itself, or is more than 200 names deep" in message
    mixed = {"model": WithState({"b": torch.zeros(1)} if rank else 7)}
    message = message_of(lambda: dist_asgd.save(f"{folder}/mixed", mixed), CheckpointError)
    assert "['model', '_extra_state', 'b'] is in another one, at ['model', '_extra_state']" in message


def test_a_state_whose_manifest_could_not_be_read_is_refused_at_the_save(tmp_path):
    run_ranks(2, refuse_names, tmp_path)
    assert list(tmp_path.iterdir()) == []
