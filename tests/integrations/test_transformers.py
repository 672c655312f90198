"""transformers: the bits of torch.optim.ASGD, averages beside AdamW, evaluation on them, and resuming."""

import contextlib
import pickle

import pytest
import torch
import transformers.trainer
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from dist_asgd import EMA, ShardedASGD, Uniform
from dist_asgd.checkpoint import CheckpointError
from dist_asgd.integrations.transformers import AveragingCallback, AveragingTrainer
from tests.support.frameworks import assert_same, on
from tests.support.guide import added_lines, run_section
from tests.support.ranks import run_launched

pytestmark = pytest.mark.filterwarnings("ignore")  # of the frameworks' own making; ranks are children
OPTIONS = {"lr": 0.05, "lambd": 1e-3, "t0": 0, "weight_decay": 1e-3}
TOKENS = torch.randint(0, 32, (40, 6), generator=torch.Generator().manual_seed(1)).tolist()
DATA = [{"input_ids": tokens, "labels": tokens} for tokens in TOKENS]
SIZES = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
CONFIG = LlamaConfig(**SIZES, num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True)


def make(kind, folder, trainer=None, config=CONFIG, **settings):
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    defaults = {"max_steps": 6, "save_steps": 3, "save_strategy": "steps", "logging_steps": 1, "report_to": "none"}
    defaults |= {"per_device_train_batch_size": 2, "use_cpu": True, "disable_tqdm": True, "eval_steps": 3}
    args = TrainingArguments(str(folder), **defaults | settings)
    given = {"model": model, "args": args, "train_dataset": DATA[:32], "eval_dataset": DATA[32:]}
    if kind == "ours":
        return AveragingTrainer(**given, optimizer_cls_and_kwargs=(ShardedASGD, OPTIONS), **trainer or {})
    if kind == "torch":
        return Trainer(
            **given, optimizer_cls_and_kwargs=(torch.optim.ASGD, OPTIONS | {"foreach": False}), **trainer or {}
        )
    if kind == "plain":
        return Trainer(**given, **trainer or {})
    return AveragingTrainer(**given, average={"ema": EMA(0.5), "mean": Uniform()}, **trainer or {})


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def weights(trainer):
    return {name: whole(param) for name, param in trainer.model.named_parameters()}


def averages(trainer, kept=None):
    """Every average; the name of each but the first stands in front of those of parameters."""
    kept, found = kept or getattr(trainer, "averages", None), {}
    if kept is not None:
        for number, average in enumerate(getattr(kept, "names", [None])):
            with kept.averaged_parameters(average):
                found |= {f"{average} {name}" if number else name: value for name, value in weights(trainer).items()}
        return found
    state = trainer.optimizer.state
    return {name: whole(state[param]["ax"]) for name, param in trainer.model.named_parameters()}


def history(trainer):
    keys = ("loss", "grad_norm", "learning_rate", "step")
    return [{key: entry[key] for key in keys if key in entry} for entry in trainer.state.log_history if "loss" in entry]


def trained(kind, folder, resume=None, **settings):
    trainer = make(kind, folder, **settings)
    trainer.train(resume_from_checkpoint=resume)
    return weights(trainer), averages(trainer), history(trainer)


CASES = {
    "default": {},
    "accumulation": {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1, "max_steps": 3},
    "bf16": {"bf16": True, "max_steps": 3},
    "no clipping": {"max_grad_norm": 0.0, "max_steps": 3, "lr_scheduler_type": "constant"},
    "dispatch_batches": {"accelerator_config": {"dispatch_batches": True}, "max_steps": 3},
    "activation checkpointing": {"activation_checkpointing": True, "max_steps": 3},
}


@pytest.mark.parametrize("ranks", [0, 2])
def test_the_bits_and_the_log_of_torch(ranks, tmp_path):
    def work():
        settings = {name: {"save_strategy": "no"} | case for name, case in CASES.items()}
        return {n: [trained(kind, tmp_path, **case) for kind in ("ours", "torch")] for n, case in settings.items()}

    for found, expected in on(ranks, work).values():
        assert_same(found[0], expected[0])
        assert_same(found[1], expected[1])
        assert found[2] == expected[2] and found[2][0].keys() >= {"loss", "grad_norm"}
        assert not torch.equal(found[0]["model.norm.weight"], found[1]["model.norm.weight"])


class Loaded(TrainerCallback):
    """Keeps what a trainer has when it begins to train."""

    def on_train_begin(self, args, state, control, **_):
        self.found = weights(self.trainer), averages(self.trainer)


def resumed(kind, folder, resume, **settings):
    """What a trainer has when it begins to train, and when it has trained."""
    loaded = Loaded()
    trainer = loaded.trainer = make(kind, folder, {"callbacks": [loaded]}, **settings)
    trainer.train(resume_from_checkpoint=resume)
    if kind != "torch":
        with trainer.averaged_parameters():
            trainer.save_model(str(folder / "average"))
    return *loaded.found, weights(trainer), averages(trainer), history(trainer)


KINDS = ("ours", "torch", "adamw")


def test_resumed_on_2_and_3_and_1_processes(tmp_path):
    def on_two():
        whole = {kind: trained(kind, tmp_path / kind) for kind in KINDS}
        return whole, {k: resumed(k, tmp_path / k, str(tmp_path / k / "checkpoint-3")) for k in KINDS}

    def on_three():
        return {kind: resumed(kind, tmp_path / kind, True, max_steps=8, save_steps=2) for kind in KINDS}

    def on_one():
        return {kind: resumed(kind, tmp_path / kind, True, max_steps=9) for kind in KINDS}

    whole, again = on(2, on_two)
    three, one = on(3, on_three), on(0, on_one)
    for kind in KINDS:
        assert again[kind][4] == whole[kind][2]
        for at in (0, 1):
            assert_same(again[kind][2 + at], whole[kind][at])
            assert_same(three[kind][at], whole[kind][at])
            assert_same(one[kind][at], three[kind][2 + at])
    for run in (again, three, one):  # torch.optim.ASGD on this path, resumed by the trainer's own files
        for at in range(4):
            assert_same(run["ours"][at], run["torch"][at])

    for kind in ("ours", "adamw"):
        plain = LlamaForCausalLM.from_pretrained(tmp_path / kind / "checkpoint-9")
        assert_same(dict(plain.named_parameters()), one[kind][2])
        check_average(tmp_path / kind, one[kind][3])
    with pytest.raises(ValueError, match="parameter group"):  # nobody takes the placeholder for a state
        placeholder = torch.load(tmp_path / "ours/checkpoint-8/optimizer.pt")
        torch.optim.ASGD(plain.parameters()).load_state_dict(placeholder)


def check_average(folder, expected):
    """A plain model takes the average that was saved by ``save_model``."""
    plain = dict(LlamaForCausalLM.from_pretrained(folder / "average").named_parameters())
    assert_same(plain, {name: expected[name] for name in plain})


class FsdpOnCpu(Accelerator):
    """Accelerator that keeps the FSDP plugin, which Accelerate leaves out on CPUs without a word."""

    def __init__(self, **settings):
        AcceleratorState._reset_state()  # else a second trainer would have the first one's settings
        super().__init__(**settings)
        PartialState().distributed_type = self.state.distributed_type = DistributedType.FSDP
        self.state.fsdp_plugin = settings["fsdp_plugin"]


UNTIED = LlamaConfig(**SIZES, num_attention_heads=2, num_key_value_heads=1)  # Accelerate refuses tied ones under FSDP2


def test_fsdp2_has_the_bits_of_torch_and_resumes(tmp_path, monkeypatch):
    monkeypatch.setattr(transformers.trainer, "Accelerator", FsdpOnCpu)
    config = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
    sharded = config | {"state_dict_type": "SHARDED_STATE_DICT"}
    settings = {"fsdp": True, "config": UNTIED, "save_steps": 2, "max_steps": 4}

    def work():
        with pytest.raises(ValueError, match="SHARDED_STATE_DICT"):  # the default of transformers is FULL_STATE_DICT
            trained("ours", tmp_path, fsdp_config=config, **settings)
        found = {kind: trained(kind, tmp_path / kind, fsdp_config=sharded, **settings) for kind in KINDS}
        return found, again("checkpoint-2", **settings)

    def again(checkpoint, **settings):
        at = {kind: (tmp_path / kind, str(tmp_path / kind / checkpoint)) for kind in KINDS}
        return {kind: resumed(kind, *at[kind], fsdp_config=sharded, **settings) for kind in KINDS}

    found, two = on(2, work)
    three = on(3, lambda: again("checkpoint-2", **settings | {"max_steps": 3, "save_steps": 3}))
    one = on(1, lambda: again("checkpoint-3", **settings | {"save_strategy": "no"}))
    for at in (0, 1):
        for kind in KINDS:
            assert_same(two[kind][2 + at], found[kind][at])
            assert_same(three[kind][at], two[kind][at])
            assert_same(one[kind][at], three[kind][2 + at])
        assert_same(found["ours"][at], found["torch"][at])
        for run in (two, three, one):
            assert_same(run["ours"][2 + at], run["torch"][2 + at])
    assert found["ours"][2] == found["torch"][2]
    assert not torch.equal(found["ours"][0]["model.norm.weight"], found["ours"][1]["model.norm.weight"])
    for kind in ("ours", "adamw"):
        check_average(tmp_path / kind, one[kind][3])


def evaluated(folder):
    """By which weights the metrics, and the weights that the best metric was of, were computed."""
    found = {}

    def compute(prediction):
        return {"sum": float(prediction.predictions[0].astype("float64").sum())}

    trainer = make(
        "adamw",
        folder,
        {"compute_metrics": compute, "evaluate_on": "mean"},
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        max_steps=6,
        learning_rate=0.1,
        save_total_limit=1,
        lr_scheduler_type="constant",
    )

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            with trainer.averaged_parameters():  # the one to evaluate on
                found[state.global_step] = weights(trainer)

    trainer.add_callback(Watch())
    trainer.train()
    best = trainer.state.best_global_step
    assert_same(weights(trainer), found[best])
    assert trainer.averages is None
    metric = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    assert trainer.evaluate()["eval_loss"] == metric[best]
    return best, metric


@pytest.mark.parametrize("ranks", [0, 2])
def test_the_best_model_is_the_average_that_was_best(ranks, tmp_path):
    best, metric = on(ranks, evaluated, tmp_path)
    assert metric[best] == min(metric.values())


class OnSigterm(TrainerCallback):
    """Asks for a checkpoint at a step, as the handler of SIGTERM does after three seconds."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            jit = next(one for one in self.trainer.callback_handler.callbacks if hasattr(one, "jit_manager"))
            jit.jit_manager.is_checkpoint_requested = True


def test_a_checkpoint_is_whole_on_sigterm_and_before_older_ones_are_deleted(tmp_path, monkeypatch):
    def work(kind):
        settings = {"enable_jit_checkpoint": True, "save_steps": 1, "save_total_limit": 1}
        rotate, kept = transformers.trainer.rotate_checkpoints, []

        def watched(**how):
            kept.append(all((path / "dist_asgd").exists() for path in (tmp_path / kind).glob("checkpoint-*")))
            rotate(**how)

        monkeypatch.setattr(transformers.trainer, "rotate_checkpoints", watched)
        stop = OnSigterm(3)
        stop.trainer = make(kind, tmp_path / kind, {"callbacks": [stop]}, **settings)
        stop.trainer.train()
        again = resumed(kind, tmp_path / kind, True, **settings)
        return kept, again[2:4], trained(kind, tmp_path / "once", save_strategy="no")

    for kind in ("ours", "adamw"):
        kept, again, once = on(0, work, kind)
        assert len(kept) > 6 and all(kept)
        assert_same(again[0], once[0])
        assert_same(again[1], once[1])


def test_the_callback_in_a_plain_trainer(tmp_path):
    def work():
        callback = AveragingCallback({"ema": EMA(0.5), "mean": Uniform()})
        trainer = make("plain", tmp_path, {"callbacks": [callback]}, max_steps=3)
        trainer.train()
        return (weights(trainer), averages(trainer, callback.averages)), trained(
            "adamw", tmp_path / "other", max_steps=3
        )

    found, expected = on(0, work)
    assert_same(found[0], expected[0])
    assert_same(found[1], expected[1])


def test_a_callback_resumes_no_averages_of_other_weights(tmp_path):
    """It is not told which checkpoint a plain trainer resumes, and finds one of that step in ``output_dir``."""

    def work():
        def trainer(folder, **settings):
            callback = AveragingCallback(EMA(0.5))
            return callback, make("plain", tmp_path / folder, {"callbacks": [callback]}, **settings)

        for folder, learning_rate in (("own", 0.01), ("other", 0.02)):
            trainer(folder, max_steps=3, learning_rate=learning_rate)[1].train()
        with pytest.raises(CheckpointError, match="saved beside other weights than those that are resumed"):
            trainer("own")[1].train(resume_from_checkpoint=str(tmp_path / "other" / "checkpoint-3"))
        callback, resumed = trainer("own", max_steps=4, learning_rate=0.01)
        resumed.train(resume_from_checkpoint=True)
        assert callback.averages.updates == 4

    on(0, work)


def test_what_would_lose_averages_is_refused(tmp_path):
    def work():
        with pytest.raises(ValueError, match="save_only_model"):
            make("adamw", tmp_path, save_only_model=True)
        with pytest.raises(ValueError, match="a callback is not told"):
            make("plain", tmp_path, {"callbacks": [AveragingCallback(EMA(0.5))]}, enable_jit_checkpoint=True)
        make("plain", tmp_path, max_steps=2, save_steps=1).train()
        for kind in ("ours", "adamw"):
            with pytest.raises((CheckpointError, ValueError), match=r"does not exist|state dict"):
                make(kind, tmp_path).train(resume_from_checkpoint=True)
        trainer = make("adamw", tmp_path)
        trainer._averaging._average = None
        with pytest.raises(ValueError, match="no average is kept"):
            trainer.train()

    on(0, work)


def test_asgd_in_a_plain_trainer_cannot_lose_the_shards_of_others(tmp_path):
    def work():
        with pytest.raises(ValueError, match="begin them at different steps"):
            make("adamw", tmp_path, enable_jit_checkpoint=True)
        options = OPTIONS | {"gradients": "reduced"}
        trainer = make("plain", tmp_path, {"optimizer_cls_and_kwargs": (ShardedASGD, options)}, max_steps=1)
        if trainer.args.process_index:
            trainer.args.save_strategy = "no"
        with contextlib.ExitStack() as stack:
            if not trainer.args.process_index:
                stack.enter_context(pytest.raises(pickle.PicklingError, match="full_state_dict"))
            trainer.train()

    run_launched(2, work)


@pytest.mark.parametrize("title", ["transformers", "PyTorch with PEFT and TensorBoard"])
def test_the_guide(title, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert 1 < len(added_lines(title)) <= 4
    on(0, lambda: run_section(title) and None)
    (tmp_path / "two").mkdir()
    monkeypatch.chdir(tmp_path / "two")
    on(2, lambda: run_section(title) and None)
    expected = (
        {"best/model.safetensors"} if title == "transformers" else {"adapter/adapter_model.safetensors", "curves"}
    )
    assert all((tmp_path / folder / name).exists() for folder in (".", "two") for name in expected)
