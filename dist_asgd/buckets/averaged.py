"""``AveragedBucket``: parameters that another optimizer updates, and this rank's shard of their averages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dist_asgd.buckets.in_place import InPlaceBucket
from dist_asgd.kernels.tensor_list import TensorList, as_real
from dist_asgd.sharding.scalar_runs import Run
from dist_asgd.sharding.shard import Following
from dist_asgd.sharding.sharded_state import StatePiece


class AveragedBucket(InPlaceBucket):
    """A bucket of parameters whose averages are kept beside an optimizer that this package does not know.

    Where several ranks hold equal blocks of the parameters, each averages the pieces in its shard and reads only those.
    """

    built = "the averages were built"

    def take_iterate(self, following: Following, active: Sequence[bool] | None) -> None:
        """Moves the averages to the parameters as they are now. Sends nothing.

        Args:
            following: returns the scalars of a parameter after a number of iterates.
            active: one flag for each parameter, whether it takes part; None if all do.
        """
        self.shard.take_iterate(following, active, self._parts)

    def _parts(self, run: Run) -> Iterator[tuple[slice, TensorList]]:
        for batch in self._batches.of(run.first, run.stop):
            if batch.parts is not None:
                yield slice(batch.start, batch.stop), batch.parts

    def _updates_in_place(self) -> bool:
        return True

    @torch.no_grad()
    def whole_averages(self, suffix: str) -> list[Tensor]:
        """Returns the average of this rank's block of each parameter, in the average dtype. Collective.

        The tensors have the shapes of the blocks, by position. An average that has not started is the parameter.
        """
        own = self.shard.average_copy(suffix).to(self.device)
        flat = own
        if self.collectives is not None:
            flat = torch.empty(self.layout.numel, dtype=own.dtype, device=self.device)
            flat[self.shard.start : self.shard.stop] = own
            self.collectives.start_gather(as_real(flat), as_real(flat[self.shard.start : self.shard.stop])).wait()
        spans = zip(self.layout.spans, self.placements, strict=True)
        return [placement.view(flat[span.start : span.stop]) for span, placement in spans]

    def state_of(self, position: int) -> dict[str, Tensor]:
        """Returns the averages of one parameter by suffix: pieces, or tensors of the parameter's shape with one rank.

        They share memory with the shard until it changes; an average that has not started is a copy.
        """
        state = self.shard.state_of(position)
        for value in state.values():
            if isinstance(value, StatePiece):
                value.own()
        return {name.removeprefix("ax"): value for name, value in state.items()}
