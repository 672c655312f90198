"""Accelerate: the bits of torch.optim.ASGD, averages beside AdamW, and resuming on other numbers of processes."""

import os
import shutil

import pytest
import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DataLoaderConfiguration, FullyShardedDataParallelPlugin, merge_fsdp_weights
from safetensors.torch import load_file
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from dist_asgd import EMA, ShardedASGD, ShardedAverages, Uniform
from dist_asgd.checkpoint import CheckpointError
from dist_asgd.integrations.accelerate import keep_averages, unwrapped_optimizer
from tests.support.frameworks import assert_same, on
from tests.support.guide import added_lines, run_section
from tests.support.ranks import run_alone

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


@pytest.mark.parametrize(("ranks", "fsdp"), [(0, False), (2, False), (1, True), (2, True)])
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
    """The weights, and after them every average."""
    if kept is None:
        return training.weights(), average_of_torch(training)
    averages = []
    for name in kept.names if isinstance(kept, ShardedAverages) else [None]:
        with kept.averaged_parameters(name):
            averages.append(training.weights())
    return [training.weights(), *averages]  # complete after a swap, which has waited for the step


def resumed(kind, fsdp, load, epochs, save):
    """What a training has when it has loaded, and after some epochs, when it saves."""
    seedable = DataLoaderConfiguration(use_seedable_sampler=True)  # else an epoch that is resumed has another order
    build, average = BUILDS[kind]
    training = Training(build, fsdp=fsdp, accelerator={"dataloader_config": seedable})
    given = training.accelerator, training.model, training.optimizer, average
    kept = None if kind == "torch" else keep_averages(*given)
    found = []
    if load:
        training.accelerator.load_state(f"{load}/{kind}")
        found.append(state_of(training, kept))
    for number in range(epochs):
        training.epoch(number + bool(load))
    found.append(state_of(training, kept))
    if save:
        training.accelerator.save_state(f"{save}/{kind}")
        training.accelerator.save_state(f"{save}/{kind}")  # again, into one folder
        if kept is not None and not fsdp:
            with kept.averaged_parameters():
                training.accelerator.save_model(training.model, f"{save}/average of {kind}")
    return found


BUILDS = {"asgd": (ours, None), "torch": (torchs, None), "adamw": (adamw, {"ema": EMA(0.9), "mean": Uniform()})}


@pytest.mark.parametrize("fsdp", [False, True])
def test_resumed_on_2_and_3_and_1_processes(fsdp, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"

    def on_two(kind):
        whole = resumed(kind, fsdp, None, 2, None)[-1]
        saved = resumed(kind, fsdp, None, 1, first)[-1]
        return whole, saved, *resumed(kind, fsdp, first, 1, None)

    two = on(2, lambda: {kind: on_two(kind) for kind in BUILDS})
    three = on(3, lambda: {kind: resumed(kind, fsdp, first, 1, second) for kind in BUILDS})
    one = on(1 if fsdp else 0, lambda: {kind: resumed(kind, fsdp, second, 1, None) for kind in BUILDS})
    for kind in BUILDS:
        whole, saved, loaded, ended = two[kind]
        for at in range(len(saved)):
            assert_same(loaded[at], saved[at])
            assert_same(ended[at], whole[at])
            assert_same(three[kind][0][at], saved[at])
            assert_same(one[kind][0][at], three[kind][1][at])
    for run in (two, three, one):  # torch.optim.ASGD on this path, resumed by Accelerate's own files
        for found, expected in zip(run["asgd"], run["torch"], strict=True):
            assert_same(found[0], expected[0])
            assert_same(found[1], expected[1])
    if fsdp:
        check_merged_files(second / "asgd", three["asgd"][1][0])
    else:
        check_plain_files(second, three)


def check_merged_files(folder, expected):
    """What ``accelerate merge-weights`` makes of the shards of FSDP2 is for a plain model."""
    run_alone(merge_fsdp_weights, str(folder / "pytorch_model_fsdp_0"), str(folder / "merged"))
    plain = Tied(tied=False)
    plain.load_state_dict(load_file(folder / "merged/model.safetensors"))
    assert_same(dict(plain.named_parameters()), expected)


def check_plain_files(folder, found):
    plain = Tied()
    for kind in ("asgd", "adamw"):
        for at, name in enumerate((kind, f"average of {kind}")):
            plain.load_state_dict(load_file(folder / name / "model.safetensors"), strict=False)  # tied: one name
            assert_same(dict(plain.named_parameters()), found[kind][1][at])
    with pytest.raises(ValueError, match="parameter group"):  # nobody takes the placeholder for a state
        torchs(plain).load_state_dict(torch.load(folder / "asgd/optimizer.bin"))


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
