"""Ranks that took different steps under FSDP2, which compares none: no checkpoint gets what they have computed."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dist_asgd import Checkpointer, ShardedASGD, save
from dist_asgd.checkpoint import CheckpointError
from tests.support.failures import one_message, quick_message
from tests.support.layouts import backward, build, train, whole
from tests.support.ranks import run_ranks


def another_lr(rank: int, model: nn.Module, optimizer: ShardedASGD) -> None:
    optimizer.param_groups[0]["lr"] += rank
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.1


def no_gradient(rank: int, model: nn.Module, optimizer: ShardedASGD) -> None:
    if rank:
        model.outside.weight.grad = None
    optimizer.step()


def no_step(rank: int, model: nn.Module, optimizer: ShardedASGD) -> None:
    if rank == 0:
        optimizer.step()


@pytest.mark.parametrize("spoil", [another_lr, no_gradient, no_step])
def test_they_are_not_saved_until_a_state_is_loaded(
    spoil: Callable[[int, nn.Module, ShardedASGD], None], tmp_path: Path
) -> None:
    def ranks(rank: int) -> list[str]:
        model, optimizer = build("fsdp", lr=0.1, t0=0)
        state = {"model": model, "optimizer": optimizer}
        run = Checkpointer(tmp_path / "run")
        train(model, optimizer, "fsdp", range(3))
        run.save(3, state)
        backward(model, "fsdp", 3)
        spoil(rank, model, optimizer)
        optimizer.zero_grad()
        train(model, optimizer, "fsdp", range(4, 6))
        texts = [quick_message(lambda wait=wait: run.save(6, state, wait=wait), CheckpointError) for wait in (1, 0, 1)]
        texts.append(quick_message(lambda: Checkpointer(tmp_path / "new").save(0, state), CheckpointError))
        texts.append(quick_message(lambda: save(tmp_path / "one", state), CheckpointError))
        assert run.steps() == [3]
        texts += [quick_message(optimizer.full_state_dict) for _ in range(2)]
        texts.append(quick_message(lambda: optimizer.averaged_parameters().__enter__()))
        assert run.load(state) == 3
        train(model, optimizer, "fsdp", range(3, 6))
        run.save(6, state)
        assert run.steps() == [3, 6]
        straight, other = build("fsdp", lr=0.1, t0=0)
        train(straight, other, "fsdp", range(6))
        assert all(
            torch.equal(whole(a), whole(b)) for a, b in zip(model.parameters(), straight.parameters(), strict=True)
        )
        return texts

    of_run = ("optimizer: ranks 0 and 1 took different steps", "checkpoint is that of step 3")
    expected = [of_run, of_run, of_run, ("There is no earlier checkpoint",), ("Load an earlier checkpoint",)]
    expected += [("ranks took different steps", "Load an earlier state")] * 3
    for texts, parts in zip(zip(*run_ranks(2, ranks), strict=True), expected, strict=True):
        one_message(list(texts), *parts)


def test_optimizers_of_other_ranks_may_take_other_steps(tmp_path: Path) -> None:
    """Optimizers of one name, for parts of the ranks each."""

    def ranks(rank: int) -> None:
        group = [dist.new_group([member]) for member in range(2)][rank]
        param = nn.Parameter(torch.ones(4))
        optimizer = ShardedASGD([("p", param)], lr=0.1, process_group=group)
        for _ in range(1 + rank):
            param.grad = torch.ones(4)
            optimizer.step()
        save(tmp_path / "one", {"optimizer": optimizer})

    run_ranks(2, ranks)
