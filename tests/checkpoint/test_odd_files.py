"""What a load opens is a regular file of bounded size: anything else is an error at once, not a wait or much memory."""

import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import dist_asgd
from dist_asgd.checkpoint import CheckpointError
from dist_asgd.checkpoint.format.manifest import MAX_MANIFEST, check_size
from dist_asgd.cli.main import main
from tests.support.ranks import message_of, run_alone

NAMES = ("manifest.json", ".metadata", "__0_0.distcp")


def make_socket(path: str) -> None:
    folder, name = os.path.split(path)
    os.chdir(folder)  # the address of a socket is short
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(name)


def make_huge(path: str) -> None:
    with open(path, "wb") as file:
        file.truncate(MAX_MANIFEST + 1)


KINDS: dict[str, Callable[[str], None]] = {
    "a FIFO": os.mkfifo,
    "a character device": lambda path: os.symlink("/dev/zero", path),
    "a socket": make_socket,
    "a directory": os.mkdir,
    "huge": make_huge,
    "a dangling link": lambda path: os.symlink("nothing", path),
}


def look_at(folder: Path, kind: str) -> None:
    with dist_asgd.Checkpointer(folder / "good") as checkpointer:
        good = Path(checkpointer.save(1, {"model": {"w": torch.ones(2000)}}))
    for name in NAMES:
        for is_stock in (False, True):
            run = folder / f"{name}-{is_stock}"
            odd = run / good.name
            shutil.copytree(good, odd)
            if is_stock and name != "manifest.json":
                os.remove(odd / "manifest.json")
            os.remove(odd / name)
            KINDS[kind](str(odd / name))
            state = {"model": {"w": torch.zeros(2000)}}
            message = message_of(lambda state=state, odd=odd: dist_asgd.load(odd, state), CheckpointError)
            assert state["model"]["w"].sum() == 0
            is_read = name == "manifest.json" or (is_stock and name == ".metadata")
            if is_read and kind == "huge":
                limit = MAX_MANIFEST if name == "manifest.json" else 2**28
                assert f"has {MAX_MANIFEST + 1} bytes, expected at most {limit}" in message, message
            elif name == "manifest.json" and kind not in ("a directory", "a dangling link"):
                assert f"{odd}: {name} is empty, or it is no regular file" in message, message
            elif is_read and kind not in ("a directory", "a dangling link"):
                assert f"{odd}/{name}" in message and f"it is {kind}, expected a regular file" in message, message
            for command in (["ls", run], ["show", odd], ["verify", odd], ["export", odd, folder / "out.pt"]):
                status = main([*map(str, command)])
                may_be_fine = command[0] == "ls" or (command[0] == "show" and name != "manifest.json")
                assert status in (1, 3) or (status == 0 and may_be_fine), command


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_is_none_is_an_error_at_once(tmp_path, kind, capfd):
    run_alone(look_at, tmp_path, kind)


def test_a_million_entries_fit_into_a_manifest():
    check_size(1_000_000 * (512 * 8 + 150))  # all checksums that an item can have, and the rest of an entry
    with pytest.raises(CheckpointError, match=r"manifest\.json has \d+ bytes, expected at most"):
        check_size(2**40)
