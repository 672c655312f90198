"""The non-monotonic trigger of AWD-LSTM."""

from __future__ import annotations


class NonMonotonicTrigger:
    """Fires at the first loss that is above the best of all but the last ``n`` before it."""

    def __init__(self, n: int) -> None:
        self._n = n
        self._losses: list[float] = []

    def step(self, loss: float) -> bool:
        earlier = self._losses[: -self._n]
        self._losses.append(loss)
        return bool(earlier) and loss > min(earlier)
