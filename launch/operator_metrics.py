"""Numbers for whoever watches a run: a file for node_exporter's textfile collector, and scalars for TensorBoard.

`prometheus_client` writes the OpenMetrics text: it knows how names, units and labels have to be written.
"""

import contextlib
import logging
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from run import Progress, Run

try:
    from prometheus_client import CollectorRegistry
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
    from prometheus_client.openmetrics.exposition import generate_latest
except ImportError:
    generate_latest = None  # type: ignore[assignment]

PREFIX = "dist_asgd_"
logger = logging.getLogger("dist_asgd.train")


class Family(NamedTuple):
    """How a number of `metrics()` or of a run is published."""

    name: str  # without the prefix; ends in its unit, where it has one
    help: str
    unit: str = ""
    counts: bool = False  # since the process began; otherwise the number goes up and down
    labels: tuple[str, ...] = ()


FAMILIES = {
    "step": Family("step", "Steps taken.", labels=("group",)),
    "lr": Family("learning_rate", "Learning rate.", labels=("group",)),
    "eta": Family("step_size", "Step size of the next step.", labels=("group",)),
    "mu": Family("mu", "Fraction by which the next step moves the average.", labels=("average", "group")),
    "averaging": Family("averaging", "1 if an average of any parameter is kept, 0 before."),
    "grad_norm": Family("gradient_norm", "Norm of the last gradient before it was clipped."),
    "bits_per_byte": Family(
        "held_out_bits_per_byte", 'Held-out loss; of the weights where average="".', labels=("average",)
    ),
    "train": Family("train_bits_per_byte", "Training loss since the evaluation before."),
    "ranks": Family("ranks", "Ranks that train."),
    "steps_per_second": Family("steps_per_second", "Steps per second, evaluations and saves included."),
    "tokens_per_second": Family("tokens_per_second", "Bytes of text trained on per second, over all ranks."),
    "preempted": Family("preempted", "1 if a signal has stopped the run before its last step."),
    "finished": Family("finished", "1 if the last step is done."),
    "saves": Family("checkpoint_saves", "Committed saves.", counts=True),
    "failed_saves": Family("checkpoint_failed_saves", "Saves that have raised.", counts=True),
    "blocked_seconds": Family("checkpoint_blocked_seconds", "Time that saves kept rank 0 waiting.", "seconds", True),
    "written_bytes": Family("checkpoint_written_bytes", "Bytes of committed saves by rank 0.", "bytes", True),
    "retried_requests": Family("checkpoint_retried_requests", "Requests of rank 0 made again.", counts=True),
    "failed_requests": Family("checkpoint_failed_requests", "Requests of rank 0 given up.", counts=True),
    "saved_at": Family(
        "checkpoint_saved_timestamp_seconds", "Unix time of the checkpoint saved or loaded last.", "seconds"
    ),
    "lost_steps": Family("checkpoint_lost_steps", "Steps from the checkpoint loaded to the newest there was."),
}


class OperatorMetrics:
    """The newest numbers of a run, by the keys of `metrics()`, and where they are written. For rank 0.

    Args:
        file: path of the OpenMetrics file; "" for none.
        tensorboard: directory for TensorBoard; "" for none.

    Raises:
        SystemExit: a package, or the directory of the file, is missing.
    """

    def __init__(self, file: str, tensorboard: str) -> None:
        if file and generate_latest is None:
            raise SystemExit("--metrics-file needs prometheus_client: pip install 'dist-asgd[train]'")
        if file and not Path(file).absolute().parent.is_dir():
            raise SystemExit(f"--metrics-file {file}: its directory does not exist; make it, or take another")
        self.file = file
        self.numbers: dict[str, float] = {}
        self._scalars = _summary_writer(tensorboard) if tensorboard else None

    def write(self, numbers: Mapping[str, float], step: int) -> None:
        """Replaces the numbers given, keeps the others, and writes all.

        Raises:
            OSError: a file cannot be written.
        """
        found = dict(numbers)
        if (age := found.pop("seconds_since_save", None)) is not None:
            found["saved_at"] = time.time() - age  # a reader comes later: an age would be wrong by then
        self.numbers |= found
        if self._scalars is not None:
            for key, value in found.items():
                self._scalars.add_scalar(f"dist_asgd/{key}", value, step)
            self._scalars.flush()
        if self.file:
            _replace(Path(self.file), openmetrics(self.numbers))


class Watched:
    """Publishes what a run is doing for its operator. Collective when it is made; then rank 0 alone writes."""

    def __init__(self, run: Run, progress: Progress) -> None:
        self._run, self._progress = run, progress
        self._step, self._time = progress.step, time.monotonic()
        self._metrics: OperatorMetrics | None = None
        run.world.from_rank_zero(self._open)

    def _open(self) -> None:
        args = self._run.args
        if args.metrics_file or args.tensorboard:
            self._metrics = OperatorMetrics(args.metrics_file, args.tensorboard)

    @contextlib.contextmanager
    def afterwards(self) -> Iterator[None]:
        """Writes after the block, also where it raises."""
        try:
            yield
        finally:
            self.write()

    def write(self, **numbers: float) -> None:
        """Writes the numbers given beside those of the optimizer and the checkpointer. A failure is logged."""
        if self._metrics is None:
            return
        run, step, now = self._run, self._progress.step, time.monotonic()
        if step > self._step:
            rate = (step - self._step) / (now - self._time)
            numbers |= {"steps_per_second": rate, "tokens_per_second": rate * run.args.batch * run.args.length}
            self._step, self._time = step, now
        counts = run.checkpointer.metrics() if run.checkpointer else {}
        try:
            self._metrics.write({**run.optimizer.metrics(), **counts, "ranks": run.world.size, **numbers}, step)
        except OSError as error:
            logger.warning("the metrics of step %d were not written, and will be with the next ones: %s", step, error)


def openmetrics(numbers: Mapping[str, float]) -> bytes:
    """Returns the OpenMetrics text of numbers by the keys of `metrics()`: word, `/average`, `/number of the group`."""
    registry = CollectorRegistry()
    registry.register(_Numbers(numbers))
    return generate_latest(registry)


class _Numbers:
    """What a registry of `prometheus_client` asks for its families."""

    def __init__(self, numbers: Mapping[str, float]) -> None:
        self._numbers = numbers

    def collect(self) -> list[Any]:
        families: dict[str, Any] = {}
        for key, value in self._numbers.items():
            word, *rest = key.split("/")
            group = rest.pop() if rest and rest[-1].isdecimal() else "0"
            found = {"average": rest[0] if rest else "", "group": group}
            name, text, unit, counts, labels = FAMILIES[word]
            if word not in families:
                kind = CounterMetricFamily if counts else GaugeMetricFamily
                families[word] = kind(PREFIX + name, text, labels=labels, unit=unit)
            families[word].add_metric([found[label] for label in labels], value)
        return list(families.values())


def _replace(path: Path, content: bytes) -> None:
    """Writes a file beside `path` and renames it, so that a collector never reads half of one."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")  # does not end in .prom: no collector reads it
    try:
        beside.write_bytes(content)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _summary_writer(directory: str) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise SystemExit("--tensorboard needs tensorboard: pip install tensorboard") from None
    return SummaryWriter(directory)
