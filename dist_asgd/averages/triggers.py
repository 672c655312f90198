"""When to start averaging, decided by how training goes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist

from dist_asgd.comm.consensus import Agreement
from dist_asgd.comm.process_groups import default_group


class NonMonotonicTrigger:
    """Says when validation has stopped getting better, the moment at which NT-ASGD begins to average.

    That is the first loss that is worse than the best of all but the ``n`` before it (Merity, Keskar and Socher,
    "Regularizing and optimizing LSTM language models", 2017)::

        trigger = NonMonotonicTrigger(n=5)
        ...
        if trigger.step(validation_loss):  # after each validation
            optimizer.start_averaging()

    The constructor and ``step`` are collective. ``state_dict`` and ``load_state_dict`` make it part of checkpoints.

    Args:
        n: how many of the latest losses do not count; a whole number of at least 0. The paper's is 5.
        process_group: the ranks that must decide alike; None for all.

    Raises:
        TypeError, ValueError: on every rank, where any rank's ``n`` is no such number or they differ.
    """

    def __init__(self, n: int = 5, process_group: dist.ProcessGroup | None = None) -> None:
        self._agreement = Agreement(default_group(process_group))
        with self._agreement.together("NonMonotonicTrigger()"):
            if isinstance(n, bool) or not isinstance(n, int) or n < 0:
                raise ValueError(f"n must be a whole number of at least 0, got {n!r}")
        self._agreement.require_equal("the trigger", [("n", str(n))])
        self.n = n
        self.triggered = False
        self._losses: list[float] = []

    def step(self, loss: float) -> bool:
        """Takes the loss of a validation; True if averaging is to start now, which it says once. Collective.

        Args:
            loss: lower is better; a number or a tensor of 1 element. Where ranks bring different ones, as of their own
                parts of the validation data, their mean is what counts, on every rank the same.

        Raises:
            ValueError, TypeError: on every rank, if that of any rank is NaN, -inf or no number; nothing changes.
        """
        with self._agreement.together("NonMonotonicTrigger.step()"):
            own = _number(loss)
        losses = self._agreement.gather(own)
        # Equal ones are their own mean: dividing their sum could say something else.
        mean = own if losses.count(own) == len(losses) else math.fsum(losses) / len(losses)
        older = self._losses[: max(0, len(self._losses) - self.n)]
        worse = not self.triggered and mean > min(older, default=math.inf)
        self._losses.append(mean)
        self.triggered |= worse
        return worse

    def state_dict(self) -> dict[str, Any]:
        """The losses so far, and whether it was triggered."""
        return {"losses": list(self._losses), "triggered": self.triggered}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes up what ``state_dict()`` gave. ``n`` stays. Every rank must load the same.

        Raises:
            ValueError, TypeError: it is nothing of the kind; nothing changes.
        """
        missing = {"losses", "triggered"} - state_dict.keys()
        if missing:
            raise ValueError(f"the state dict has no {' and no '.join(sorted(missing))}: it is not that of a trigger")
        if not isinstance(state_dict["triggered"], bool):
            raise TypeError(f"triggered must be True or False, got {state_dict['triggered']!r}")
        self._losses, self.triggered = list(map(_number, state_dict["losses"])), state_dict["triggered"]


def _number(loss: Any) -> float:
    try:
        value = float(loss)
    except (TypeError, ValueError, RuntimeError):  # the last from tensors of several elements
        raise TypeError(f"the loss must be a number, or a tensor of 1 element, got {loss!r}") from None
    if math.isnan(value) or value == -math.inf:
        raise ValueError(f"the loss must be a number, got {value}: later decisions would rest on it")
    return value
