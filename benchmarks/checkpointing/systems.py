"""The contestants: this library, and torch.distributed.checkpoint (DCP) with its fsspec classes. State for both."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.tensor import Placement, Shard, distribute_tensor

import dist_asgd
from tests.support.stock_checkpoints import FsspecReader, FsspecWriter

State = Mapping[str, Any]
Options = Mapping[str, Any] | None


class System(Protocol):
    """Saves and loads one checkpoint. Collective."""

    def save(self, url: str, state: State, options: Options) -> None: ...

    def load(self, url: str, state: State, options: Options) -> None: ...


class Ours:
    def save(self, url: str, state: State, options: Options) -> None:
        dist_asgd.save(url, state, options)

    def load(self, url: str, state: State, options: Options) -> None:
        dist_asgd.load(url, state, options)


class Dcp:
    """Its classes for local files where there are no options, those for fsspec otherwise; all defaults."""

    def save(self, url: str, state: State, options: Options) -> None:
        writer = dcp.FileSystemWriter(url) if options is None else FsspecWriter(url, **options)
        dcp.save(_taken_apart(state), storage_writer=writer)

    def load(self, url: str, state: State, options: Options) -> None:
        reader = dcp.FileSystemReader(url) if options is None else FsspecReader(url, **options)
        flat = _taken_apart(state)
        dcp.load(flat, storage_reader=reader)
        for name, part in state.items():
            if isinstance(part, torch.optim.Optimizer):
                part.load_state_dict(flat[name])


SYSTEMS: dict[str, System] = {"ours": Ours(), "DCP": Dcp()}


def _taken_apart(state: State) -> dict[str, Any]:
    warnings.filterwarnings("ignore", module="torch")
    return {
        name: part.state_dict() if isinstance(part, torch.optim.Optimizer) else part for name, part in state.items()
    }


def begin() -> None:
    """This process is a rank; or, if there is one, none."""
    torch.set_num_threads(1)
    if int(os.environ["WORLD_SIZE"]) > 1:
        dist.init_process_group("gloo")


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def end() -> None:
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def make_tensors(megabytes: int, each: int = 8) -> dict[str, Tensor]:
    """fp32 tensors of ``each`` MB, about, with random values, and three scalars for each: an optimizer's state."""
    torch.manual_seed(0)
    columns = 1000 if each >= 4 else 250
    tensors: dict[str, Tensor] = {}
    for number in range(megabytes // each):
        tensors[f"{number}.ax"] = torch.randn(each * 250_000 // columns, columns)
        tensors |= {f"{number}.{name}": torch.tensor(float(number)) for name in ("step", "eta", "mu")}
    return tensors


def placed(tensors: Mapping[str, Tensor], placement: Placement) -> dict[str, Tensor]:
    """The tensors over all ranks, but for scalars; each rank keeps its share of what it has."""
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))

    def share(tensor: Tensor) -> Tensor:
        # The copy lets go of the rest: a share would be a view of the whole.
        return distribute_tensor(tensor, mesh, [placement], src_data_rank=None).clone() if tensor.ndim else tensor

    return {name: share(tensor) for name, tensor in tensors.items()}


def by_rows(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Over all ranks as FSDP2 has them; as they are, where there is one."""
    return placed(tensors, Shard(0)) if dist.is_initialized() else dict(tensors)
