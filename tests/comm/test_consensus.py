"""Errors of one rank become errors of all: also interrupts, and errors without a message."""

import pytest
import torch.distributed as dist

from dist_asgd.checkpoint.errors import CheckpointError
from dist_asgd.checkpoint.errors import together as checkpoints_together
from dist_asgd.comm.consensus import Agreement, error_text
from tests.support.ranks import message_of, run_alone, run_ranks


def raised(error, agreement, together):
    """Raises ``error`` within the block on rank 1, or on a rank alone."""
    with together(agreement, "work()"):
        if agreement.rank == agreement.world_size - 1:
            raise error


def ranks(rank, error, together, kind):
    agreement = Agreement(dist.group.WORLD, "Test")
    text = message_of(lambda: raised(error, agreement, together), type(error) if rank else kind)
    assert agreement.gather(rank) == [0, 1]  # nobody is left in another collective
    return text


TOGETHER = [(Agreement.together, RuntimeError), (checkpoints_together, CheckpointError)]


@pytest.mark.parametrize(("together", "kind"), TOGETHER, ids=["agreement", "checkpoint"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3), GeneratorExit()], ids=repr)
def test_an_interrupted_rank_tells_the_others_and_goes_its_way(error, together, kind):
    others, own = run_ranks(2, ranks, error, together, kind)
    assert f"rank 1: work() was interrupted by {type(error).__name__}" in others
    assert own.startswith(f"{type(error).__name__}:")


class Silent(Exception):
    def __str__(self):
        return " "


def silent_ranks(rank, error, together, kind):
    agreement = Agreement(dist.group.WORLD, "Test")
    return message_of(lambda: raised(error, agreement, together), kind)


def silent_alone(error, together):
    try:
        raised(error, Agreement(None, "Test"), together)
    except Exception as caught:
        return type(caught), error_text(caught)


SILENT = [StopIteration(), StopIteration("a value"), KeyError(), Silent(), AssertionError()]


@pytest.mark.parametrize(("together", "kind"), TOGETHER, ids=["agreement", "checkpoint"])
@pytest.mark.parametrize("error", SILENT, ids=repr)
def test_no_error_comes_without_a_message(error, together, kind):
    """Nor is a StopIteration taken for the end of the block."""
    expected = "a value" if error.args else type(error).__name__
    texts = run_ranks(2, silent_ranks, error, together, kind)
    assert texts[0] == texts[1] and f"rank 1: {expected}" in texts[0]
    if not error.args:
        assert "test_consensus.py" in texts[0] and "raise error" in texts[0]


@pytest.mark.parametrize("error", SILENT, ids=repr)
def test_nor_does_one_in_a_process_alone(error):
    expected = "a value" if error.args else type(error).__name__
    kind, text = run_alone(silent_alone, error, checkpoints_together)
    assert kind is CheckpointError and text.startswith(expected)
    kind, text = run_alone(silent_alone, error, Agreement.together)
    assert kind is (RuntimeError if isinstance(error, StopIteration) else type(error)) and text.startswith(expected)


def test_an_error_that_was_never_raised_has_the_name_of_its_type():
    assert error_text(KeyError()) == "KeyError"
    assert error_text(ValueError("said")) == "said"


def unheard(rank, error):
    """Rank 0 has no group to hear of it any more."""
    agreement = Agreement(dist.group.WORLD, "Test")
    if rank == 0:
        return None
    agreement.maximum = lambda *args, **options: (_ for _ in ()).throw(RuntimeError("the connection is closed"))
    return message_of(lambda: raised(error, agreement, Agreement.together), type(error), RuntimeError)


def test_where_ranks_cannot_talk_the_own_error_comes_first():
    assert run_ranks(2, unheard, KeyboardInterrupt())[1] == "KeyboardInterrupt: "
    text = run_ranks(2, unheard, KeyError())[1]
    assert text.startswith("RuntimeError: KeyError (raised by") and text.endswith("the connection is closed")
