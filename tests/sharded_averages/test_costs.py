"""What averages cost a rank, under every layout: bytes held, elements sent, memory of a save."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.optim import AdamW

from dist_asgd import EMA, Checkpointer, ShardedAverages, Uniform
from tests.support.layouts import Model, backward, local, named_parameters, place
from tests.support.memory import map_large_blocks, peak_resident, reachable, reset_peak
from tests.support.ranks import Sent, run_ranks

KINDS = {"ema": EMA(0.9), "mean": Uniform()}
SMALL = 256  # elements of a call that does not grow with the model: agreements, digests
SLACK = 2**25  # resident bytes: blocks that are written, Python's, gloo's; a gather would take 48 MB more


def costs(rank: int, layout: str) -> tuple[int, int]:
    """Returns the bytes of the averages, and the elements that a swap hands to collectives."""
    model = place(layout, Model(0, width=64, hidden=256))
    params = list(named_parameters(model).values())
    optimizer = AdamW(params, lr=0.01, foreach="tp" not in layout)
    averages = ShardedAverages(named_parameters(model).items(), KINDS, start=2, module=model)

    def held() -> int:
        optimizer.zero_grad()
        return reachable([averages, optimizer], model) - reachable(optimizer, model)

    for step in range(3):
        assert held() == 0
        backward(model, layout, step)
        optimizer.step()
        with Sent() as sent:
            averages.update()
        assert sent.sizes == []
    numel, size, padding = sum(param.numel() for param in params), dist.get_world_size(), 32 * 8 * len(params)
    assert held() <= len(KINDS) * 4 * (1.05 * numel + padding) / size  # ranks of FSDP2 differ by a row
    with Sent() as sent, averages.averaged_parameters("mean"):
        swapped_in = sum(elements for elements in sent.sizes if elements > SMALL)
    return held(), swapped_in


@pytest.mark.parametrize(("layout", "world_size"), [("ddp", 2), ("fsdp", 3), ("hsdp", 4), ("tp", 2)])
def test_averages_are_shared_and_an_update_sends_nothing(layout: str, world_size: int) -> None:
    held, swapped = zip(*run_ranks(world_size, costs, layout), strict=True)
    numel = sum(param.numel() for param in Model(0, width=64, hidden=256).parameters())
    assert sum(held) >= len(KINDS) * 4 * numel
    if layout == "fsdp":  # ranks hold different blocks
        assert swapped == (0, 0, 0)
    if (layout, world_size) == ("ddp", 2):  # each rank sends the half that it averages, and receives the other
        assert all(numel <= elements < 1.05 * numel for elements in swapped)


def saves(rank: int, folder: Path) -> tuple[int, int, int]:
    """Returns the bytes of this rank's average, and the growth of memory by a save and by one in the background."""
    torch.set_num_threads(1)
    map_large_blocks()
    torch.manual_seed(0)
    model = nn.Linear(3000, 4000, bias=False)  # 48 MB
    averages = ShardedAverages(model.named_parameters(), EMA(0.9))
    small = ShardedAverages(nn.Linear(3, 3).named_parameters(), EMA(0.9))
    for one in (averages, small):
        one.update()
    grown = []
    with Checkpointer(folder / "run") as checkpoints:
        for step, (one, wait) in enumerate([(small, True), (small, False), (averages, True), (averages, False)], 1):
            dist.barrier()
            start = reset_peak()
            with Sent() as sent:
                checkpoints.save(step, {"averages": one}, wait=wait)
            checkpoints.wait()
            grown.append(peak_resident() - start)
            assert max(sent.sizes) < 10_000, "no tensor is gathered"
    share = sum(local(value).nbytes for value in averages.state_dict()["average"].values())
    return share, *grown[2:]


def test_a_save_stages_a_share_and_gathers_nothing(tmp_path: Path) -> None:
    for share, waited, staged in run_ranks(2, saves, tmp_path):
        assert share == 24 * 10**6
        assert waited < SLACK and staged < share + SLACK
