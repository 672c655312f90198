"""Tensors saved by rows and loaded by columns from a store: what several ranks need is read once, by one of them."""

from collections.abc import Mapping
from typing import Any

import fsspec
import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import dist_asgd
from dist_asgd.checkpoint import CheckpointError
from dist_asgd.checkpoint.loading import exchange
from tests.support import counting_proxy as counting
from tests.support.oracle import same_bits
from tests.support.ranks import message_of, run_ranks
from tests.support.stores import *  # noqa: F403 fixtures

SHAPES: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
    "large": ((700, 1000), torch.float32),
    "odd": ((37, 11, 5), torch.bfloat16),
    "narrow": ((301, 3), torch.complex64),
    "wide": ((2, 9001), torch.float64),
    "empty": ((0, 4), torch.float32),
    "1-d": ((77,), torch.int64),
}


def values() -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    return {name: (100 * torch.randn(shape)).to(dtype) for name, (shape, dtype) in SHAPES.items()}


def placed(dim: int, world_size: int, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    mesh = init_device_mesh("cpu", (world_size,))
    return {name: distribute_tensor(x, mesh, [Shard(min(dim, x.ndim - 1))]) for name, x in tensors.items()}


def saved(server: Any, ranks: int) -> str:
    url = f"{server.new_url()}/rows"

    def save(rank: int) -> None:
        dist_asgd.save(url, {"x": placed(0, ranks, values())}, server.options)

    run_ranks(ranks, save)
    return url


@pytest.mark.parametrize(("saving", "loading"), [(1, 2), (3, 4)])
def test_columns_are_read_once_and_have_their_bits(
    s3_server: Any, saving: int, loading: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange, "EXCHANGE_BYTES", 100_000)
    url = saved(s3_server, saving)

    def load(rank: int, options: Any) -> None:
        state = placed(1, loading, {name: torch.zeros_like(x) for name, x in values().items()})
        dist_asgd.load(url, {"x": state}, options)
        for name, expected in placed(1, loading, values()).items():
            assert same_bits(state[name].to_local(), expected.to_local()), name

    with counting.proxied(s3_server.address, s3_server.options, 0.0) as (proxy, through):
        before = proxy.traffic()
        run_ranks(loading, load, through)
        sent = proxy.traffic().since(before).sent
    # The manifest, pieces that end within a block, and headers are most of what is above.
    assert sent < 1.1 * sum(x.nbytes for x in values().values()) + 50_000


def test_damage_in_what_is_shared_is_heard_of_by_all(s3_server: Any) -> None:
    url = saved(s3_server, 2)
    fs = fsspec.filesystem("s3", **s3_server.options)
    path = f"{url.removeprefix('s3://')}/__1_0.distcp"
    data = bytearray(fs.cat_file(path))
    at = bytes(data).index(values()["large"][400].numpy().tobytes())
    data[at + 8] ^= 1
    fs.pipe_file(path, bytes(data))

    def load(rank: int) -> str:
        state = placed(1, 3, {name: torch.zeros_like(x) for name, x in values().items()})
        text = message_of(lambda: dist_asgd.load(url, {"x": state}, s3_server.options), CheckpointError)
        assert not any(x.to_local().any() for x in state.values())
        return text

    texts = run_ranks(3, load)
    assert len(set(texts)) == 1 and "__1_0.distcp" in texts[0] and "x.large" in texts[0], texts
