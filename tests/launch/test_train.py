"""launch/train.py for real: under torchrun, stopped by signals, resumed on other numbers of ranks."""

import contextlib
import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._pytree import tree_leaves, tree_leaves_with_path

import dist_asgd
from tests.support.ranks import message_of, run_alone, run_launched, run_ranks

LAUNCH = Path(__file__).parents[2] / "launch"
sys.path.insert(0, str(LAUNCH))  # where its files find each other

import checkpoints  # noqa: E402
import console  # noqa: E402
import data  # noqa: E402
import parallel  # noqa: E402
import report  # noqa: E402
import train  # noqa: E402
from model import build_model  # noqa: E402
from run import Progress  # noqa: E402
from world import PREEMPTED, World  # noqa: E402

ALONE = World(0, 1, torch.device("cpu"), None)
STEPS = 160
T0 = 40
PATIENCE = 180  # seconds, on a busy machine


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A glob of two files, which are read in the order of their names."""
    folder = tmp_path_factory.mktemp("texts")
    for name in ("train.py", "data.py"):
        (folder / f"{name}.txt").write_bytes((LAUNCH / name).read_bytes())
    return f"file://{folder}/*.txt"


def options(texts: str, run: Path, *more: str) -> list[str]:
    small = "--width 16 --layers 1 --heads 4 --length 16 --batch 8 --held-out-bytes 2000 --eval-every 20 --lr 0.5"
    saves = f"--out {run} --checkpoint-dir {run}/checkpoints --checkpoint-every 100 --steps {STEPS} --t0 {T0}"
    return [*small.split(), *saves.split(), "--data", texts, *more]


@contextlib.contextmanager
def torchrun(ranks: int, arguments: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    process = subprocess.Popen(
        [*command, str(LAUNCH / "train.py"), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            process.communicate(timeout=PATIENCE)


def wait_for_step(process: subprocess.Popen[str], run: Path, step: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while not any(record["step"] >= step for record in curves(run)):
        assert process.poll() is None, f"ended before step {step}:\n{process.communicate()[0]}"
        assert time.monotonic() < deadline, f"no step {step} after {PATIENCE} s"
        time.sleep(0.03)


def curves(run: Path) -> list[dict[str, Any]]:
    """The records that do not depend on where a run was stopped."""
    with contextlib.suppress(json.JSONDecodeError):  # read while it is written
        return [
            {key: r[key] for key in ("step", "raw", "uniform", "recent", "best", "train")}
            for r in report.read_metrics(str(run))
        ]
    return []


def alone(arguments: Sequence[str]) -> None:
    """One process without torchrun."""
    run_alone(train.main, arguments, timeout=PATIENCE)


def directory(checkpoints: Path | str, step: int) -> str:
    """Of the complete checkpoint of a step."""
    (found,) = Path(checkpoints).glob(f"step-{step:08d}-*")
    assert (found / "manifest.json").exists()
    return str(found)


def ranks_of(process: subprocess.Popen[str]) -> list[int]:
    """The processes that torchrun has started."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return sorted(map(int, children.split()))


@pytest.fixture(scope="module")
def uninterrupted(texts: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("uninterrupted")
    run_launched(2, train.main, options(texts, run), timeout=PATIENCE)
    return run


def test_stops_resumes_and_finishes(
    texts: str, uninterrupted: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Two ranks; SIGTERM to torchrun; two ranks; SIGTERM to one of them; three forked ranks under another layout."""
    expected = curves(uninterrupted)
    with torchrun(2, options(texts, tmp_path)) as process:
        wait_for_step(process, tmp_path, 20)
        process.terminate()
        output = process.communicate(timeout=PATIENCE)[
            0
        ]  # torchrun itself then fails; what counts is what the ranks did
    stopped = re.search(r"Stopped by a signal after step (\d+)", output)
    assert stopped, output
    assert directory(tmp_path / "checkpoints", int(stopped[1]))

    with torchrun(2, options(texts, tmp_path)) as process:
        wait_for_step(process, tmp_path, T0 + 20)
        os.kill(ranks_of(process)[1], signal.SIGTERM)
        output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1 and re.search(rf"exitcode *: {PREEMPTED} ", output), output  # not as if finished
    assert f"Going on from step {stopped[1]}, saved by 2 ranks" in output
    stopped = re.search(r"Stopped by a signal after step (\d+)", output)
    assert stopped, output
    so_far = curves(tmp_path)
    assert T0 + 20 <= so_far[-1]["step"] < STEPS
    assert so_far == expected[: len(so_far)]  # the same bits as without a stop

    capfd.readouterr()
    run_launched(3, train.main, options(texts, tmp_path, "--parallel", "fsdp"), timeout=PATIENCE)
    output = capfd.readouterr().out
    assert "3 × cpu, --parallel fsdp" in output
    assert f"Going on from step {stopped[1]}, saved by 2 ranks" in output
    finished = curves(tmp_path)
    assert [record["step"] for record in finished] == list(range(20, STEPS + 1, 20))
    for mine, other in zip(finished, expected, strict=True):
        assert mine == pytest.approx(other, abs=3e-4)  # another order of summation on three ranks
    last = report.read_metrics(str(tmp_path))[-1]
    assert last["world_size"] == 3
    assert last["optimizer_bytes"] < 0.5 * last["torch_bytes"]
    assert (tmp_path / "loss.png").stat().st_size > 10_000
    assert len(report.table(report.read_metrics(str(tmp_path))).splitlines()) == 3


@pytest.mark.parametrize(("ranks", "model"), [(4, "gpt"), (2, "lstm")], ids=lambda value: str(value))
def test_every_layout_trains_alike_and_reads_the_checkpoints_of_the_others(
    texts: str, tmp_path: Path, ranks: int, model: str
) -> None:
    """Neither the batch nor the held-out text divides by the ranks."""
    modes = [mode for mode in parallel.MODES if model == "gpt" or "tp" not in mode]
    more = ["--model", model, "--dropout", "0.3", "--batch", "7", "--held-out-bytes", "2070", "--t0", "10"]
    records, urls = run_ranks(ranks, train_and_copy, options(texts, tmp_path, *more), modes, timeout=PATIENCE)[0]
    for mode, record in records.items():
        for key in ("raw", "uniform", "recent", "train", "torch_bytes"):
            assert record[key] == pytest.approx(records["zero"][key], rel=1e-5), (mode, key)
        assert record["optimizer_bytes"] < 1.1 * record["torch_bytes"] / ranks, mode
    assert records["zero"]["raw"] != pytest.approx(records["zero"]["uniform"], rel=1e-4)
    first, *others = run_alone(contents, urls)
    assert first["progress"]["losses"] > 0
    names, leaves = zip(*tree_leaves_with_path(first), strict=True)
    assert sum(isinstance(leaf, torch.Tensor) for leaf in leaves) > 20
    for url, other in zip(urls[1:], others, strict=True):
        for name, mine, its in zip(names, leaves, tree_leaves(other), strict=True):
            assert torch.equal(mine, its) if isinstance(mine, torch.Tensor) else mine == its, (url, name)


def train_and_copy(rank: int, arguments: Sequence[str], modes: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """A record of each mode after 20 steps; zero's checkpoint, its copy by the next mode, a copy of that, and so on."""
    world = World(rank, dist.get_world_size(), torch.device("cpu"), dist.new_group(backend="gloo"))
    records: dict[str, Any] = {}
    for mode in modes:
        run = train.build_run(train.parse_args([*arguments, "--parallel", mode]), world)
        progress = Progress()
        for step in range(1, 21):
            progress.losses += train.train_step(run, step)
            progress.seen += run.args.batch
            progress.step = step
        if mode == "zero":
            checkpoints.save(run, progress)
        records[mode] = train.evaluate(run, progress)
    urls = [directory(run.args.checkpoint_dir, 20)]
    for mode in (*modes[1:], "zero"):
        place = ["--checkpoint-dir", f"{run.args.checkpoint_dir}/copy-{len(urls)}", "--resume", urls[-1]]
        copy = train.build_run(train.parse_args([*arguments, "--parallel", mode, *place]), world)
        checkpoints.save(copy, train.resume(copy))
        urls.append(directory(copy.args.checkpoint_dir, 20))
    return records, urls


def contents(urls: Sequence[str]) -> list[dict[str, Any]]:
    """All that is in each checkpoint."""
    found: list[dict[str, Any]] = [{} for _ in urls]
    for url, state in zip(urls, found, strict=True):
        dist_asgd.load(url, state)
    return found


def test_layouts_that_cannot_be(texts: str, tmp_path: Path) -> None:
    def refusal(mode: str, ranks: int, *more: str) -> str:
        control: Any = None if ranks == 1 else object()  # not used
        args = train.parse_args(options(texts, tmp_path, "--parallel", mode, *more))
        return message_of(lambda: train.build_run(args, World(0, ranks, ALONE.device, control)), SystemExit)

    for mode in set(parallel.MODES) - {"zero"}:
        assert f"--parallel {mode} needs ranks: start it with torchrun" in refusal(mode, 1)
    assert "--parallel hsdp needs an even number of ranks, and here are 3" in refusal("hsdp", 3)
    assert "--parallel fsdp+tp needs an even number of ranks, and here are 5" in refusal("fsdp+tp", 5)
    assert "--parallel tp deals out heads to 8 ranks: make --heads 4 a multiple" in refusal("tp", 8)
    assert "--parallel fsdp+tp deals out heads to 2 ranks: make --heads 1" in refusal("fsdp+tp", 4, "--heads", "1")
    assert "--batch makes 8 sequences; 9 ranks want one each" in refusal("fsdp", 9)
    few = ("--batch", "9", "--held-out-bytes", "130")
    assert "--held-out-bytes makes 8 sequences; 9 ranks want one each" in refusal("zero", 9, *few)


def test_averaging_helps(texts: str, tmp_path: Path) -> None:
    alone(options(texts, tmp_path, "--steps", "400", "--t0", "300", "--lr", "3"))
    last = curves(tmp_path)[-1]
    assert last["uniform"] < last["raw"] - 0.05  # 0.09 on one kind of processor, over 0.1 on another
    assert last["recent"] < last["raw"] - 0.05


def test_a_resume_between_two_evaluations(texts: str, tmp_path: Path) -> None:
    """What was measured since the last one is saved as well. The path has characters that mean something in a glob."""
    every = ["--steps", "80", "--eval-every", "40", "--checkpoint-every", "30"]
    alone(options(texts, tmp_path / "whole", *every))
    for step in (30, 60):
        run = tmp_path / f"from-{step}-[1]*"
        alone(options(texts, run, *every, "--resume", directory(tmp_path / "whole/checkpoints", step)))
        assert curves(run) == [record for record in curves(tmp_path / "whole") if record["step"] > step]
    alone(options(texts, run, *every, "--steps", "120"))
    assert curves(run)[-2]["step"] == 80 and directory(run / "checkpoints", 120)
    assert 30 not in dist_asgd.Checkpointer(run / "checkpoints").steps(), "it began again"


def test_a_damaged_checkpoint_is_told_with_the_way_out(texts: str, tmp_path: Path) -> None:
    short = options(texts, tmp_path, "--eval-every", "10", "--checkpoint-every", "10")
    alone([*short, "--steps", "20"])
    expected = curves(tmp_path)
    (file,) = Path(directory(tmp_path / "checkpoints", 20)).glob("*.distcp")
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 2] ^= 1  # in a tensor: the facts of the checkpoint can be read
    file.write_bytes(damaged)
    text = run_alone(message_of, lambda: train.main([*short, "--steps", "20"]), SystemExit)
    assert "is damaged" in text and "--resume fallback" in text
    alone([*short, "--steps", "20", "--resume", "fallback"])
    assert curves(tmp_path) == expected
    alone([*short, "--steps", "30", "--keep-last", "2"])
    assert dist_asgd.Checkpointer(tmp_path / "checkpoints").steps() == [20, 30]


def test_one_process_goes_on_where_two_ranks_were(texts: str, uninterrupted: Path, tmp_path: Path) -> None:
    saved = directory(uninterrupted / "checkpoints", 100)
    watched = ["--metrics-file", f"{tmp_path}/run.prom", "--tensorboard", f"{tmp_path}/tensorboard"]
    alone(options(texts, tmp_path, "--resume", saved, "--export", f"{tmp_path}/average.pt", *watched))
    published = (tmp_path / "run.prom").read_text()
    for line in (f'dist_asgd_step{{group="0"}} {STEPS}.0', "dist_asgd_finished 1.0", "dist_asgd_preempted 0.0"):
        assert line in published.splitlines()
    assert list((tmp_path / "tensorboard").iterdir())
    for mine, other in zip(curves(tmp_path), curves(uninterrupted)[5:], strict=True):
        assert mine == pytest.approx(other, abs=3e-4)
    exported = torch.load(tmp_path / "average.pt", weights_only=True)
    expected = run_alone(averages, directory(tmp_path / "checkpoints", STEPS))
    assert exported.keys() == expected.keys()
    assert all(torch.equal(exported[name], average) for name, average in expected.items())


def averages(url: str) -> dict[str, torch.Tensor]:
    model = build_model("gpt", width=16, layers=1, heads=4, context=16, dropout=0)
    dist_asgd.load(url, {"model": model}, average="recent")
    return model.state_dict()


def test_an_lstm_with_dropout_resumes_with_the_same_bits(texts: str, tmp_path: Path) -> None:
    lstm = ["--model", "lstm", "--dropout", "0.3", "--t0", "15"]
    alone(options(texts, tmp_path / "whole", *lstm, "--steps", "40"))
    alone(options(texts, tmp_path / "parts", *lstm, "--steps", "20"))
    alone(options(texts, tmp_path / "parts", *lstm, "--steps", "40"))
    assert curves(tmp_path / "parts") == curves(tmp_path / "whole")
    assert len(curves(tmp_path / "parts")) == 2


def test_the_progress_bar_and_the_plot_are_optional(
    texts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "tqdm", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    alone(options(texts, tmp_path, "--steps", "20"))
    printed = capfd.readouterr().out
    assert "tqdm is not installed, so there is no progress bar: pip install" in printed
    assert "matplotlib is not installed, so there is no loss.png: pip install" in printed
    assert len(curves(tmp_path)) == 1


def test_an_older_checkpoint_is_not_gone_on_from_where_there_are_later_ones(texts: str, uninterrupted: Path) -> None:
    """From an older one a run would go on twice: the next time, from the newest."""
    older = directory(uninterrupted / "checkpoints", 100)
    arguments = options(texts, uninterrupted, "--resume", older)
    assert "later checkpoint" in run_alone(message_of, lambda: train.main(arguments), SystemExit)


def test_the_data_of_a_step_does_not_depend_on_the_number_of_ranks() -> None:
    text = torch.arange(5000).to(torch.uint8)
    for batch in (8, 16, 17):
        whole = data.sequences(text, range(batch), seed=1, step=5, length=32)
        for world_size in range(1, 9):
            shares = [data.rank_share(batch, rank, world_size) for rank in range(world_size)]
            assert [i for share in shares for i in share] == list(range(batch))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1
            parts = [data.sequences(text, share, seed=1, step=5, length=32) for share in shares]
            for part in (0, 1):
                assert torch.equal(torch.cat([p[part] for p in parts]), whole[part])
    assert not torch.equal(whole[0], data.sequences(text, range(17), seed=1, step=6, length=32)[0])


def test_every_held_out_byte_is_predicted_once() -> None:
    text = torch.arange(3900).to(torch.uint8)  # 389 rows, of which two ranks or three have 3 batches, or 2 and a bit
    for world_size in (1, 2, 3, 389):
        batches = [list(data.held_out_batches(text, rank, world_size, length=10)) for rank in range(world_size)]
        assert torch.equal(torch.cat([y.flatten() for of_rank in batches for _, y in of_rank]), text[1:3891].long())
        assert len(set(map(len, batches))) == 1  # ranks wait for each other in forward
        assert all(1 <= len(y) <= 64 for of_rank in batches for _, y in of_rank)


def test_text_is_read_in_a_fixed_order(tmp_path: Path) -> None:
    for name, content in (("b.txt", b"bbbb"), ("a.txt", b"aaaa"), ("empty.txt", b""), ("c.md", b"cccc")):
        (tmp_path / name).write_bytes(content)
    read = data.read_text([f"file://{tmp_path}/*.txt", f"{tmp_path}/c.md"], max_bytes=11, held_out_bytes=2)
    assert bytes(read.train) + bytes(read.held_out) == b"aaaabbbbccc"
    assert bytes(data.read_text([str(tmp_path)], max_bytes=99, held_out_bytes=2).train) == b"aaaabbbbcc"
    standard = data.read_text([], max_bytes=200_000, held_out_bytes=1000)
    assert standard.digest == data.read_text([], max_bytes=200_000, held_out_bytes=1000).digest
    assert b"import" in bytes(standard.train)


def test_sentences_for_mistakes(texts: str, uninterrupted: Path, tmp_path: Path) -> None:
    def read(*urls: str, held_out: int = 100) -> Any:
        return data.read_text(urls, max_bytes=1000, held_out_bytes=held_out)

    assert "there is no file with text there" in message_of(lambda: read(f"{tmp_path}/*.txt"), SystemExit)
    assert "fewer than twice" in message_of(lambda: read(texts, held_out=900), SystemExit)
    (tmp_path / "book[1].txt").write_bytes(b"x" * 500)
    assert len(read(f"{tmp_path}/book[1].txt").train) == 400
    assert "--data nosuch://x" in message_of(lambda: read("nosuch://x"), SystemExit)
    checkpoint = directory(uninterrupted / "checkpoints", 100)
    was = {"--seed=7": "seed = 0, and this one has 7", "--width=32": "width = 16, and this one has 32"}
    for other, found in was.items():
        arguments = options(texts, tmp_path, "--resume", checkpoint, other)
        message = run_alone(message_of, functools.partial(train.main, arguments), SystemExit)
        assert f"is of a run with {found}" in message


WRONG = {
    "--out=": "must not be empty",
    "--data=": "must not be empty",
    "--lr=inf": "--lr must be",
    "--lambd=nan": "--lambd must be",
    "--t0=nan": "--t0 must be",
    "--clip=-1": "--clip must be",
    "--dropout=1": "--dropout must be",
    "--seed=99999999999999999999": "--seed must be",
    "--timeout=nan": "--timeout must be",
    "--max-failed-saves=0": "--max-failed-saves must be",
    "--steps=0": "--steps must be",
    "--width=7": "--width must be",
    "--parallel=dp": "invalid choice: 'dp'",
    "--parallel=fsdp+tp --model=lstm": "--model lstm cannot be cut",
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_arguments_exit_with_2_and_a_reason(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        train.parse_args(wrong.split())
    assert caught.value.code == 2
    assert WRONG[wrong] in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--out", "--checkpoint-dir"])
def test_a_place_that_cannot_be_written_to_ends_all_ranks_at_the_start(
    texts: str, tmp_path: Path, option: str, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a file").write_text("")
    arguments = options(texts, tmp_path / "run", option, f"{tmp_path}/a file/x")
    codes = run_launched(2, message_of, lambda: train.main(arguments), SystemExit, timeout=PATIENCE)
    assert f"{tmp_path}/a file/x: " in codes[0] and codes[1] == "SystemExit: 1", codes
    assert not any(capfd.readouterr())
