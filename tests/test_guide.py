"""docs/guide: every block of code is run, the Python ones from top to bottom on several numbers of ranks."""

import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch

from dist_asgd import Checkpointer, PolynomialDecay, ShardedASGD, Uniform
from dist_asgd.cli.main import main
from tests.support.ranks import run_alone, run_ranks

ROOT = Path(__file__).parent.parent
GUIDE = ROOT / "docs" / "guide"
sys.path.insert(0, str(ROOT / "launch"))  # where train.py finds its neighbours

import train  # noqa: E402

FENCED = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# The page of frameworks is run by tests/integrations.
BLOCKS = {path.stem: FENCED.findall(path.read_text()) for path in GUIDE.glob("*.md") if path.stem != "frameworks"}
COMMANDS = [
    (page, command.strip())
    for page, blocks in sorted(BLOCKS.items())
    for language, text in blocks
    if language == "sh"
    for command in text.splitlines()
]
RUNS = [("averaging", 0), ("averaging", 2), ("parallelism", 2), ("parallelism", 4), ("export", 0), ("export", 2)]
RUNS += [("merging", 0), ("merging", 2)]


def run_page(page, language="python"):
    """Runs the blocks of a page as one program; errors name the block's line in the page."""
    text = (GUIDE / f"{page}.md").read_text()
    names = {"__name__": "guide"}
    for kind, block in BLOCKS[page]:
        if kind == language:
            lines = text[: text.index(f"```{kind}\n{block}")].count("\n") + 1
            exec(compile("\n" * lines + block, f"{page}.md", "exec"), names)
    return names


def pages_on(ranks, page):
    def work(rank):
        torch.manual_seed(rank)
        names = run_page(page)
        return {name: names[name] for name in ("raw", "averaged", "losses", "norm", "start", "known") if name in names}

    return [run_alone(work, 0)] if ranks == 0 else run_ranks(ranks, work, timeout=120)


def test_every_block_has_a_language_that_is_run():
    assert set(BLOCKS) == {"averaging", "parallelism", "checkpoints", "export", "merging", "cli"}
    kinds = {(page, kind) for page, blocks in BLOCKS.items() for kind, _ in blocks}
    assert {kind for _, kind in kinds} == {"python", "python gpu", "sh"}
    run = {page for page, _ in RUNS} | {"checkpoints"}
    assert {page for page, kind in kinds if kind == "python"} == run
    for page, blocks in BLOCKS.items():
        assert (GUIDE / f"{page}.md").read_text().count("```") == 2 * len(blocks)


@pytest.mark.parametrize(("page", "ranks"), RUNS)
def test_a_page_on_ranks(page, ranks, tmp_path, monkeypatch):
    """0 ranks: one process without a process group."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # the ranks talk by gloo
    found = pages_on(ranks, page)
    if page == "averaging":
        assert all(names["losses"].keys() == {"mean", "ema", "late", "tail"} for names in found)
        assert all(names["raw"] != names["averaged"] for names in found)
    if page == "export":
        assert {path.name for path in tmp_path.iterdir()} >= {"shipped", "model.safetensors", "model.pt", "shards"}
        weights = torch.load(tmp_path / "weights.pt")
        shipped = torch.load(tmp_path / "model.pt")
        assert all(torch.equal(weights[name], tensor) for name, tensor in shipped.items()) and len(shipped) == 4


def test_checkpoints_on_two_ranks_and_then_on_three(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [(names["start"], names["known"]) for names in pages_on(2, "checkpoints")] == [(0, [5, 6])] * 2
    assert [(names["start"], names["known"]) for names in pages_on(3, "checkpoints")] == [(6, [5, 6, 11, 12])] * 3


@pytest.mark.gpu
def test_the_blocks_for_a_gpu():
    if not run_alone(torch.cuda.is_available):  # in a child: CUDA does not survive a fork
        pytest.skip("there is no CUDA GPU")

    def alone():
        names = run_page("parallelism", "python gpu")
        assert names["opt"].state_dict()["state"][0]["step"] == 4  # three steps, and one of the graph's

    run_alone(alone)


def test_the_blocks_for_a_gpu_are_python():
    found = [(page, block) for page, blocks in BLOCKS.items() for kind, block in blocks if kind == "python gpu"]
    assert [page for page, _ in found] == ["parallelism"]
    for page, block in found:
        assert {"ShardedASGD", "opt", "graph"} <= set(compile(block, page, "exec").co_names)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with steps 5 and 10 and an average, and a config.json beside it."""
    folder = tmp_path_factory.mktemp("guide")

    def save():
        model = torch.nn.Linear(8, 4)
        averages = {"mean": Uniform(), "wide": PolynomialDecay(6.94), "narrow": PolynomialDecay(16.97)}
        optimizer = ShardedASGD(model.named_parameters(), lr=0.1, t0=0, average=averages)
        with Checkpointer(folder / "run") as checkpointer:
            for step in range(1, 11):
                model(torch.ones(2, 8)).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
                if step % 5 == 0:
                    checkpointer.save(step, {"model": model, "optimizer": optimizer})

    run_alone(save)
    (folder / "config.json").write_text("{}")
    return folder


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")  # torch.nn.Transformer() by itself
@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=[command for _, command in COMMANDS])
def test_a_command(page, command, run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(shutil.copytree(run, tmp_path / "here"))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")  # what watch runs
    program, *arguments = shlex.split(command, comments=True)
    if program == "dist-asgd":
        assert main([argument.replace("s3://bucket/run", "run") for argument in arguments]) == 0
        if arguments[0] in ("export", "merge"):
            assert list(Path(arguments[2]).rglob("model.safetensors") if arguments[2][-1] == "/" else [arguments[2]])
    elif program == "torchrun":
        assert arguments[:3] == ["--nproc-per-node", "2", "launch/train.py"]
        assert train.parse_args(arguments[3:]).out == "runs/a"
    else:
        extra = re.fullmatch(r"pip install \.\[(\w+)\]", " ".join([program, *arguments]))
        assert re.search(rf"^{extra[1]} = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)


def help_of(capsys, *command):
    with pytest.raises(SystemExit):
        main([*command, "--help"])
    return capsys.readouterr().out


def test_every_subcommand_and_option_is_in_the_guide(capsys):
    text = (GUIDE / "cli.md").read_text()
    commands = re.findall(r"^    (\w+) ", help_of(capsys), re.MULTILINE)
    assert {"ls", "show", "verify", "export", "merge", "gc", "watch", "plan"} <= set(commands)
    for name in commands:
        options = set(re.findall(r"--[a-z-]+", help_of(capsys, name))) - {"--help"}
        missing = sorted(option for option in options if option not in text)
        assert f"dist-asgd {name} " in text and not missing, f"docs/guide/cli.md does not show {name} {missing}"
