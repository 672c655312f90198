"""A training that has begun to average."""

from tests.support.oracle import (
    Pair,
    Spec,
    make_parameters,
    random_gradients,
)


def trained(specs: list[Spec], world_size: int, steps: int = 10, **options: object) -> Pair:
    pair = Pair(make_parameters(specs), lr=0.05, **{"t0": 1, "bucket_bytes": 256, **options})
    for step in range(steps):
        pair.backward(random_gradients(specs, world_size, step))
        pair.step()
        pair.zero_grad()
    return pair
