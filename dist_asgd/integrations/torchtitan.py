"""``AveragedOptimizers`` and ``AveragedCheckpoints``: averages of the weights in a training by torchtitan."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer
from torchtitan.components.checkpointer import CheckpointManager
from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.tools.logging import logger

from dist_asgd import ShardedASGD, ShardedAverages
from dist_asgd.averages.kinds import Average
from dist_asgd.averages.options import PROGRESS

PREFIX, ITERATES = "averages", "iterates"  # of keys in the container's flat state dict


class AveragedOptimizers(OptimizersContainer):
    """torchtitan's container of optimizers, with averages of the weights over all parts of the model.

    Takes the place of ``OptimizersContainer`` in the configuration of a training, together with
    ``AveragedCheckpoints`` in the place of ``CheckpointManager``. Averages come in two ways:

    - ``average`` keeps them beside the optimizers of ``param_groups``, by one ``ShardedAverages`` for each part.
    - ``optimizer_name="ShardedASGD"`` in ``param_groups`` builds a ``ShardedASGD`` for each part, whose module it is.

    Parts that other ranks do not have, as under pipeline parallelism, are averaged by the ranks that have them. The
    state dict has an average under ``averages.<name>.<parameter>``, by which torchtitan's checkpoints save and load it
    on any number of ranks. The constructor, ``averaged_parameters`` and ``load_state_dict`` are collective.

    Args:
        config: the options of ``OptimizersContainer.Config``, and ``average`` and ``averages``.
        model_parts: the parts of the model that this rank has, as they are trained.

    Raises:
        TypeError, ValueError: on every rank, for what ``ShardedASGD`` and ``ShardedAverages`` refuse, and where neither
            of the two ways is chosen.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        average: Average | Mapping[str, Average] | None = None
        """The kind of average beside the optimizers, or a mapping of names to kinds; None with ``ShardedASGD``."""

        averages: dict[str, Any] = field(default_factory=dict)
        """Further options of ``ShardedAverages``, such as ``{"start": 1000}``."""

    def __init__(self, config: Config, *, model_parts: list[nn.Module]) -> None:
        self._groups = _groups_of(model_parts)
        self._has_checkpoints = False
        super().__init__(config, model_parts=model_parts)
        self.averages: list[ShardedAverages] = []  # by part; empty with ShardedASGD
        if config.average is not None:
            for part, group in zip(model_parts, self._groups, strict=True):
                held = set(map(id, part.parameters()))
                own = [optimizer for optimizer in self.optimizers if id(_first(optimizer)) in held]
                options = {"optimizer": own, "module": part, "process_group": group, **config.averages}
                self.averages.append(ShardedAverages(part.named_parameters(), config.average, **options))
        elif not all(isinstance(optimizer, ShardedASGD) for optimizer in self.optimizers):
            kinds = sorted({type(optimizer).__name__ for optimizer in self.optimizers})
            raise TypeError(
                f"AveragedOptimizers without average= needs optimizer_name='ShardedASGD' in every group, found {kinds}"
            )

    def _resolve_optimizer_factory(self, name: str) -> Any:  # type: ignore[override]
        return self._sharded_asgd if name == "ShardedASGD" else super()._resolve_optimizer_factory(name)

    def _sharded_asgd(self, groups: Sequence[Mapping[str, Any]], **options: Any) -> ShardedASGD:
        """Builds the optimizer of a part, from groups without torchtitan's choices of an implementation."""
        first = groups[0]["params"][0]
        number = next(
            n for n, part in enumerate(self.model_parts) if any(first is param for param in part.parameters())
        )
        own = [{key: value for key, value in group.items() if key not in ("fused", "foreach")} for group in groups]
        options = {"gradients": "reduced", "process_group": self._groups[number], **options}
        return ShardedASGD(own, module=self.model_parts[number], **options)

    def step(self, closure: Any = None) -> None:
        """Steps all optimizers, whose averages follow."""
        if not self._has_checkpoints:
            self._has_checkpoints = True
            logger.warning(
                "AveragedOptimizers without AveragedCheckpoints: the last checkpoint, with torchtitan's default "
                "last_save_model_only=True, will have the weights and no average"
            )
        super().step(closure)

    @contextlib.contextmanager
    def averaged_parameters(self, name: str | None = None) -> Iterator[None]:
        """Inside the block, all parts hold an average; afterwards, exactly what they held before. Collective.

        Args:
            name: which average, equal on every rank; None for the first.
        """
        with contextlib.ExitStack() as stack:
            for holder in self.averages or self.optimizers:
                stack.enter_context(holder.averaged_parameters(name))
            yield

    # State dicts -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Returns torchtitan's flat state dict, and with it the averages and how many iterates each has taken."""
        flat = super().state_dict()
        for averages in self.averages:
            state = averages.state_dict()
            progress = state.pop(PROGRESS)
            common, others = progress.pop("iterates"), progress.pop("others")
            for average, values in state.items():
                flat |= {f"{PREFIX}.{average}.{name}": value for name, value in values.items()}
                flat |= {f"{PREFIX}.{ITERATES}.{name}": others.get(name, common) for name in values}
            flat[f"{PREFIX}.{PROGRESS}"] = progress  # equal for all parts, but for buffers
        return flat

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what ``state_dict`` has returned, of these or other parts. Collective."""
        super().load_state_dict(state_dict)
        for averages in self.averages:
            live = averages.state_dict()
            live.pop(PROGRESS)
            names = [name for values in live.values() for name in values]
            counts = {name: state_dict[f"{PREFIX}.{ITERATES}.{name}"] for name in names}
            common = max(counts.values(), default=0)
            progress = dict(state_dict[f"{PREFIX}.{PROGRESS}"]) | {
                "iterates": common,
                "others": {name: count for name, count in counts.items() if count != common},
            }
            state = {
                average: {name: state_dict[f"{PREFIX}.{average}.{name}"] for name in values}
                for average, values in live.items()
            }
            averages.load_state_dict({**state, PROGRESS: progress})


class AveragedCheckpoints(CheckpointManager):
    """torchtitan's checkpoints, whose last one, if it has the model only, has the average as the model.

    Others are torchtitan's: they have the weights, and the averages beside the state of the optimizers.

    Args:
        config: the options of ``CheckpointManager.Config``, and ``average``.
        optimizers: an ``AveragedOptimizers``.
        others: what ``CheckpointManager`` takes.

    Raises:
        TypeError: the optimizers are another container.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(CheckpointManager.Config):
        average: str | None = None
        """The average that the last checkpoint has as the model; None for the first."""

    def __init__(self, config: Config, *, optimizers: OptimizersContainer, **others: Any) -> None:
        if not isinstance(optimizers, AveragedOptimizers):
            raise TypeError(
                f"AveragedCheckpoints is for AveragedOptimizers, got {type(optimizers).__name__}: set optimizer= to "
                "AveragedOptimizers.Config(...)"
            )
        self._averaged, self._average = optimizers, config.average
        optimizers._has_checkpoints = True
        super().__init__(config, optimizers=optimizers, **others)

    def _save(self, curr_step: int, last_step: bool = False) -> bool:
        if last_step and self.last_save_model_only and self._should_save(curr_step, last_step):
            with self._averaged.averaged_parameters(self._average):
                return super()._save(curr_step, last_step)
        return super()._save(curr_step, last_step)


def _first(optimizer: Optimizer) -> Any:
    return optimizer.param_groups[0]["params"][0]


def _groups_of(model_parts: Sequence[nn.Module]) -> list[dist.ProcessGroup | None]:
    """Returns, for each part, the process group of the ranks that have it; None where all have. Collective."""
    keys = [tuple(name for name, _ in part.named_parameters()) for part in model_parts]
    if not dist.is_initialized():
        return [None] * len(keys)
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, keys)
    groups: dict[Any, dist.ProcessGroup | None] = {}
    for key in dict.fromkeys(key for of_rank in every for key in of_rank):
        ranks = [rank for rank, of_rank in enumerate(every) if key in of_rank]
        groups[key] = None if len(ranks) == len(every) else dist.new_group(ranks)
    return [groups[key] for key in keys]
