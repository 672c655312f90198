"""Runs the library, the commands and launch/train.py with a secret in every place that takes one; prints all they say.

    python -m tests.support.planted_secrets FOLDER

A driver of fsspec, registered here, keeps files in memory under URLs with credentials. Told to, it fails at every
request, with errors that quote whatever it knows: its URL, its options, the environment, and errors behind the error.
"""

import contextlib
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SECRET = "sesame"
ENVIRONMENT = {
    "AWS_SECRET_ACCESS_KEY": f"{SECRET}-of-the-environment",
    "HTTPS_PROXY": f"http://me:{SECRET}-of-a-proxy@127.0.0.1:9",
}
os.environ.update(ENVIRONMENT)

import fsspec  # noqa: E402
import torch  # noqa: E402
from fsspec.implementations.memory import MemoryFileSystem  # noqa: E402

import dist_asgd  # noqa: E402
from dist_asgd.checkpoint.storage import retry  # noqa: E402
from dist_asgd.checkpoint.storage.storage import Storage  # noqa: E402
from dist_asgd.cli.main import main as command  # noqa: E402

LAUNCH = Path(__file__).parents[2] / "launch"
USER = f"me:{SECRET}%2Fof-the-url"
URL = f"loud://{USER}@host/run"
OPTIONS = {
    "token": f"{SECRET}-of-an-option",
    "client_kwargs": {
        "headers": [{"Authorization": f"Bearer {SECRET}-of-a-header"}],
        "password": f"{SECRET}1".encode(),
    },
    "proxy": f"http://me:{SECRET}-of-the-proxy@127.0.0.1:9",
}


class LoudFileSystem(MemoryFileSystem):
    """Files in memory, and errors that tell everything."""

    protocol = "loud"
    cachable = False
    fails = False

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    @classmethod
    def _strip_protocol(cls, path: Any) -> str:
        rest = str(path).removeprefix("loud://")
        return "/" + rest.rpartition("@")[2].strip("/")

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if name in ("cat_file", "pipe_file", "ls", "find", "info", "mv", "rm_file", "open", "exists", "isdir"):
            return found if not LoudFileSystem.fails else lambda *args, **kwargs: tell_everything(self.options)
        return found


def tell_everything(options: Any) -> None:
    """Raises an error with secrets in its text and arguments, in its cause, in hidden contexts, and in notes."""
    try:
        try:
            raise KeyError(f"401 for {URL}, unquoted {SECRET}/of-the-url")
        except KeyError:
            raise RuntimeError(dict(options)) from None
    except RuntimeError as error:
        raise LookupError(dict(ENVIRONMENT), repr(options)) from error


fsspec.register_implementation("loud", LoudFileSystem, clobber=True)


@contextlib.contextmanager
def said(what: str) -> Iterator[None]:
    """Prints everything about the error of the block: text, repr, traceback, and all errors behind it."""
    print(f"== {what}")
    try:
        yield
    except SystemExit as end:  # Python prints this, and nothing else
        print("exit:", end)
    except BaseException as error:
        traceback.print_exc(file=sys.stdout)
        waiting: list[BaseException | None] = [error]
        while waiting:
            if (link := waiting.pop()) is not None:
                print(link, repr(link), link.args, vars(link), getattr(link, "__notes__", ""))
                waiting += [link.__cause__, link.__context__]


def use_library(folder: str) -> None:
    state = {"model": torch.nn.Linear(2, 2)}
    storage = Storage.open(URL, OPTIONS)
    print(storage, storage.url, vars(storage), storage._store._connection)
    with said("checkpointer"), dist_asgd.Checkpointer(URL, OPTIONS, keep_last=1) as checkpointer:
        print(checkpointer, checkpointer.url, checkpointer.save(1, state), checkpointer.load(state))
        LoudFileSystem.fails = True
        calls: dict[str, Callable[[], Any]] = {
            "save": lambda: checkpointer.save(2, state),
            "save in the background": lambda: (checkpointer.save(2, state, wait=False), checkpointer.wait()),
            "load": lambda: checkpointer.load(state),
            "steps": checkpointer.steps,
            "one save": lambda: dist_asgd.save(f"{URL}/one", state, OPTIONS),
            "one load": lambda: dist_asgd.load(f"{URL}/one", state, OPTIONS),
            "export": lambda: dist_asgd.export(f"{URL}/x.pt", state["model"], storage_options=OPTIONS),
            "create": lambda: storage.create("x", b""),
            "write": lambda: storage.write("x", [b""]),
            "read": lambda: storage.read("x"),
            "ranges": lambda: list(storage.read_ranges([("x", 0, 1)])),
            "list": storage.list,
            "sizes": storage.sizes,
            "remove": lambda: storage.remove_tree("x"),
            "modified": lambda: storage.modified("x"),
        }
        for what, call in calls.items():
            with said(what):
                call()
    LoudFileSystem.fails = False
    for url in WRONG:
        with said("a wrong URL"):
            dist_asgd.Checkpointer(url, OPTIONS)
        with said("a wrong URL"):
            dist_asgd.export(f"{url}/x.pt", state["model"], storage_options=OPTIONS)


WRONG = [
    f"s3:/key:{SECRET}@bucket/run",
    f"s3://key:{SECRET}@bucket/run",
    f"nonsense://key:{SECRET}/x@bucket/run",
    f"https://host/run?X-Amz-Signature={SECRET}",
    f"nonsense://me:{SECRET}@host/run",
    f"sftp://me:{SECRET}#x/y@host/run",
    f"loud://me:{SECRET}[1@[host/run",
]


def use_commands(folder: str) -> None:
    options = Path(folder, "options.json")
    options.write_text(json.dumps({"token": f"{SECRET}-of-a-file"}))
    some = ["--storage-options", str(options), "--storage-option", f"password={SECRET}-typed"]
    calls = [["ls", URL], ["show", URL], ["verify", URL], ["export", URL, f"{URL}.pt"], ["gc", URL, "--keep-last", "1"]]
    for fails in (False, True):
        LoudFileSystem.fails = fails
        for call in calls:
            for more in ([], ["--json"]):
                with said(" ".join(["dist-asgd", call[0], *more, "with failures" * fails])):
                    print("status", command([*call, *some, *more]))
    LoudFileSystem.fails = False
    mistakes = [[f"{URL}"], ["ls", URL, URL], ["ls", "x", f"--token={SECRET}"], ["plan", "--world-size", "2", URL]]
    mistakes += [["show", URL, "--step", URL], ["ls", URL, "--storage-option", SECRET]]
    mistakes += [["ls", URL, "--storage-options", json.dumps({"token": SECRET})], ["export", URL, f"{URL}/"]]
    for mistake in [*mistakes, *(["ls", url] for url in WRONG), *(["export", "x", f"{url}/x.pt"] for url in WRONG)]:
        with said(f"dist-asgd {mistake[0][:4]} by mistake"):
            print("status", command(mistake))


def use_launch(folder: str) -> None:
    sys.path.insert(0, str(LAUNCH))
    import train

    small = "--width 8 --layers 1 --heads 2 --length 8 --batch 2 --held-out-bytes 200 --eval-every 2 --steps 2 --lr 0.1"
    LoudFileSystem().pipe_file("/text", bytes(range(256)) * 8)
    run = [*small.split(), "--data", f"loud://{USER}@text", "--out", URL]
    everywhere = [*run, "--checkpoint-dir", f"{URL}/ckpt", "--export", f"{URL}/x.safetensors"]
    calls = [everywhere, [*everywhere, "--steps", "4", "--resume", f"{URL}/ckpt/nowhere"]]
    calls += [[*run, "--chekpoint-dir", URL], [*run, "--steps", URL], [*run, "--parallel", URL]]
    calls += [[*run, "--data", f"{URL}/nothing"]]
    for url in WRONG:
        calls += [[*run, "--out", url], [*run, "--checkpoint-dir", url]]
    for url in (WRONG[0], WRONG[2], *WRONG[4:], f"https://127.0.0.1:9/x?X-Amz-Signature={SECRET}"):
        calls += [[*small.split(), "--data", url]]
    for number, call in enumerate(calls):
        with said(f"train.py {number}"):
            train.main(call)
    for call in ([*run, "--data", os.devnull], run, ["--out", URL]):
        LoudFileSystem.fails = True
        with said("train.py with failures"):
            train.main(call)
    LoudFileSystem.fails = False


def main() -> None:
    logging.basicConfig(stream=sys.stdout)
    logging.getLogger("dist_asgd").setLevel(logging.DEBUG)
    retry.FIRST_DELAY = 0.0
    for part in (use_library, use_commands, use_launch):
        part(sys.argv[1])
    print("== files")
    for name, file in MemoryFileSystem.store.items():
        print(name, file.getvalue())


if __name__ == "__main__":
    main()
