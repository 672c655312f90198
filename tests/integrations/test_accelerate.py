"""Accelerate: the bits of torch.optim.ASGD, averages beside AdamW, and resuming on other numbers of processes."""

import os
import shutil

import pytest
import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DataLoaderConfiguration, FullyShardedDataParallelPlugin
from safetensors.torch import load_file
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from dist_asgd import EMA, ShardedASGD
from dist_asgd.checkpoint import CheckpointError
from dist_asgd.integrations.accelerate import keep_averages, unwrapped_optimizer
from tests.support.frameworks import assert_same, on
from tests.support.guide import added_lines, run_section

pytestmark = pytest.mark.filterwarnings("ignore")  # of accelerate's and torch's own making; ranks are children
OPTIONS = {"lr": 0.05, "lambd": 1e-3, "t0": 1, "weight_decay": 1e-3}


class Tied(nn.Module):
    """A small language model with tied weights."""

    def __init__(self, tied=True):
        super().__init__()
        self.embedding, self.body = nn.Embedding(16, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 16, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(torch.tanh(self.body(self.embedding(tokens))))


def loss_of(model, tokens):
    return nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


DATA = torch.randint(0, 16, (48, 5), generator=torch.Generator().manual_seed(1))


class Training:
    """A training by Accelerate, with an optimizer of ours or of torch."""

    def __init__(self, build, *, fsdp=False, clip=None, scaler=None, accelerator=None, loader=None):
        os.environ["ACCELERATE_USE_CPU"] = "true"
        AcceleratorState._reset_state()  # else all of a process would have the first one's settings
        GradientState._reset_state()
        self.clip = clip
        files = f"{'FULL' if fsdp == 'full' else 'SHARDED'}_STATE_DICT"
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type=files) if fsdp else None
        plugins = {"fsdp_plugin": plugin} if fsdp else {}
        self.accelerator = Accelerator(**plugins, **(accelerator or {}))
        if fsdp:  # which Accelerate leaves out on CPUs without a word
            PartialState().distributed_type = self.accelerator.state.distributed_type = DistributedType.FSDP
            self.accelerator.state.fsdp_plugin = plugin
        self.accelerator.scaler = scaler and scaler()  # Accelerate makes none for fp16 on CPUs
        torch.manual_seed(0)
        model = Tied(tied=not fsdp)  # Accelerate refuses tied weights under FSDP2
        optimizer = build(model)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=4, gamma=0.5)
        loader = DataLoader(DATA, batch_size=4, shuffle=True, **(loader or {}))
        prepared = self.accelerator.prepare(model, optimizer, loader, scheduler)
        self.model, self.optimizer, self.loader, self.scheduler = prepared

    def epoch(self, number=0):
        self.loader.set_epoch(number)
        for number, tokens in enumerate(self.loader):
            with self.accelerator.accumulate(self.model):
                overflow = torch.inf if self.accelerator.scaler and number in (1, 4) else 1
                self.accelerator.backward(loss_of(self.model, tokens) * overflow)
                if self.clip and self.accelerator.sync_gradients:
                    self.norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.clip)
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()
        return self

    def weights(self):
        return whole(self.accelerator.unwrap_model(self.model))


def whole(model):
    found = {name: param.detach() for name, param in model.named_parameters()}
    return {name: (p.full_tensor() if isinstance(p, DTensor) else p).clone() for name, p in found.items()}


def ours(model):
    return ShardedASGD(model.named_parameters(), **OPTIONS, gradients="reduced", module=model)


def torchs(model):
    return torch.optim.ASGD(model.parameters(), **OPTIONS, foreach=False)


def average_of_torch(training):
    optimizer = unwrapped_optimizer(training.optimizer)
    named = dict(training.accelerator.unwrap_model(training.model).named_parameters())
    found = {name: optimizer.state[param]["ax"] for name, param in named.items()}
    return {name: (ax.full_tensor() if isinstance(ax, DTensor) else ax).clone() for name, ax in found.items()}


def pair(settings):
    """The weights and the average after an epoch, by ours and by torch's optimizer."""
    training = Training(ours, **settings)
    kept = keep_averages(training.accelerator, training.model, training.optimizer)
    training.epoch()
    with kept.averaged_parameters():
        averaged = training.weights()
    assert type(next(training.model.parameters())) is (DTensor if settings["fsdp"] else nn.Parameter)
    other = Training(torchs, **settings).epoch()
    norms = [(float(getattr(one, "norm", 0)), one.optimizer.param_groups[0]["lr"]) for one in (training, other)]
    return (training.weights(), averaged, norms[0]), (other.weights(), average_of_torch(other), norms[1])


CASES = {
    "default": {},
    "accumulation and clipping": {"clip": 0.3, "accelerator": {"gradient_accumulation_steps": 2}},
    "bf16": {"accelerator": {"mixed_precision": "bf16"}},
    "dispatch_batches": {"accelerator": {"dataloader_config": DataLoaderConfiguration(dispatch_batches=True)}},
    "split_batches, not even": {
        "accelerator": {"dataloader_config": DataLoaderConfiguration(split_batches=True, even_batches=False)},
        "loader": {"drop_last": True},
    },
    "fp16, steps are skipped": {"scaler": lambda: torch.amp.GradScaler("cpu", growth_interval=2)},
    "scheduler not with the optimizer": {"accelerator": {"step_scheduler_with_optimizer": False}},
}


@pytest.mark.parametrize(("ranks", "fsdp"), [(0, False), (2, False), (2, True)])
def test_the_bits_of_torch(ranks, fsdp):
    cases = on(ranks, lambda: {name: pair({**case, "fsdp": fsdp}) for name, case in CASES.items()})
    for (weights, averages, norm), (expected, expected_averages, expected_norm) in cases.values():
        assert_same(weights, expected)
        assert_same(averages, expected_averages)
        assert norm == expected_norm
    assert not torch.equal(averages["body.weight"], weights["body.weight"])


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=0.02)


def state_of(training, kept):
    with kept.averaged_parameters():
        averaged = training.weights()
    return training.weights(), averaged


def resumed(build, average, fsdp, load, epochs, save):
    """What a training has when it has loaded, and after some epochs, when it saves."""
    seedable = DataLoaderConfiguration(use_seedable_sampler=True)  # else an epoch that is resumed has another order
    training = Training(build, fsdp=fsdp, accelerator={"dataloader_config": seedable})
    kept = keep_averages(training.accelerator, training.model, training.optimizer, average)
    found = []
    if load:
        training.accelerator.load_state(str(load))
        found.append(state_of(training, kept))
    for number in range(epochs):
        training.epoch(number + bool(load))
    found.append(state_of(training, kept))
    if save:
        training.accelerator.save_state(str(save))
        training.accelerator.save_state(str(save))  # again, into one folder
    return found


BUILDS = {"asgd": (ours, None), "adamw": (adamw, {"ema": EMA(0.9)})}


@pytest.mark.parametrize("fsdp", [False, True])
def test_resumed_on_2_and_3_and_1_processes(fsdp, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"

    def on_two(kind):
        whole = resumed(*BUILDS[kind], fsdp, None, 2, None)[-1]
        saved = resumed(*BUILDS[kind], fsdp, None, 1, first / kind)[-1]
        return whole, saved, *resumed(*BUILDS[kind], fsdp, first / kind, 1, None)

    def on_three(kind):
        return resumed(*BUILDS[kind], fsdp, first / kind, 1, second / kind)

    def on_one(kind):
        return resumed(*BUILDS[kind], fsdp, second / kind, 0, None)

    two = on(2, lambda: {kind: on_two(kind) for kind in BUILDS})
    three = on(3, lambda: {kind: on_three(kind) for kind in BUILDS})
    one = on(1 if fsdp else 0, lambda: {kind: on_one(kind) for kind in BUILDS})
    for kind in BUILDS:
        whole, saved, loaded, ended = two[kind]
        for at in (0, 1):
            assert_same(loaded[at], saved[at])
            assert_same(ended[at], whole[at])
            assert_same(three[kind][0][at], saved[at])
            assert_same(one[kind][0][at], three[kind][1][at])
    if not fsdp:
        plain = Tied()
        plain.load_state_dict(load_file(second / "asgd/model.safetensors"), strict=False)
        assert_same(dict(plain.named_parameters()), three["asgd"][1][0])
        with pytest.raises(ValueError, match="parameter group"):  # nobody takes the placeholder for a state
            torchs(plain).load_state_dict(torch.load(second / "asgd/optimizer.bin"))


def test_what_would_lose_averages_is_refused(tmp_path):
    def work():
        training = Training(adamw)
        given = training.accelerator, training.model
        with pytest.raises(TypeError, match="after prepare"):
            keep_averages(*given, adamw(training.model), EMA(0.9))
        with pytest.raises(ValueError, match="AdamW keeps no averages"):
            keep_averages(*given, training.optimizer)
        with pytest.raises(ValueError, match="no parameter of model"):
            keep_averages(given[0], Tied(), training.optimizer, EMA(0.9))
        training.accelerator.save_state(str(tmp_path / "before"))
        keep_averages(*given, training.optimizer, EMA(0.9))
        with pytest.raises(RuntimeError, match="registered objects"):
            training.accelerator.load_state(str(tmp_path / "before"))
        training.accelerator.save_state(str(tmp_path / "after"))
        shutil.rmtree(tmp_path / "after/dist_asgd")
        with pytest.raises(CheckpointError, match="neither averages nor sharded state"):
            training.accelerator.load_state(str(tmp_path / "after"))
        keep_averages(*given, training.optimizer, EMA(0.5))
        training.accelerator.save_state(str(tmp_path / "both"))
        assert {"dist_asgd", "dist_asgd_1"} <= {path.name for path in (tmp_path / "both").iterdir()}
        other = Training(ours)
        with pytest.raises(ValueError, match="need average="):
            keep_averages(other.accelerator, other.model, other.optimizer, start=3)

    def of_whole_files():
        training = Training(ours, fsdp="full")
        with pytest.raises(ValueError, match=r"FULL_STATE_DICT: pass .*SHARDED_STATE_DICT"):
            keep_averages(training.accelerator, training.model, training.optimizer)

    on(0, work)
    on(1, of_whole_files)


def test_the_guide(tmp_path, monkeypatch):
    assert 1 < len(added_lines("Accelerate")) <= 4
    monkeypatch.chdir(tmp_path)
    averaged = on(2, lambda: run_section("Accelerate")["averaged"])
    shutil.move("state", "state of two")
    assert averaged > 0 and on(0, lambda: run_section("Accelerate")["averaged"]) > 0
