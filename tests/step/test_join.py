"""Ranks with unequally many inputs: ``torch.distributed.algorithms.join.Join``."""

import pytest
import torch
from torch.distributed.algorithms.join import Join
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from dist_asgd import ShardedASGD
from tests.support.oracle import Messenger, check_dense_state, model_gradients, same_bits, tokens_of
from tests.support.ranks import message_of, run_ranks

OPTIONS = {"lr": 0.3, "t0": 1}


def loss_of(model, rank, step):
    return (model(tokens_of(rank, step)) ** 2).mean()


def train_under_ddp(rank, inputs, gradients_options):
    """Returns the models of ours and of torch's ASGD on one rank, and both optimizers, after one epoch."""
    models = [DistributedDataParallel(Messenger(), bucket_cap_mb=1e-3) for _ in range(2)]
    ours = ShardedASGD(models[0].named_parameters(), **OPTIONS, gradients="reduced", bucket_bytes=700)
    torchs = torch.optim.ASGD(models[1].parameters(), **OPTIONS, foreach=False)
    for model, optimizer, joinables in ((models[0], ours, [models[0], ours]), (models[1], torchs, [models[1]])):
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.9)
        with Join(joinables, **gradients_options):
            for step in range(inputs):
                optimizer.zero_grad()
                loss_of(model, rank, step).backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                scheduler.step()
    return models, ours, torchs


@pytest.mark.parametrize("by_initial", [True, False])
@pytest.mark.parametrize("inputs", [(3,), (2, 5), (4, 0, 2), (1, 3, 3, 2)], ids=str)
def test_with_ddp_as_torchs_asgd_with_ddp(inputs, by_initial):
    def ranks(rank):
        options = {"divide_by_initial_world_size": by_initial}
        models, ours, torchs = train_under_ddp(rank, inputs[rank], options)
        assert all(map(same_bits, models[0].parameters(), models[1].parameters()))
        full = ours.full_state_dict()
        last = max(inputs)
        assert ours.state[next(models[0].parameters())]["step"] == last
        if rank == 0 and inputs[0] == last:  # another rank's torch has a state that lags behind
            check_dense_state(full, torchs)
        ours.zero_grad()  # training goes on after the block
        loss_of(models[0], rank, 9).backward()
        ours.step()

    run_ranks(len(inputs), ranks)


@pytest.mark.parametrize("by_initial", [True, False])
@pytest.mark.parametrize("inputs", [(3,), (2, 5), (0, 2), (4, 1, 2, 3)], ids=str)
def test_alone_with_zeros_for_ranks_without_inputs(inputs, by_initial):
    def ranks(rank):
        model, twin = Messenger(), Messenger()
        ours = ShardedASGD(model.named_parameters(), **OPTIONS, bucket_bytes=700)
        torchs = torch.optim.ASGD(twin.parameters(), **OPTIONS, foreach=False)
        scheduler = torch.optim.lr_scheduler.StepLR(torchs, 1, gamma=0.5)
        own = torch.optim.lr_scheduler.StepLR(ours, 1, gamma=0.5)
        with Join([ours], divide_by_initial_world_size=by_initial):
            for step in range(inputs[rank]):
                for part in range(2):
                    loss_of(model, rank, 2 * step + part).backward()
                ours.step()
                ours.zero_grad()
                own.step()
        for step in range(max(inputs)):
            active = [other for other, count in enumerate(inputs) if step < count]
            parts = [[model_gradients(twin, tokens_of(r, 2 * step + part)) for r in active] for part in range(2)]
            for p, *grads in zip(twin.parameters(), *parts[0], *parts[1], strict=True):
                first, second = sum(grads[: len(active)]), sum(grads[len(active) :])
                p.grad = (first + second) / (len(inputs) if by_initial else len(active))
            torchs.step()
            scheduler.step()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            assert same_bits(p, q)
        full = ours.full_state_dict()
        if rank == 0:
            check_dense_state(full, torchs)
        ours.zero_grad()
        loss_of(model, rank, 9).backward()
        ours.step()

    run_ranks(len(inputs), ranks)


def test_what_cannot_join_says_so():
    def ranks(rank):
        model = Messenger()
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        text = message_of(lambda: Join([ShardedASGD(model.named_parameters(), lr=0.1)]), RuntimeError)
        assert "'layers.3.shift'" in text and "FSDP2" in text

        model = DistributedDataParallel(Messenger())
        ours = ShardedASGD(model.named_parameters(), lr=0.1, gradients="reduced")
        with Join([model]):
            pass
        Join([ours])
        loss_of(model, rank, 0).backward()
        assert "Join([ddp_model, optimizer])" in message_of(ours.step, RuntimeError)

        model = Messenger()
        ours = ShardedASGD(model.named_parameters(), lr=0.1)
        with pytest.raises(RuntimeError, match="exhausted"), Join([ours], throw_on_early_termination=True):
            for step in range(1 + rank):
                ours.zero_grad()
                loss_of(model, rank, step).backward()
                ours.step()

    run_ranks(2, ranks)


def test_gradients_changed_where_a_joined_rank_has_a_part_are_refused():
    """A joined rank cannot know of the change, and its part would go into the step unchanged."""

    def ranks(rank):
        model = Messenger()
        ours = ShardedASGD(model.named_parameters(), **OPTIONS, bucket_bytes=700)

        def train():
            with Join([ours]):
                for step in range(1 + rank):
                    loss_of(model, rank, step).backward()
                    for p in model.parameters():
                        p.grad.mul_(0.5)
                    ours.step()
                    ours.zero_grad()

        return message_of(train, RuntimeError)

    first, second = run_ranks(2, ranks)
    assert first == second and "inside Join" in first and "Scale the loss" in first
