"""Checkpoints that other versions of torch wrote are read, and what is written does not depend on the version."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from dist_asgd import load
from tests.support.items import raw_bytes
from tests.support.ranks import run_alone, run_ranks
from tests.support.saved_state import TENSORS, VALUES, by_us

DATA = Path(__file__).parents[1] / "data"
VERSIONS = sorted(path.name for path in DATA.glob("torch-*"))


def fresh() -> dict[str, Any]:
    return {name: torch.zeros_like(tensor) for name, tensor in TENSORS.items()} | dict.fromkeys(VALUES, "")


def check(found: dict[str, Any], where: str) -> None:
    for name, expected in TENSORS.items():
        tensor = found[name].full_tensor() if isinstance(found[name], DTensor) else found[name]
        assert raw_bytes(tensor) == raw_bytes(expected), (where, name)
    assert {name: found[name] for name in VALUES} == VALUES, where


def load_all(rank: int) -> None:
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    for version in VERSIONS:
        for writer in ("stock", "ours"):
            state = fresh()
            state["rows"] = distribute_tensor(state["rows"], mesh, [Shard(0)], src_data_rank=None)
            load(DATA / version / writer, {"state": state})
            check(state, f"{version}/{writer}")


def test_files_of_other_versions_are_read() -> None:
    assert len(VERSIONS) > 1
    run_ranks(3, load_all)


def stock_load_all() -> None:
    for version in VERSIONS:
        state = fresh()
        dcp.load({"state": state}, checkpoint_id=DATA / version / "ours", no_dist=True)
        check(state, version)


def test_stock_pytorch_reads_what_we_wrote_on_other_versions() -> None:
    run_alone(stock_load_all)


@pytest.mark.parametrize("version", VERSIONS)
def test_metadata_has_the_bytes_of_other_versions(version: str, tmp_path: Path) -> None:
    run_ranks(2, lambda rank: by_us(tmp_path))
    assert (tmp_path / "ours/.metadata").read_bytes() == (DATA / version / "ours/.metadata").read_bytes()
