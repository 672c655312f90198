"""PEFT's adapters in plain PyTorch and in a Trainer: bits, resuming, and averages that are saved or merged."""

import os

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, TrainingArguments

from dist_asgd import EMA, Checkpointer, ShardedASGD, ShardedAverages, Uniform
from dist_asgd.integrations.transformers import AveragingTrainer
from tests.support.frameworks import assert_same, on

pytestmark = pytest.mark.filterwarnings("ignore")  # of the frameworks' own making; ranks are children
SIZES = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": "gaussian"}
OPTIONS = {"lr": 0.5, "t0": 1}
KINDS = ("ours", "torch", "adamw")


def base():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_attention_heads=2, attention_dropout=0.0))


def tokens_of(step, rank=0):
    return torch.randint(0, 32, (4, 6), generator=torch.Generator().manual_seed(step * 10 + rank))


def adapter(model):
    return {name: param.detach().clone() for name, param in model.named_parameters() if param.requires_grad}


class Training:
    """A training of an adapter by plain PyTorch, under DDP where there is a process group."""

    def __init__(self, kind):
        self.model, self.kind, self.averages = get_peft_model(base(), LoraConfig(**LORA)), kind, None
        self.wrapped = DistributedDataParallel(self.model) if dist.is_initialized() else self.model
        named = [(name, param) for name, param in self.model.named_parameters() if param.requires_grad]
        if kind == "ours":
            self.averages = self.optimizer = ShardedASGD(named, **OPTIONS, gradients="reduced")
        elif kind == "torch":
            self.optimizer = torch.optim.ASGD([param for _, param in named], **OPTIONS, foreach=False)
        else:
            self.optimizer = torch.optim.AdamW([param for _, param in named], lr=0.02)
            kinds = {"ema": EMA(0.5), "mean": Uniform()}
            self.averages = ShardedAverages(named, kinds, optimizer=self.optimizer, module=self.model)

    def train(self, first, last):
        for step in range(first, last):
            tokens = tokens_of(step, dist.get_rank() if dist.is_initialized() else 0)
            self.wrapped(input_ids=tokens, labels=tokens).loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        return self

    def found(self):
        """The adapter, and after it every average of it."""
        found = [adapter(self.model)]
        if self.averages is None:
            named = dict(self.model.named_parameters())
            return [*found, {name: self.optimizer.state[named[name]]["ax"].clone() for name in found[0]}]
        for name in getattr(self.averages, "names", [None]):
            with self.averages.averaged_parameters(name):
                found.append(adapter(self.model))
        return found

    def state(self):
        beside = {} if self.kind == "ours" else {"averages": self.averages}
        return {"model": self.model, "optimizer": self.optimizer, **beside}

    def save(self, folder, step):
        if self.kind != "torch":
            Checkpointer(folder / self.kind).save(step, self.state())
        elif not dist.is_initialized() or dist.get_rank() == 0:
            torch.save((get_peft_model_state_dict(self.model), self.optimizer.state_dict()), folder / f"{step}.pt")

    def load(self, folder, step):
        if self.kind != "torch":
            assert Checkpointer(folder / self.kind).load(self.state(), step=step) == step
            return self
        weights, state = torch.load(folder / f"{step}.pt", weights_only=True)
        set_peft_model_state_dict(self.model, weights)
        self.optimizer.load_state_dict(state)
        return self


def launched(work):
    def run():
        if dist.is_torchelastic_launched() or "RANK" in os.environ:
            dist.init_process_group("gloo")
        return {kind: work(kind) for kind in KINDS}

    return run


def test_adapters_in_plain_pytorch_resumed_on_2_and_3_and_1_processes(tmp_path):
    def on_two(kind):
        first = Training(kind).train(0, 2)
        first.save(tmp_path, 2)
        saved = first.found()
        once = first.train(2, 4).found()
        again = Training(kind).load(tmp_path, 2)
        return saved, once, again.found(), again.train(2, 4).found()

    def on_three(kind):
        training = Training(kind).load(tmp_path, 2)
        loaded = training.found()
        training.train(2, 4).save(tmp_path, 4)
        return loaded, training.found()

    def on_one(kind):
        training = Training(kind).load(tmp_path, 4)
        found = training.found(), training.train(4, 6).found()
        if kind != "torch":
            check_files(training, tmp_path / f"of {kind}", found[1])
        return found

    two, three, one = on(2, launched(on_two)), on(3, launched(on_three)), on(0, launched(on_one))
    for kind in KINDS:
        saved, once, loaded, ended = two[kind]
        for at in range(len(saved)):
            assert_same(loaded[at], saved[at])
            assert_same(ended[at], once[at])
            assert_same(three[kind][0][at], saved[at])
            assert_same(one[kind][0][at], three[kind][1][at])
    for run in (two, three, one):
        for found, expected in zip(run["ours"], run["torch"], strict=True):
            assert_same(found[0], expected[0])
            assert_same(found[1], expected[1])


def check_files(training, folder, expected):
    """A plain model takes the adapter, or the average of it, and ``merge_and_unload`` merges the average."""
    training.model.save_pretrained(folder / "0")
    with training.averages.averaged_parameters():
        training.model.save_pretrained(folder / "1")
    plain = [PeftModel.from_pretrained(base(), folder / str(at), is_trainable=True) for at in (0, 1)]
    assert_same(adapter(plain[0]), expected[0])
    assert_same(adapter(plain[1]), expected[1])
    assert_same(adapter(training.model), expected[0])
    with training.averages.averaged_parameters():
        merged = training.model.merge_and_unload().state_dict()
    raw, average = (model.merge_and_unload().state_dict() for model in plain)
    torch.testing.assert_close(merged, average, rtol=1e-5, atol=1e-6)  # products of matrices that lie elsewhere
    name = "model.layers.0.self_attn.q_proj.weight"
    assert (raw[name] - average[name]).abs().max() > 1e-4


def trained(kind, folder, resume=None, **settings):
    defaults = {"max_steps": 4, "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "report_to": "none"}
    defaults |= {"per_device_train_batch_size": 2, "use_cpu": True, "disable_tqdm": True, "learning_rate": 0.05}
    args = TrainingArguments(str(folder), **defaults | settings)
    rows = [{"input_ids": row, "labels": row} for step in range(8) for row in tokens_of(step).tolist()]
    how = {"optimizer_cls_and_kwargs": (ShardedASGD, OPTIONS)} if kind == "ours" else {"average": EMA(0.5)}
    found = {}

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            with trainer.averaged_parameters():
                found[state.global_step] = adapter(trainer.model)

    model = get_peft_model(base(), LoraConfig(**LORA))
    trainer = AveragingTrainer(model, args, train_dataset=rows[:24], eval_dataset=rows[24:], callbacks=[Watch()], **how)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, found


@pytest.mark.parametrize("ranks", [0, 2])
def test_adapters_in_a_trainer(ranks, tmp_path):
    def work():
        for kind in ("ours", "adamw"):
            first, found = trained(kind, tmp_path / kind)
            again, others = trained(kind, tmp_path / kind, str(tmp_path / kind / "checkpoint-2"))
            assert_same(adapter(again.model), adapter(first.model))
            assert others.keys() == {3, 4} and all(assert_same(others[step], found[step]) is None for step in others)
            best, found = trained(kind, tmp_path / f"{kind} best", load_best_model_at_end=True)
            assert_same(adapter(best.model), found[best.state.best_global_step])
            best.save_model(str(tmp_path / "shipped"))
            best.accelerator.wait_for_everyone()
            plain = PeftModel.from_pretrained(base(), tmp_path / "shipped", is_trainable=True)
            assert_same(adapter(plain), adapter(best.model))

    on(ranks, work)
