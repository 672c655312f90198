"""`Checkpointer.metrics`: numbers of saves, of loads and of requests to the storage."""

import json
import time

import pytest
import torch

from dist_asgd import Checkpointer
from dist_asgd.checkpoint.storage.retry import Requests
from tests.support.ranks import run_ranks


def test_saves_are_counted_with_their_bytes(tmp_path):
    """Two ranks, one save in the foreground, one in the background, one that fails, and then a load of the older."""

    def ranks(rank):
        checkpointer, state = Checkpointer(tmp_path), {"x": torch.ones(100)}
        first = checkpointer.metrics()
        checkpointer.save(1, state)
        checkpointer.save(4, state, wait=False)
        checkpointer.wait()
        with pytest.raises(TypeError):
            checkpointer.save(5, {"x": object()})
        checkpointer.load(state, step=1)
        return first, checkpointer.metrics()

    for rank, (first, found) in enumerate(run_ranks(2, ranks)):
        names = {"saves", "failed_saves", "blocked_seconds", "written_bytes", "retried_requests", "failed_requests"}
        assert first == dict.fromkeys(names, 0)
        assert (found["saves"], found["failed_saves"], found["failed_requests"]) == (2, 1, 0)
        assert 0 < found["blocked_seconds"] < 60 and 0 <= found["seconds_since_save"] < 60
        files = tmp_path.glob(f"step-*/__{rank}_0.distcp")
        assert found["written_bytes"] == sum(file.stat().st_size for file in files)
        assert found.get("lost_steps") == (3 if rank == 0 else None)


def test_tries_that_fail_are_counted():
    requests, failures = Requests("s3://bucket", 60.0), [ConnectionError("gone")]

    def fails_once():
        if failures:
            raise failures.pop()

    requests.retry("read", "x", fails_once)
    assert (requests.counts.retried, requests.counts.failed) == (1, 0)
    with pytest.raises(OSError), requests.once("write", "x"):
        raise PermissionError("no")
    with pytest.raises(FileNotFoundError), requests.once("read", "x"):
        raise FileNotFoundError  # is an answer
    assert (requests.counts.retried, requests.counts.failed) == (1, 1)


def test_after_a_load_the_age_is_that_of_the_checkpoint_loaded(tmp_path):
    state = {"x": torch.ones(1)}
    Checkpointer(tmp_path).save(1, state)
    (manifest,) = tmp_path.glob("step-*/manifest.json")
    created = json.loads(manifest.read_text())["created"]
    checkpointer = Checkpointer(tmp_path)
    assert "seconds_since_save" not in checkpointer.metrics()
    time.sleep(0.2)
    checkpointer.load(state)
    age = checkpointer.metrics()["seconds_since_save"]
    assert 0.2 <= age <= time.time() - created + 0.01
