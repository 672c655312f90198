"""One state, saved by two ranks: by dcp.save, and by this library. tests/data has what some versions of torch wrote.

The files of a version are made with it by::

    python -m tests.support.saved_state tests/data/torch-2.15.0
"""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.tensor import Shard, distribute_tensor

from dist_asgd import save
from tests.support.ranks import run_ranks


def counted(*shape: int) -> Tensor:
    return torch.arange(torch.Size(shape).numel()).view(shape)


TENSORS = {
    "rows": counted(5, 3).float(),
    "permuted": counted(2, 3, 4).double().mT,
    "channels_last": counted(2, 3, 2, 2).to(torch.bfloat16).contiguous(memory_format=torch.channels_last),
    "expanded": counted(3).half().expand(2, 3),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 2),
    "uint16": counted(7).to(torch.uint16),
}
VALUES = {"epoch": 3, "names": ["a", "b"], "nothing": None, "lr": 0.1}


def state_of_ranks() -> dict[str, Any]:
    """The state with ``rows`` cut between the ranks; every rank must call this."""
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    rows = distribute_tensor(TENSORS["rows"], mesh, [Shard(0)], src_data_rank=None)
    return {"state": {**TENSORS, "rows": rows, **VALUES}}


def by_stock(folder: Path) -> None:
    dcp.save(state_of_ranks(), checkpoint_id=folder / "stock")


def by_us(folder: Path) -> None:
    save(folder / "ours", state_of_ranks())


def by_both(rank: int, folder: Path) -> None:
    by_stock(folder)
    by_us(folder)


if __name__ == "__main__":
    run_ranks(2, by_both, Path(sys.argv[1]))
