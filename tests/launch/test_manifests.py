"""Scripts and manifests of launch/ for several hosts: they parse, and pass only options that exist."""

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed.run import get_args_parser

LAUNCH = Path(__file__).parents[2] / "launch"
sys.path.insert(0, str(LAUNCH))  # where its files find each other

import train  # noqa: E402

SHELL = ("multinode.sh", "slurm.sbatch")
ENVIRONMENT = re.compile(r'"?\$\{?[A-Z_]+[^\s"]*"?')


def manifest(name: str) -> Any:
    return yaml.safe_load((LAUNCH / name).read_text())


def skypilot_command() -> list[str]:
    script = manifest("skypilot.yaml")["run"]
    return shlex.split(script[script.index("torchrun") :].replace("\\\n", " "))


def kubernetes_command() -> list[str]:
    trainer = manifest("k8s.yaml")["spec"]["trainer"]
    return [*trainer["command"], *trainer["args"]]


def slurm_command() -> list[str]:
    script = (LAUNCH / "slurm.sbatch").read_text().replace("\\\n", " ")
    line = re.search(r"^srun .*?(torchrun .*) &$", script, re.MULTILINE)
    assert line is not None
    return shlex.split(line[1])


def example_of_multinode() -> list[str]:
    """The command in the script's own comment, with the options that the script adds."""
    script = (LAUNCH / "multinode.sh").read_text()
    example = re.search(r"#   bash launch/multinode.sh \S+ \S+ (.*\\\n#.*)$", script, re.MULTILINE)
    options = re.search(r"^options=\((.*?)^\)", script, re.MULTILINE | re.DOTALL)
    assert example is not None
    assert options is not None
    own = re.sub(r"^\s*#.*$", "", options[1].replace("\\\n", ""), flags=re.MULTILINE)
    return ["torchrun", *shlex.split(own, comments=True), *shlex.split(example[1].replace("\\\n#", " "))]


@pytest.mark.parametrize("name", SHELL)
def test_scripts_are_valid_bash(name: str) -> None:
    subprocess.run(["bash", "-n", LAUNCH / name], check=True)


@pytest.mark.parametrize("command", [skypilot_command, kubernetes_command, slurm_command, example_of_multinode])
def test_every_option_exists_in_torchrun_and_in_train(command: Any) -> None:
    words = command()
    assert words[0] == "torchrun"
    at = words.index("launch/train.py")
    numbers = ["1" if ENVIRONMENT.fullmatch(word) else word for word in words[1:at]]
    get_args_parser().parse_args([*numbers, "launch/train.py"])
    args = train.parse_args([word for word in words[at + 1 :] if word != "$@"])
    assert args.checkpoint_dir.endswith("checkpoints")


def test_manifests_name_their_kind() -> None:
    job = manifest("k8s.yaml")
    assert (job["apiVersion"], job["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    assert manifest("skypilot.yaml")["resources"]["use_spot"] is True


def test_multinode_says_what_it_wants() -> None:
    done = subprocess.run(["bash", LAUNCH / "multinode.sh"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "HOST:PORT MIN:MAX" in done.stderr
