"""NonMonotonicTrigger against the condition of Merity et al.'s own program, on one rank and on several."""

import math
import random

import pytest
import torch

import dist_asgd
from dist_asgd import NonMonotonicTrigger
from tests.support.ranks import message_of, run_alone, run_ranks


def first_trigger(losses: list[float], n: int) -> int | None:
    """github.com/salesforce/awd-lstm-lm, main.py: when it turns to ASGD."""
    best_val_loss: list[float] = []
    for turn, val_loss in enumerate(losses):
        if len(best_val_loss) > n and val_loss > min(best_val_loss[:-n]):
            return turn
        best_val_loss.append(val_loss)
    return None


def test_it_says_so_once_when_the_original_does() -> None:
    def alone() -> None:
        turns = set()
        for seed in range(300):
            chance = random.Random(seed)
            n = chance.randrange(1, 7)
            losses = [chance.choice([math.inf, 5 / (1 + i) + chance.random(), 2.0]) for i in range(20)]
            trigger, said = NonMonotonicTrigger(n), []
            for turn, loss in enumerate(losses):
                if turn == 8:
                    state, trigger = trigger.state_dict(), NonMonotonicTrigger(n)
                    trigger.load_state_dict(state)
                said.append(trigger.step(torch.tensor(loss, dtype=torch.float64) if turn % 2 else loss))
            expected = first_trigger(losses, n)
            assert [turn for turn, now in enumerate(said) if now] == ([] if expected is None else [expected])
            assert trigger.triggered == (expected is not None)
            turns.add(expected)
        assert len(turns) > 10

    run_alone(alone)


def test_ranks_decide_alike_by_their_mean_and_checkpoints_hold_it(tmp_path) -> None:
    losses = [[3.0, 1.0], [2.0, 2.0], [2.5, 1.0], [1.5, 2.4]]  # worse than before on rank 1 only; by mean, at last

    def ranks(rank: int) -> None:
        trigger = NonMonotonicTrigger(n=1)
        assert not any(trigger.step(pair[rank]) for pair in losses[:3])
        before = trigger.state_dict()
        for bad in (math.nan, -math.inf, "loss"):
            text = message_of(lambda: trigger.step(bad if rank else 1.0), ValueError, TypeError)  # noqa: B023
            assert "rank 1" in text and "number" in text
        assert trigger.state_dict() == before == {"losses": [2.0, 2.0, 1.75], "triggered": False}
        dist_asgd.save(tmp_path / "x", {"trigger": trigger})
        other = NonMonotonicTrigger(n=1)
        dist_asgd.load(tmp_path / "x", {"trigger": other})
        assert [trigger.step(losses[3][rank]), other.step(losses[3][rank])] == [False, False]
        assert trigger.step(9.0 * rank) and other.step(9.0 * rank) and not trigger.step(99.0)
        assert other.state_dict() == {"losses": [2.0, 2.0, 1.75, 1.95, 4.5], "triggered": True}
        assert "disagree" in message_of(lambda: NonMonotonicTrigger(n=rank), ValueError)

    run_ranks(2, ranks)


@pytest.mark.parametrize("n", [-1, 2.5, True, "5", None])
def test_a_bad_n_is_named(n) -> None:
    assert repr(n) in message_of(lambda: NonMonotonicTrigger(n), ValueError)


@pytest.mark.parametrize("state", [{}, {"losses": [1.0]}, {"losses": [math.nan], "triggered": False}])
def test_a_bad_state_changes_nothing(state) -> None:
    trigger = NonMonotonicTrigger()
    trigger.step(1.0)
    message_of(lambda: trigger.load_state_dict(state), ValueError)
    assert trigger.state_dict() == {"losses": [1.0], "triggered": False}
