"""AveragedWeights in real Trainers, against torch.optim.ASGD and averages by hand in the same Trainers, bit for bit."""

import logging
import os
import signal
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, WeightAveraging
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.tuner import Tuner
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from dist_asgd import EMA, ShardedASGD, Uniform
from dist_asgd.integrations.lightning import AveragedWeights
from tests.support.guide import added_lines, run_section
from tests.support.ranks import message_of, run_alone, run_launched

pytestmark = pytest.mark.filterwarnings("default")  # Lightning warns of few workers, of small epochs and the like
logging.getLogger("lightning").setLevel(logging.ERROR)


class Lit(L.LightningModule):
    """A small network that records its weights in each validation."""

    def __init__(self, make_optimizer=None, batch_norm=False):
        super().__init__()
        torch.manual_seed(0)
        middle = nn.BatchNorm1d(8) if batch_norm else nn.Identity()
        self.net = nn.Sequential(nn.Linear(6, 8), middle, nn.Tanh(), nn.Linear(8, 1))
        self.make_optimizer, self.validated = make_optimizer, []

    def training_step(self, batch, number):
        return (self.net(batch[0]) - batch[1]).square().mean()

    def validation_step(self, batch, number):
        self.log("val_loss", (self.net(batch[0]) - batch[1]).square().mean(), sync_dist=True)

    test_step = validation_step

    def on_validation_epoch_end(self):
        self.validated.append(weights_of(self))

    def configure_optimizers(self):
        return self.make_optimizer(self)


class ShardedLit(Lit):
    def configure_model(self):
        if not getattr(self, "is_sharded", False):
            self.is_sharded = True
            fully_shard(self.net[0], mesh=self.device_mesh["data_parallel"])
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


class ByHand(L.Callback):
    """The mean of all iterates, as torch computes it: ``ax + (p - ax) * mu``, each operation rounded once."""

    steps, ax = 0, ()

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step > self.steps:
            self.steps, params = trainer.global_step, weights_of(pl_module)
            self.ax = [a + (p - a) * (1 / self.steps) for a, p in zip(self.ax or params, params, strict=True)]

    def state_dict(self):
        return {"steps": self.steps, "ax": self.ax}

    def load_state_dict(self, state):
        self.steps, self.ax = state["steps"], state["ax"]


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def weights_of(module):
    return [whole(param).detach().clone() for param in module.parameters()]


def sharded_asgd(module):
    return ShardedASGD(module.named_parameters(), lr=0.05, t0=1, gradients="reduced")


def fsdp2_asgd(module):
    return ShardedASGD(module.named_parameters(), lr=0.05, t0=1, module=module)


def torch_asgd(module):
    return torch.optim.ASGD(module.named_parameters(), lr=0.05, t0=1, foreach=False)


def adamw(module):
    return torch.optim.AdamW(module.parameters(), lr=0.01)


def batches(size=4):
    torch.manual_seed(1)
    return DataLoader(TensorDataset(torch.randn(24, 6), torch.randn(24, 1)), batch_size=size)


def fit(module, callbacks=(), epochs=2, path=None, devices=1, **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    quiet["enable_checkpointing"] = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    options = {"strategy": "ddp" if devices > 1 else "auto", **quiet, **options}
    trainer = L.Trainer(devices=devices, max_epochs=epochs, callbacks=list(callbacks), **options)
    trainer.fit(module, batches(), batches(), ckpt_path=path)
    return trainer


def equal(some, others):
    return all(torch.equal(whole(a), whole(b)) for a, b in zip(some, others, strict=True))


CLIPPED = {"gradient_clip_val": 0.5, "accumulate_grad_batches": 2}


def check_asgd(devices, folder):
    ours, torchs = Lit(sharded_asgd), Lit(torch_asgd)
    trainer = fit(ours, [AveragedWeights()], devices=devices, **CLIPPED)
    state = fit(torchs, devices=devices, **CLIPPED).optimizers[0].state.values()
    ax = [entry["ax"] for entry in state]
    assert equal(ours.parameters(), ax) and not equal(ax, torchs.parameters())
    trainer.save_checkpoint(f"{folder}/asgd.ckpt")
    saved = torch.load(f"{folder}/asgd.ckpt", weights_only=True)
    assert equal(saved["state_dict"].values(), ax) and equal(saved["dist_asgd"]["weights"].values(), weights_of(torchs))
    assert equal([entry["ax"] for entry in saved["optimizer_states"][0]["state"].values()], ax)  # all of it, on rank 0


def check_averages(devices, folder):
    ours, plain, hand = Lit(adamw), Lit(adamw), ByHand()
    trainer = fit(ours, [AveragedWeights(Uniform())], devices=devices, **CLIPPED)
    fit(plain, [hand], devices=devices, **CLIPPED)
    assert equal(ours.parameters(), hand.ax) and equal(ours.validated[-1], hand.ax)
    assert equal(ours.validated[0], weights_of(Lit()))  # the sanity check, before the first step
    trainer.save_checkpoint(f"{folder}/adamw.ckpt")
    saved = torch.load(f"{folder}/adamw.ckpt", weights_only=True)
    assert equal(saved["dist_asgd"]["averages"]["average"].values(), hand.ax)
    assert equal(saved["dist_asgd"]["weights"].values(), weights_of(plain))
    Lit().load_state_dict(saved["state_dict"])


@pytest.mark.parametrize("devices", [1, 2])
def test_same_bits_as_torch_and_by_hand(devices, tmp_path):
    def work():
        check_asgd(devices, tmp_path)
        check_averages(devices, tmp_path)

    run_alone(work) if devices == 1 else run_launched(devices, work)


def test_resumed_by_two_three_and_one_process(tmp_path):
    """Each run goes on from a checkpoint of the run before; plain trainings do so beside it."""

    def work(devices, epochs, last):
        kinds = {"asgd": (sharded_asgd, [AveragedWeights()]), "torch": (torch_asgd, [])}
        kinds |= {"averages": (adamw, [AveragedWeights(Uniform())]), "hand": (adamw, [ByHand()])}
        found = {}
        for kind, (make, callbacks) in kinds.items():
            module, path = Lit(make), f"{tmp_path}/{kind}-"
            trainer = fit(module, callbacks, epochs, f"{path}{last}.ckpt" if last else None, devices)
            trainer.save_checkpoint(f"{path}{epochs}.ckpt")
            found[kind] = weights_of(module), trainer
        ax = [entry["ax"] for entry in found["torch"][1].optimizers[0].state.values()]
        assert equal(found["asgd"][0], ax)
        assert equal(found["averages"][0], found["hand"][1].callbacks[-1].ax)
        if devices == 1:  # without an interruption
            once = Lit(adamw)
            fit(once, [AveragedWeights(Uniform())], 3)
            again = Lit(adamw)
            fit(again, [AveragedWeights(Uniform())], 2).save_checkpoint(tmp_path / "two.ckpt")
            fit(again, [AveragedWeights(Uniform())], 3, tmp_path / "two.ckpt")
            assert equal(again.parameters(), once.parameters())

    run_launched(2, work, 2, 1, None)
    run_launched(3, work, 3, 2, 1)
    run_alone(work, 1, 3, 2)


@pytest.mark.parametrize("distributed", [True, False])
def test_fsdp2(distributed, tmp_path):
    """Checkpoints of shards, and whole ones, that are resumed by other numbers of ranks."""

    def work(devices):
        def train(make, callback, epochs, path=None):
            module = ShardedLit(make)
            strategy = ModelParallelStrategy(devices, 1, save_distributed_checkpoint=distributed)
            trainer = fit(module, [callback], epochs, path, devices, strategy=strategy, **CLIPPED)
            return trainer, weights_of(module)

        if devices == 2:
            trainer, found = train(adamw, AveragedWeights(Uniform()), 1)
            hand = ByHand()
            train(adamw, hand, 1)
            assert equal(found, hand.ax)
            trainer.save_checkpoint(tmp_path / "adamw")
            trainer, found = train(fsdp2_asgd, AveragedWeights(), 1)
            trainer.save_checkpoint(tmp_path / "asgd")
            torchs = train(torch_asgd, L.Callback(), 1)[0].optimizers[0].state.values()
            assert equal(found, [entry["ax"] for entry in torchs])
        first = AveragedWeights(Uniform())
        resumed = [train(adamw, first, 2, tmp_path / "adamw")[1]]
        resumed.append(train(fsdp2_asgd, AveragedWeights(), 2, tmp_path / "asgd")[1])
        if devices == 2:
            assert equal(resumed[0], train(adamw, AveragedWeights(Uniform()), 2)[1])
            assert equal(resumed[1], train(fsdp2_asgd, AveragedWeights(), 2)[1])
        assert first.averages.updates == {2: 2 + 2, 3: 2 + 1}[devices]

    run_launched(2, work, 2)
    run_launched(3, work, 3)


def saver_of(folder, **options):
    return ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, **options)


def check_checkpoints(folder):
    """What is validated is what is saved, as the weights, at the end of a validation and of an epoch; and "best"."""
    model, callback = Lit(adamw, batch_norm=True), AveragedWeights({"ema": EMA(0.5), "mean": Uniform()}, name="mean")
    saver = saver_of(folder, monitor="val_loss", save_last=True, save_on_train_epoch_end=False)
    stop = EarlyStopping("val_loss", patience=5)
    trainer = fit(model, [callback, saver, stop], 3)
    for epoch, found in enumerate(model.validated[1:]):
        saved = torch.load(folder / f"epoch={epoch}.ckpt", weights_only=True)
        averages = saved["dist_asgd"]["averages"]
        state = {name: saved["state_dict"][name] for name in averages["mean"]}
        assert equal(state.values(), averages["mean"].values())  # the statistics of BatchNorm, too
        assert equal([state[name] for name, _ in model.named_parameters()], found)
        loaded = Lit.load_from_checkpoint(folder / f"epoch={epoch}.ckpt", batch_norm=True)
        assert equal(weights_of(loaded), found)
    last, judged = trainer.callback_metrics["val_loss"].item(), stop.best_score.item()
    losses = [trainer.validate(model, batches(), verbose=False)[0]["val_loss"]]  # of the average, which the model holds
    losses.append(trainer.test(model, batches(), "best", verbose=False)[0]["val_loss"])
    assert losses == [pytest.approx(last), pytest.approx(saver.best_model_score.item())]
    assert judged == saver.best_model_score.item()
    assert equal(weights_of(model), model.validated[1:][int(saver.best_model_path[-6])])
    resumed = Lit(adamw, batch_norm=True)
    fit(resumed, [AveragedWeights({"ema": EMA(0.5), "mean": Uniform()}, name="mean")], 3, folder / "epoch=1.ckpt")
    assert equal(weights_of(resumed), model.validated[3])


def check_epoch_end(folder):
    """`save_on_train_epoch_end`, and Lightning's default without a monitor."""
    for number, options in enumerate(({}, {"save_on_train_epoch_end": True})):
        model, hand = Lit(adamw), ByHand()
        fit(model, [AveragedWeights(Uniform()), hand, saver_of(folder / str(number), **options)], 1)
        saved = torch.load(folder / str(number) / "epoch=0.ckpt", weights_only=True)
        assert equal(saved["state_dict"].values(), hand.ax)


class Alternating(Lit):
    """Manual optimization of two optimizers."""

    def __init__(self):
        super().__init__(lambda module: [adamw(module.net[0]), torch.optim.SGD(module.net[3].parameters(), lr=0.1)])
        self.automatic_optimization = False

    def training_step(self, batch, number):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, number))
            optimizer.step()


def check_manual(folder):
    model, recorded = Alternating(), []
    trainer = fit(model, [AveragedWeights(Uniform()), recorder(recorded)], 1)
    mean = recorded[0]
    for number, params in enumerate(recorded[1:], start=2):
        mean = [a + (p - a) * (1 / number) for a, p in zip(mean, params, strict=True)]
    assert equal(weights_of(model), mean)
    trainer.save_checkpoint(folder / "manual.ckpt")
    fit(Alternating(), [callback := AveragedWeights(Uniform())], 2, folder / "manual.ckpt")
    assert callback.averages.updates == 12


def recorder(found):
    return L.pytorch.callbacks.LambdaCallback(
        on_train_batch_end=lambda trainer, pl_module, *_: found.append(weights_of(pl_module))
    )


def check_precision(folder):
    """Averages of bf16 weights are fp32, and so are those under mixed precision; a resumed run is uninterrupted."""
    for precision in ("bf16-true", "bf16-mixed", "16-mixed"):
        for make, average in ((adamw, Uniform()), (sharded_asgd, None)):
            once, first, again = Lit(make), Lit(make), Lit(make)
            fit(once, [AveragedWeights(average)], 2, precision=precision)
            path = folder / f"{precision}.ckpt"
            fit(first, [AveragedWeights(average)], 1, precision=precision).save_checkpoint(path)
            fit(again, [AveragedWeights(average)], 2, path, precision=precision)
            assert equal(weights_of(again), weights_of(once))
            saved = torch.load(path, weights_only=True)["dist_asgd"].get("averages", {}).get("average", {})
            assert all(value.dtype == torch.float32 for value in saved.values())


def check_tuner(folder):
    """`lr_find` trains, and restores the weights by a checkpoint of its own."""
    module, plain, hand = Lit(adamw), Lit(adamw), ByHand()
    module.lr = 0.01
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False, "default_root_dir": folder}
    trainer = L.Trainer(accelerator="cpu", max_epochs=1, callbacks=[AveragedWeights(Uniform())], **quiet)
    Tuner(trainer).lr_find(module, batches(), batches(), num_training=4, update_attr=False)
    trainer.fit(module, batches(), batches())
    fit(plain, [hand], 1)
    assert equal(weights_of(module), hand.ax)


def check_slurm(folder):
    """Slurm ends the job during a validation; the next job finds the checkpoint by itself."""
    scontrol = folder / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >>{folder}/calls\n')
    scontrol.chmod(0o755)
    facts = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1", "SLURM_JOB_NAME": "train", "SLURM_PROCID": "0"}
    os.environ.update(facts, SLURM_LOCALID="0", SLURM_NODEID="0", PATH=f"{folder}:{os.environ['PATH']}")
    for number, (make, average) in enumerate(((adamw, Uniform()), (sharded_asgd, None))):
        slurm = {"plugins": [SLURMEnvironment(auto_requeue=True)], "default_root_dir": folder / str(number)}
        ended, again, once = Failing(lambda module: os.kill(os.getpid(), signal.SIGUSR1), make), Lit(make), Lit(make)
        fit(ended, [AveragedWeights(average)], **slurm)
        trainer = fit(again, [AveragedWeights(average)], **slurm)
        assert os.path.basename(trainer.ckpt_path) == "hpc_ckpt_1.ckpt"
        fit(once, [AveragedWeights(average)], plugins=slurm["plugins"], default_root_dir=folder / "once")
        assert equal(weights_of(again), weights_of(once)) and equal(weights_of(ended), weights_of(once))
    assert (folder / "calls").read_text() == "requeue 7\n" * 2


def check_notebook(folder):
    """The processes of ``ddp_notebook`` end with ``fit``: the model comes back, averages and optimizers do not."""
    module = Lit(adamw)
    callbacks = [AveragedWeights(Uniform()), saver_of(folder, save_last=True)]
    trainer = fit(module, callbacks, 1, devices=2, strategy="ddp_notebook")
    saved = torch.load(folder / "last.ckpt", weights_only=True)
    assert equal(weights_of(module), saved["state_dict"].values())
    assert not equal(weights_of(module), saved["dist_asgd"]["weights"].values())
    assert "gone with its processes" in message_of(lambda: trainer.save_checkpoint(folder / "x.ckpt"), RuntimeError)


CHECKS = [check_checkpoints, check_epoch_end, check_manual, check_precision, check_tuner, check_slurm, check_notebook]


@pytest.mark.parametrize("check", CHECKS)
def test_no_default_loses_an_average(check, tmp_path):
    run_alone(check, tmp_path)


class Failing(Lit):
    """Does something in the second validation, the first one of an epoch."""

    def __init__(self, action, make_optimizer=adamw):
        super().__init__(make_optimizer)
        self.action = action

    def on_validation_epoch_end(self):
        super().on_validation_epoch_end()
        if len(self.validated) == 2:
            self.action(self)


def test_what_cannot_be_saved_or_averaged_is_told(tmp_path):
    def stop(module):
        raise KeyError("stopped")

    def work():
        uniform, told = AveragedWeights(Uniform()), []
        for callbacks, options in (
            ([uniform, saver_of(tmp_path, save_weights_only=True)], {}),
            ([uniform, WeightAveraging()], {}),
            ([AveragedWeights()], {}),
        ):
            told.append(message_of(lambda c=callbacks, o=options: fit(Lit(adamw), c, 1, **o), Exception))
        told.append(message_of(lambda: AveragedWeights(start=3)))
        of_gpus = SimpleNamespace(strategy=FSDPStrategy())  # a Trainer for FSDP cannot be built without a GPU
        told.append(message_of(lambda: uniform.setup(of_gpus, None, "fit")))
        # An error in a validation leaves the weights in the model.
        recorded, stopped = [], Failing(stop)
        message_of(lambda: fit(stopped, [AveragedWeights(Uniform()), recorder(recorded)], 1), KeyError)
        assert equal(weights_of(stopped), recorded[-1]) and not equal(recorded[-1], stopped.validated[-1])
        # A checkpoint of a training without the callback, and one that is resumed without it, are warned of.
        fit(Lit(adamw), [], 1).save_checkpoint(tmp_path / "plain.ckpt")
        fit(Lit(adamw), [AveragedWeights(Uniform())], 1).save_checkpoint(tmp_path / "averaged.ckpt")
        with pytest.warns(UserWarning, match="saved without AveragedWeights"):
            fit(Lit(adamw), [AveragedWeights(Uniform())], 2, tmp_path / "plain.ckpt")
        with pytest.warns(UserWarning, match=r"Please add the following callbacks: \[.*AveragedWeights"):
            fit(Lit(adamw), [], 2, tmp_path / "averaged.ckpt")
        return told

    told = run_alone(work)
    expected = ["would save the weights, and not the average", "and WeightAveraging would each put"]
    expected += ["needs ShardedASGD as optimizer, found ['AdamW']", "has the options ['start']"]
    expected += ["not with FSDPStrategy"]
    for message, part in zip(told, expected, strict=True):
        assert part in message


def test_the_guide(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def work():
        names = run_section("Lightning")
        saved = torch.load(names["first"].checkpoint_callback.best_model_path, weights_only=True)
        assert equal(names["best"].parameters(), saved["state_dict"].values())
        return saved["dist_asgd"]["averages"]["progress"]["iterates"]

    assert run_alone(work) in (6, 14)  # the best checkpoint is that of the first or the second epoch
    assert len(added_lines("Lightning")) <= 4
