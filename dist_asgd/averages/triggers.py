"""Decides when to start averaging from the course of the validation loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist

from dist_asgd.comm.consensus import Agreement
from dist_asgd.comm.process_groups import default_group


class NonMonotonicTrigger:
    """Tells when the validation loss has stopped improving, which is when NT-ASGD starts averaging.

    It triggers at the first loss that is worse than the best loss so far, the latest ``n`` losses before it excepted
    (Merity, Keskar and Socher, "Regularizing and optimizing LSTM language models", 2017)::

        trigger = NonMonotonicTrigger(n=5)
        ...
        if trigger.step(validation_loss):  # after each validation
            optimizer.start_averaging()

    The constructor and ``step`` are collective: every rank must call them. ``state_dict`` and ``load_state_dict`` make
    the trigger part of checkpoints.

    Args:
        n: how many of the latest losses are excepted, an int >= 0. The paper uses 5.
        process_group: the ranks that must decide alike; None for all ranks.

    Attributes:
        triggered: whether ``step`` has returned True.

    Raises:
        ValueError: on every rank, if any rank's ``n`` is no int >= 0, or ranks have different ones.
    """

    def __init__(self, n: int = 5, process_group: dist.ProcessGroup | None = None) -> None:
        self._agreement = Agreement(default_group(process_group), "NonMonotonicTrigger")
        with self._agreement.together("NonMonotonicTrigger()"):
            if isinstance(n, bool) or not isinstance(n, int) or n < 0:
                raise ValueError(f"n must be a whole number of at least 0, got {n!r}")
        self._agreement.require_equal("the trigger", [("n", str(n))])
        self.n = n
        self.triggered = False
        self._losses: list[float] = []

    def step(self, loss: float) -> bool:
        """Records the loss of a validation; returns True, once, when averaging is to start. Collective.

        Args:
            loss: a number or a tensor of 1 element; lower is better. Ranks may give different losses, each of its part
                of the validation data: every rank then uses their mean.

        Raises:
            ValueError: on every rank, if the loss of any rank is NaN or -inf; nothing changes.
            TypeError: on every rank, if the loss of any rank is no number; nothing changes.
        """
        (mean,) = agreed_losses(self._agreement, "NonMonotonicTrigger.step()", [loss])
        older = self._losses[: max(0, len(self._losses) - self.n)]
        worse = not self.triggered and mean > min(older, default=math.inf)
        self._losses.append(mean)
        self.triggered |= worse
        return worse

    def state_dict(self) -> dict[str, Any]:
        """Returns the losses so far, and whether averaging was triggered."""
        return {"losses": list(self._losses), "triggered": self.triggered}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restores what ``state_dict()`` returned; ``n`` stays. Not collective, but every rank must load equal state.

        Raises:
            ValueError, TypeError: ``state_dict`` is not the state of a trigger; nothing changes.
        """
        missing = {"losses", "triggered"} - state_dict.keys()
        if missing:
            raise ValueError(f"the state dict has no {' and no '.join(sorted(missing))}: it is not that of a trigger")
        if not isinstance(state_dict["triggered"], bool):
            raise TypeError(f"triggered must be True or False, got {state_dict['triggered']!r}")
        self._losses, self.triggered = list(map(_number, state_dict["losses"])), state_dict["triggered"]


def agreed_losses(agreement: Agreement, operation: str, losses: Sequence[object]) -> list[float]:
    """Returns the mean over the ranks of each loss, by which every rank decides alike. Collective.

    Args:
        agreement: among the ranks.
        operation: the user's call, for errors.
        losses: this rank's.

    Raises:
        ValueError, TypeError: on every rank, if a loss of any rank is NaN, -inf or no number.
    """
    with agreement.together(operation):
        own = list(map(_number, losses))
    # The mean of equal losses is that loss; dividing their sum could round to another number.
    return [
        of_ranks[0] if of_ranks.count(of_ranks[0]) == len(of_ranks) else math.fsum(of_ranks) / len(of_ranks)
        for of_ranks in zip(*agreement.gather(own), strict=True)
    ]


def _number(loss: Any) -> float:
    try:
        value = float(loss)
    except (TypeError, ValueError, RuntimeError):  # RuntimeError: a tensor of several elements
        raise TypeError(f"the loss must be a number, or a tensor of 1 element, got {loss!r}") from None
    if math.isnan(value) or value == -math.inf:
        raise ValueError(f"the loss must be a number, got {value}: later decisions would rest on it")
    return value
