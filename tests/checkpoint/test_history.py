"""One line of checkpoints: going back, several writers, damaged checkpoints, and URLs that are no run."""

import json
import logging
import multiprocessing
import os
import signal
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import dist_asgd
from dist_asgd import Checkpointer
from dist_asgd.checkpoint import CheckpointError, DamagedCheckpoint
from dist_asgd.checkpoint.run.history import entry_path, read_entry
from dist_asgd.checkpoint.run.listing import list_run
from dist_asgd.checkpoint.run.writer import PlannedSave, Writer
from dist_asgd.checkpoint.storage.posix import LocalStore
from dist_asgd.checkpoint.storage.retry import StorageError
from dist_asgd.checkpoint.storage.storage import Storage
from tests.support.failures import one_message
from tests.support.ranks import message_of, run_alone, run_ranks
from tests.support.stores import *  # noqa: F403 fixtures


def at(step):
    return {"x": torch.full((3,), float(step)), "y": torch.full((2,), float(step))}


def saved(url, steps, **options):
    checkpointer = Checkpointer(url, **options)
    for step in steps:
        checkpointer.save(step, at(step))
    return checkpointer


def loaded(url, **options):
    """Returns the step that a new Checkpointer loads, having checked that it is that step's state."""
    state = at(-1)
    step = Checkpointer(url).load(state, **options)
    assert step is None or {value.item() for tensor in state.values() for value in tensor} == {step}
    return step


def directory(run, step):
    (found,) = Path(run).glob(f"step-{step:08d}-*")
    return found


# Going back


@pytest.mark.parametrize("is_new", [True, False], ids=["another job", "one job"])
def test_what_was_just_saved_is_kept_and_loaded_after_going_back(tmp_path, caplog, is_new):
    checkpointer = saved(tmp_path, (100, 200, 300, 400), keep_last=3)
    if is_new:
        checkpointer = Checkpointer(tmp_path, keep_last=3)
    assert checkpointer.load(at(0), step=200) == 200
    url = checkpointer.save(210, at(210))
    (warning,) = caplog.records
    assert warning.levelno == logging.WARNING
    for part in ("saving step 210 after step 200", directory_name(300), directory_name(400), "are abandoned"):
        assert part in warning.getMessage()
    assert Path(url).is_dir()
    assert loaded(tmp_path) == 210
    assert checkpointer.steps() == [200, 210]
    assert "has no checkpoint of step 300" in message_of(lambda: loaded(tmp_path, step=300), CheckpointError)
    checkpointer.save(220, at(220))
    assert len(caplog.records) == 1
    assert checkpointer.steps() == [200, 210, 220]
    assert len(list((tmp_path / "history").iterdir())) == 1


def directory_name(step):
    return f"step-{step:08d}-0001-"


def test_abandoned_checkpoints_stay_where_all_are_kept_and_are_loaded_by_their_step(tmp_path):
    checkpointer = saved(tmp_path, (100, 200, 300))
    checkpointer.load(at(0), step=100)
    checkpointer.save(150, at(150))
    assert checkpointer.steps() == [100, 150] and checkpointer.latest() == 150
    assert loaded(tmp_path) == 150 and loaded(tmp_path, step=300) == 300
    text = message_of(lambda: loaded(tmp_path, step=5), CheckpointError)
    assert "it has [100, 150], and abandoned ones of [200, 300]" in text
    again = {"x": torch.full((3,), 7.0), "y": torch.zeros(2)}
    checkpointer.save(300, again)
    state = at(0)
    assert checkpointer.load(state, step=300) == 300 and state["x"].tolist() == [7, 7, 7], "the live line counts"
    assert checkpointer.load(at(0), step=200) == 200  # the abandoned line is taken up again
    checkpointer.save(201, at(201))
    assert checkpointer.steps() == [100, 150, 201] and loaded(tmp_path) == 201


def test_pinned_checkpoints_are_kept_when_they_are_abandoned(tmp_path):
    checkpointer = saved(tmp_path, (1, 2, 3, 4), keep_last=2, pinned=[3])
    checkpointer.load(at(0), step=3)
    checkpointer.save(4, at(4))
    checkpointer.load(at(0), step=3)
    checkpointer = Checkpointer(tmp_path, keep_last=1, pinned=[4])
    checkpointer.load(at(0), step=3)
    checkpointer.save(3, at(3))
    assert checkpointer.steps() == [3] and loaded(tmp_path, step=4) == 4


def test_what_goes_on_from_an_older_step_abandons_the_steps_between(tmp_path):
    checkpointer = saved(tmp_path, (100, 200, 300))
    checkpointer.load({"x": torch.zeros(3)}, step=100, strict=False)
    checkpointer.save(310, at(310))
    assert checkpointer.steps() == [100, 200, 300, 310], "a part was loaded, as to compare with"
    checkpointer.load({"x": torch.zeros(3)}, step=200, strict=False)
    checkpointer.load({"y": torch.zeros(2)}, step=200, strict=False)
    checkpointer.save(320, at(320))
    assert checkpointer.steps() == [100, 200, 320]
    checkpointer.save(150, at(150))
    assert checkpointer.steps() == [100, 150], "the newest save is where the run is"


def killed_before_the_commit(folder):
    create = LocalStore.create

    def kill(store, path, data):
        if path.endswith("manifest.json"):
            os.kill(os.getpid(), signal.SIGKILL)
        create(store, path, data)

    LocalStore.create = kill
    checkpointer = Checkpointer(folder, keep_last=1)
    checkpointer.load(at(0), step=200)
    checkpointer.save(210, at(210))


def test_a_kill_between_history_and_commit_leaves_the_step_that_was_gone_back_to(tmp_path):
    saved(tmp_path, (100, 200, 300))
    process = multiprocessing.get_context("fork").Process(target=killed_before_the_commit, args=(tmp_path,))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert loaded(tmp_path) == 200 and loaded(tmp_path, step=300) == 300
    checkpointer = Checkpointer(tmp_path)  # waits for nothing
    assert checkpointer.load(at(0)) == 200
    checkpointer.save(210, at(210))
    assert checkpointer.steps() == [100, 200, 210]


# Several writers


def refusal(save):
    text = message_of(save, CheckpointError)
    for part in ("another writer", f"process {os.getpid()} on host {socket.gethostname()}", "at work since", "load()"):
        assert part in text
    return text


def test_of_two_writers_the_one_that_saves_later_is_refused_by_name(tmp_path):
    first = saved(tmp_path, (1, 2), keep_last=1)
    second = Checkpointer(tmp_path, keep_last=1)
    second.load(at(0))
    url = first.save(3, at(3))
    assert "has saved step 3 at" in refusal(lambda: second.save(3, at(-3)))
    second.save(4, at(4)) if second.load(at(0)) == 3 else None
    assert not Path(url).exists() and loaded(tmp_path) == 4
    refusal(lambda: first.save(4, at(-4)))
    assert first.load(at(0)) == 4
    first.save(5, at(5))
    assert loaded(tmp_path) == 5


def test_a_writer_that_has_loaded_nothing_saves_over_nothing(tmp_path):
    first = saved(tmp_path, (10, 20), keep_last=1)
    second = Checkpointer(tmp_path, keep_last=1)
    for step in (1, 20):
        text = message_of(lambda step=step: second.save(step, at(step)), CheckpointError)
        for part in ("checkpoints up to step 20", f"process {os.getpid()}", "load(step=...)", "another URL"):
            assert part in text
    assert loaded(tmp_path) == 20
    second.save(21, at(21))
    refusal(lambda: first.save(30, at(30)))


def racing(rank, url, options):
    """Two jobs that know nothing of each other save one step at once, again and again."""
    checkpointer, mine = Checkpointer(url, options, keep_last=1, process_group=single_group(rank)), 0
    for step in range(1, 5):
        checkpointer.load(at(0))
        torch.distributed.barrier()
        try:
            checkpointer.save(step, at(step))
            mine += 1
        except CheckpointError as error:
            assert "another writer: process" in str(error), error
        torch.distributed.barrier()
        assert checkpointer.steps() == [step]
        torch.distributed.barrier()
    return mine


def single_group(rank):
    return [torch.distributed.new_group([other]) for other in range(torch.distributed.get_world_size())][rank]


@pytest.mark.parametrize("place", ["file", "s3"])
def test_of_writers_that_save_at_once_exactly_one_succeeds(tmp_path, place, request):
    server = request.getfixturevalue("s3_server") if place == "s3" else None
    url, options = (server.new_url(), server.options) if server else (str(tmp_path), None)
    assert sum(run_ranks(2, racing, url, options)) == 4


def test_a_writer_that_slept_is_refused_although_its_place_in_the_history_is_free_again(tmp_path, monkeypatch):
    first, second = saved(tmp_path, (1, 2)), Checkpointer(tmp_path)
    second.load(at(0))
    write = LocalStore.write

    def sleep(store, path, chunks):
        monkeypatch.setattr(LocalStore, "write", write)
        for step in (3, 4):
            first.save(step, at(step))
        return write(store, path, chunks)

    monkeypatch.setattr(LocalStore, "write", sleep)
    assert "has saved step 4 at" in refusal(lambda: second.save(3, at(-3)))
    assert first.steps() == [1, 2, 3, 4] and loaded(tmp_path) == 4
    first.save(5, at(5))


def refused_ranks(rank, url, wait):
    checkpointer = Checkpointer(url)
    checkpointer.save(1, at(1))
    write = LocalStore.write

    def overtaken(store, path, chunks):
        storage = Storage.open(url)
        other = Writer(storage)
        other.loaded(list_run(storage), None, ())
        other.register(PlannedSave(9, "none", ()))
        return write(store, path, chunks)

    if rank == 0:
        LocalStore.write = overtaken

    def save():
        checkpointer.save(2, at(2), wait=wait)
        checkpointer.wait()

    text = message_of(save, CheckpointError)
    assert checkpointer.steps() == [1]
    return text, message_of(lambda: checkpointer.save(2, at(2)), CheckpointError)


@pytest.mark.parametrize("wait", [True, False])
def test_every_rank_hears_of_the_other_writer(tmp_path, wait):
    for texts in zip(*run_ranks(2, refused_ranks, str(tmp_path), wait), strict=True):
        assert all("has another writer: process" in text and "step 9" in text for text in texts), texts


def test_a_damaged_history_is_an_error_that_says_so(tmp_path):
    saved(tmp_path, (1, 2))
    (file,) = (tmp_path / "history").iterdir()
    data = file.read_bytes()
    assert read_entry(data, "").directory == directory(tmp_path, 2).name and file.name == Path(entry_path(2)).name
    for wrong in (b"", data[:50], data.replace(b"step-", b"stop-"), json.dumps([1]).encode()):
        file.write_bytes(wrong)
        assert f"{file} is damaged" in message_of(lambda: loaded(tmp_path), CheckpointError)
    file.unlink()
    os.mkfifo(file)
    assert f"{file} is damaged" in message_of(lambda: loaded(tmp_path), CheckpointError)
    file.unlink()
    assert loaded(tmp_path) == 2


# Damaged checkpoints


def flip(folder):
    file = next(path for path in sorted(folder.iterdir()) if path.suffix == ".distcp")
    data = file.read_bytes()
    place = data.index(torch.full((3,), 3.0).numpy().tobytes())
    file.write_bytes(data[:place] + b"\xff" + data[place + 1 :])


def cut(folder):
    os.truncate(next(folder.glob("*.distcp")), 10)


def cut_manifest(folder):
    os.truncate(folder / "manifest.json", 100)


def lose(folder):
    next(folder.glob("*.distcp")).unlink()


def spoil_stock(folder):
    data = bytearray((folder / ".metadata").read_bytes())
    data[100] ^= 1
    (folder / ".metadata").write_bytes(data)


def block_manifest(folder):
    (folder / "manifest.json").unlink()
    os.mkfifo(folder / "manifest.json")


def inflate_manifest(folder):
    os.truncate(folder / "manifest.json", 2**40)


DAMAGES = [flip, cut, cut_manifest, lose, spoil_stock, block_manifest, inflate_manifest]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_load_falls_back_if_asked_and_retention_does_not_count_what_is_damaged(tmp_path, caplog, damage):
    saved(tmp_path, (1, 2, 3))
    damage(directory(tmp_path, 3))
    checkpointer, state = Checkpointer(tmp_path, keep_last=2), at(-1)
    text = message_of(lambda: checkpointer.load(state), DamagedCheckpoint)
    assert "load(fallback=True)" in text and state["x"].eq(-1).all()
    assert not caplog.records
    assert checkpointer.load(state, fallback=True) == 2 and state["x"].eq(2).all()
    (warning,) = caplog.records
    assert directory(tmp_path, 3).name in warning.getMessage() and "is skipped" in warning.getMessage()
    assert checkpointer.load(state, step=2) == 2
    checkpointer.load({}, strict=False, step=1)  # does not move the run
    assert "pass one of the two" in message_of(lambda: checkpointer.load(state, step=2, fallback=True), ValueError)
    other = {"x": torch.zeros(4), "y": torch.zeros(2)}
    assert "does not fit" in message_of(lambda: Checkpointer(tmp_path).load(other, fallback=True), CheckpointError)
    checkpointer.load(state, fallback=True)
    checkpointer.save(4, at(4))
    assert checkpointer.steps() == [2, 4] and loaded(tmp_path) == 4


@pytest.mark.parametrize("damage", [cut, cut_manifest, lose, block_manifest])
def test_retention_finds_damage_by_manifests_and_sizes(tmp_path, damage):
    checkpointer = saved(tmp_path, (1, 2, 3), keep_last=3)
    damage(directory(tmp_path, 3))
    again = Checkpointer(tmp_path, keep_last=2)
    again.load(at(0), fallback=True)
    for kept in (checkpointer, saved(tmp_path / "other", (1, 2, 3), keep_last=2)):
        assert kept.steps()
    damage(directory(tmp_path / "other", 3))
    kept.save(4, at(4))
    assert kept.steps() == [2, 3, 4], "two that are whole, and the damaged one until two newer ones are whole"
    kept.save(5, at(5))
    assert kept.steps() == [4, 5]


def test_all_damaged_is_no_fresh_start(tmp_path):
    saved(tmp_path, (1, 2))
    for step in (1, 2):
        cut(directory(tmp_path, step))
    text = message_of(lambda: Checkpointer(tmp_path).load(at(0), fallback=True), DamagedCheckpoint)
    assert "all checkpoints below" in text and "step-00000001" in text and "step-00000002" in text


def rows(value):
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    return {"rows": DTensor.from_local(torch.full((40, 3), value), mesh, [Shard(0)])}


def falling_back(rank, url):
    checkpointer = Checkpointer(url)
    for step in (1, 2, 3):
        checkpointer.save(step, rows(float(step)))
    torch.distributed.barrier()
    if rank == 0:
        file = sorted(directory(url, 3).glob("*.distcp"))[1]  # only rank 1 reads it
        data = file.read_bytes()
        place = data.index(torch.full((9,), 3.0).numpy().tobytes())
        file.write_bytes(data[:place] + b"\xff" + data[place + 1 :])
    torch.distributed.barrier()
    state = rows(-1.0)
    text = message_of(lambda: checkpointer.load(state), DamagedCheckpoint)
    assert state["rows"].to_local().eq(-1).all()
    assert checkpointer.load(state, fallback=True) == 2 and state["rows"].to_local().eq(2).all()
    return text


def test_all_ranks_fall_back_together(tmp_path):
    one_message(run_ranks(2, falling_back, str(tmp_path)), "rank 1", "is damaged", "fallback=True")


# URLs that are no run


def test_a_wrong_place_is_told(tmp_path):
    run = tmp_path / "run"
    one = saved(run, (1,)).save(2, at(2))
    dist_asgd.save(tmp_path / "single", at(1))
    dcp.save(at(1), checkpoint_id=tmp_path / "stock", no_dist=True)
    (tmp_path / "file").write_text("text")
    os.mkfifo(tmp_path / "fifo")
    os.symlink("not-mounted", tmp_path / "link")
    wrong = {
        one: "is one checkpoint, not the directory of a run",
        tmp_path / "single": "is one checkpoint, not the directory of a run",
        tmp_path / "stock": "which torch.distributed.checkpoint writes",
        tmp_path / "file": "is a file",
        tmp_path / "file" / "run": "lies below one",
        tmp_path / "fifo": "is a file",
        tmp_path / "link": "is a link to nothing",
    }
    for place, part in wrong.items():
        checkpointer = Checkpointer(place)
        calls = (lambda c=checkpointer: c.load(at(0)), lambda c=checkpointer: c.save(9, at(9)), checkpointer.latest)
        for call in calls:
            assert part in message_of(call, CheckpointError, StorageError)
    inside = Checkpointer(Path(one) / "run")
    assert "is inside of a checkpoint" in message_of(lambda: inside.save(9, at(9)), CheckpointError)
    assert "is the directory of a run" in message_of(lambda: dist_asgd.load(run, at(0)), CheckpointError)
    assert "is a file" in message_of(lambda: dist_asgd.load(tmp_path / "file", at(0)), CheckpointError)
    assert "not empty" in message_of(lambda: dist_asgd.save(one, at(0)), CheckpointError)
    assert loaded(run) == 2


def test_a_job_that_only_resumes(tmp_path):
    assert Checkpointer(tmp_path).load(at(0)) is None
    assert "must_exist=True" in message_of(lambda: Checkpointer(tmp_path).load(at(0), must_exist=True), CheckpointError)
    saved(tmp_path, (1,))
    assert loaded(tmp_path, must_exist=True) == 1


def as_somebody_else(folder):
    if os.getuid() == 0:
        os.setuid(65534)
    with pytest.raises(PermissionError):
        os.listdir(folder / "lost+found")
    checkpointer = saved(folder, (1, 2), keep_last=1)
    assert checkpointer.load(at(0)) == 2
    return checkpointer.steps()


def test_an_unreadable_folder_beside_the_steps_is_ignored(tmp_path):
    folder = tmp_path / "run"
    (folder / "lost+found").mkdir(parents=True)
    (folder / "lost+found").chmod(0)
    folder.chmod(0o777)
    for parent in (tmp_path, *tmp_path.parents):
        if parent.stat().st_uid == os.getuid() and parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o11)
    assert run_alone(as_somebody_else, folder) == [2]
