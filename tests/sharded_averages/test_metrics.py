"""`ShardedAverages.metrics`: counts, `mu`, and distances to the recursion over whole iterates, under every layout."""

import math

import pytest
import torch

from dist_asgd import EMA, ShardedAverages
from tests.support.beside import KINDS, STEPS, build, iterate, trained
from tests.support.failures import one_message, quick_message
from tests.support.iterates import averaged
from tests.support.ranks import run_alone, run_ranks


def check_layout(rank: int, layout: str, options: dict[str, bool]) -> None:
    model, _, averages, iterates = trained(layout, **options)
    expected = {"updates": STEPS, "averaging": 1}
    expected |= {f"mu/{name}": kind.mu(STEPS, -1) for name, kind in KINDS.items()}
    assert averages.metrics() == expected
    found, last = averages.metrics(distance=True), iterate(model)
    for name, kind in KINDS.items():
        whole = averaged(iterates, kind)
        parts = [torch.linalg.vector_norm(last[key].double() - whole[key].double()).item() for key in last]
        assert math.isclose(found.pop(f"distance/{name}"), math.hypot(*parts), rel_tol=1e-12), name
    assert found == expected


@pytest.mark.parametrize(
    ("layout", "world_size", "options"),
    [("zero", 1, {}), ("zero", 3, {}), ("ddp", 2, {"shard_replicas": False}), ("fsdp", 3, {}), ("hsdp", 2, {})],
)
def test_the_recursion_over_whole_iterates(layout: str, world_size: int, options: dict[str, bool]) -> None:
    run_ranks(world_size, check_layout, layout, options)


def test_one_rank_alone_may_ask_for_all_but_the_distance() -> None:
    def ranks(rank: int) -> str:
        _, _, averages = build("ddp")
        if rank == 0:
            assert averages.metrics() == {"updates": 0, "averaging": 0, "mu/ema": 1.0, "mu/mean": 1.0}
        text = quick_message(lambda: averages.metrics(distance=True) if rank else averages.full_state_dict())
        with averages.averaged_parameters():
            assert averages.metrics()["updates"] == 0
            assert "averaged_parameters" in quick_message(lambda: averages.metrics(distance=True), RuntimeError)
        assert averages.metrics(distance=True)["distance/ema"] == 0
        return text

    one_message(run_ranks(2, ranks), "metrics(distance=True)", "full_state_dict()", "rank 0", "rank 1")


def test_further_optimizers_have_their_numbers() -> None:
    def alone() -> None:
        params = {name: torch.nn.Parameter(torch.zeros(2)) for name in ("a", "b")}
        optimizers = [torch.optim.SGD([param], lr=1.0) for param in params.values()]
        averages = ShardedAverages(params.items(), EMA(0.5), optimizer=optimizers)
        for optimizer, steps in zip(optimizers, (3, 1), strict=True):
            for _ in range(steps):
                for param in params.values():
                    param.grad = torch.ones(2)
                optimizer.step()
        mus = [EMA(0.5).mu(updates, -1) for updates in (3, 1)]
        found = averages.metrics(distance=True)
        expected = averaged([{"a": torch.full((2,), -float(n))} for n in (1, 2, 3)], EMA(0.5))["a"]
        assert found.pop("distance") == pytest.approx(torch.linalg.vector_norm(-3.0 - expected.double()).item())
        assert found == {"updates": 3, "updates/1": 1, "mu": mus[0], "mu/1": mus[1], "averaging": 1}

    run_alone(alone)
