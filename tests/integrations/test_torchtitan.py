"""torchtitan's container and manager with averages, against torch.optim.ASGD and averages by hand, bit for bit.

torchtitan's Trainer needs a GPU, so a loop of the same calls stands in its place.
"""

from dataclasses import dataclass

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.fsdp import fully_shard
from torchtitan.components.checkpointer import CheckpointManager
from torchtitan.components.optimizer import LRSchedulersContainer, OptimizersContainer, ParamGroupConfig
from torchtitan.distributed.utils import clip_grad_norm_

from dist_asgd import EMA, Uniform
from dist_asgd.integrations.torchtitan import AveragedCheckpoints, AveragedOptimizers
from tests.support.guide import added_lines, run_section
from tests.support.ranks import message_of, run_ranks

pytestmark = pytest.mark.filterwarnings("default")


class Part(nn.Module):
    """A stage of a pipeline: torchtitan gives each the names that it has in the whole model."""

    def __init__(self, number):
        super().__init__()
        self.layers = nn.ModuleDict({str(number): nn.Sequential(nn.Linear(6, 6), nn.Tanh())})

    def forward(self, x):
        for layer in self.layers.values():
            x = layer(x)
        return x


def parts(shard=True, numbers=(0, 1)):
    torch.manual_seed(0)
    made = [Part(number) for number in (0, 1)]
    return [fully_shard(part) if shard else part for part in made if int(next(iter(part.layers))) in numbers]


def groups(name, **options):
    return [ParamGroupConfig(pattern=".*", optimizer_name=name, optimizer_kwargs=options)]


ASGD = {"param_groups": groups("ShardedASGD", lr=0.05, t0=1), "implementation": "for-loop"}
ADAMW = {"param_groups": groups("AdamW", lr=0.01), "implementation": "for-loop"}


class Training:
    """The calls that torchtitan's Trainer makes."""

    def __init__(self, folder, config, model_parts=None, checkpoints=AveragedCheckpoints.Config, **options):
        self.parts, self.step = model_parts or parts(), 0
        self.optimizers = config.build(model_parts=self.parts)
        self.schedulers = LRSchedulersContainer.Config(warmup_steps=0).build(
            optimizers=self.optimizers, training_steps=1000
        )
        self.checkpoints = checkpoints(enable=True, folder=str(folder), interval=2, keep_latest_k=0, **options).build(
            dataloader=None,
            model_parts=self.parts,
            optimizers=self.optimizers,
            lr_schedulers=self.schedulers,
            states={"train_state": self},
            sd_adapter=None,
        )

    def state_dict(self):
        return {"step": self.step}

    def load_state_dict(self, state):
        self.step = state["step"]

    def train(self, steps, last=None, each=lambda: None):
        self.checkpoints.load()
        while self.step < steps:
            self.step += 1
            torch.manual_seed(self.step)
            x = torch.randn(6, 6)
            for part in self.parts:
                x = part(x)
            x.square().mean().backward()
            params = [param for part in self.parts for param in part.parameters()]
            clip_grad_norm_(params, 0.1, foreach=True)
            self.optimizers.step()
            self.schedulers.step()
            self.optimizers.zero_grad()
            each()
            self.checkpoints.save(self.step, last_step=self.step == last)
        return self


def weights_of(model_parts):
    params = [param for part in model_parts for param in part.parameters()]
    return [(p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone() for p in params]


def equal(some, others):
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


class ByHand:
    """The mean of all iterates, as torch computes it, and their EMA(0.5, warmup=False)."""

    def __init__(self, model_parts):
        self.parts, self.steps, self.ax, self.ema = model_parts, 0, (), ()

    def __call__(self):
        self.steps, params = self.steps + 1, weights_of(self.parts)
        self.ax = [a + (p - a) * (1 / self.steps) for a, p in zip(self.ax or params, params, strict=True)]
        self.ema = [a + (p - a) * 0.5 for a, p in zip(self.ema or params, params, strict=True)]


class TorchASGD(OptimizersContainer):
    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        pass

    @staticmethod
    def _resolve_optimizer_factory(name):
        return lambda groups: torch.optim.ASGD([{**group, "fused": None} for group in groups], foreach=False)


def train_on(rank, folder, steps, hand):
    """Trains up to each of `steps` by a new object, which goes on from the last checkpoint; averages equal torch's."""
    for number in steps:
        config = AveragedOptimizers.Config(**ADAMW, average={"mean": Uniform(), "ema": EMA(0.5, warmup=False)})
        ours = Training(folder / "adamw", config).train(number)
        asgd = Training(folder / "asgd", AveragedOptimizers.Config(**ASGD)).train(number)
    by_hand = ByHand(parts())
    by_hand.steps, by_hand.ax, by_hand.ema = hand
    plain = OptimizersContainer.Config(**ADAMW)
    plain = Training(folder / "plain", plain, by_hand.parts, CheckpointManager.Config).train(steps[-1], each=by_hand)
    torchs = TorchASGD.Config(**ASGD)
    torchs = Training(folder / "torch", torchs, None, CheckpointManager.Config).train(steps[-1])
    assert equal(weights_of(ours.parts), weights_of(plain.parts))
    assert equal(weights_of(asgd.parts), weights_of(torchs.parts))
    with ours.optimizers.averaged_parameters(), asgd.optimizers.averaged_parameters():
        assert equal(weights_of(ours.parts), by_hand.ax)
        state = [entry for optimizer in torchs.optimizers for entry in optimizer.state.values()]
        assert equal(weights_of(asgd.parts), [entry["ax"].full_tensor() for entry in state])
    with ours.optimizers.averaged_parameters("ema"):
        assert equal(weights_of(ours.parts), by_hand.ema)
    return by_hand.steps, by_hand.ax, by_hand.ema


def test_resumed_by_two_three_and_one_process_with_the_bits_of_torch(tmp_path):
    hand = run_ranks(2, train_on, tmp_path, (2, 4), (0, (), ()))[0]
    hand = run_ranks(3, train_on, tmp_path, (6,), hand)[0]
    run_ranks(1, train_on, tmp_path, (8,), hand)


def test_the_last_checkpoint_has_the_average_as_a_plain_model(tmp_path):
    """torchtitan's default saves the model alone at the end."""

    def work(rank):
        kinds = {"ema": EMA(0.5), "mean": Uniform()}
        config = AveragedOptimizers.Config(**ADAMW, average=kinds)
        training = Training(tmp_path, config, average="mean").train(4, last=4)
        raw = weights_of(training.parts)
        with training.optimizers.averaged_parameters("mean"):
            average = weights_of(training.parts)
        plain = parts(shard=False)
        saved = {name: value for part in plain for name, value in part.state_dict().items()}
        dcp.load(saved, checkpoint_id=tmp_path / "step-4")
        for part in plain:
            part.load_state_dict(saved, strict=False)
        assert equal(weights_of(plain), average) and not equal(average, raw)
        beside = {"optimizer": {f"averages.mean.{name}": torch.zeros_like(value) for name, value in saved.items()}}
        dcp.load(beside, checkpoint_id=tmp_path / "step-2")

    run_ranks(2, work)


def test_parts_of_different_ranks(tmp_path):
    """As under pipeline parallelism; then one process goes on with both parts."""

    def train(config, folder, numbers, steps):
        optimizers = config.build(model_parts=(model_parts := parts(shard=False, numbers=numbers)))
        state = {"optimizer": optimizers} | {
            name: value for part in model_parts for name, value in part.state_dict().items()
        }
        if steps > 2:
            dcp.load(state, checkpoint_id=folder)
        for step in range(steps - 2, steps):
            for part in model_parts:
                torch.manual_seed(step)
                part(torch.randn(6, 6)).square().mean().backward()
            optimizers.step()
            optimizers.zero_grad()
        if steps == 2:
            dcp.save(state, checkpoint_id=folder)
        return optimizers, model_parts

    def work(rank, numbers, steps):
        found = []
        for kind, config in {"a": {**ADAMW, "average": Uniform()}, "b": ASGD}.items():
            optimizers, model_parts = train(AveragedOptimizers.Config(**config), tmp_path / kind, numbers, steps)
            with optimizers.averaged_parameters():
                found.append(weights_of(model_parts))
        return found

    run_ranks(2, lambda rank: work(rank, (rank,), 2))
    resumed = run_ranks(1, work, (0, 1), 4)[0]

    def uninterrupted(rank):
        found = []
        for config in (AveragedOptimizers.Config(**ADAMW, average=Uniform()), TorchASGD.Config(**ASGD)):
            model_parts = parts(shard=False)
            optimizers, hand = config.build(model_parts=model_parts), ByHand(model_parts)
            for step in range(4):
                for part in model_parts:
                    torch.manual_seed(step)
                    part(torch.randn(6, 6)).square().mean().backward()
                optimizers.step()
                optimizers.zero_grad()
                hand()
            state = [entry for optimizer in optimizers for entry in optimizer.state.values()]
            found.append([entry["ax"] for entry in state] if "ax" in state[0] else hand.ax)
        return found

    for some, others in zip(resumed, run_ranks(1, uninterrupted)[0], strict=True):
        assert equal(some, others)


def test_what_would_lose_averages_is_told(tmp_path, caplog):
    def work(rank):
        plain = OptimizersContainer.Config(**ADAMW)
        refused = [
            message_of(lambda: Training(tmp_path, plain)),
            message_of(lambda: AveragedOptimizers.Config(**ADAMW).build(model_parts=parts())),
        ]
        Training(tmp_path, AveragedOptimizers.Config(**ASGD), None, CheckpointManager.Config).train(1)
        return refused, caplog.text

    (checkpoints, container), text = run_ranks(1, work)[0]
    assert "AveragedCheckpoints is for AveragedOptimizers, got OptimizersContainer" in checkpoints
    assert "needs optimizer_name='ShardedASGD' in every group, found ['AdamW']" in container
    assert text.count("will have the weights and no average") == 1


def test_the_command_line_of_torchtitan_takes_the_configurations():
    import tyro

    config = tyro.cli(AveragedOptimizers.Config, default=AveragedOptimizers.Config(**ADAMW, average=EMA(0.9)), args=[])
    assert config.average == EMA(0.9)
    assert tyro.cli(AveragedCheckpoints.Config, args=["--interval", "7"]).interval == 7


def test_the_guide(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def work(rank):
        names = run_section("torchtitan")
        return names["averaged"], [averages.updates for averages in names["optimizers"].averages]

    assert all(averaged > 0 and updates == [4, 4] for averaged, updates in run_ranks(2, work))
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"step-2", "step-4"}
    assert len(added_lines("torchtitan")) <= 4
