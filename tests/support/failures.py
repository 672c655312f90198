"""What tests of errors share: every rank says the same thing soon, and nothing has changed after it."""

import time
from collections.abc import Callable
from typing import Any

from tests.support.oracle import PLAIN, Pair, make_parameters, same_bits
from tests.support.ranks import message_of, run_ranks

SECONDS = 8.0  # an error takes no longer than this, on any rank


def quick_message(fn: Callable[[], Any], *kinds: type[BaseException]) -> str:
    start = time.monotonic()
    text = message_of(fn, *kinds)
    assert time.monotonic() - start < SECONDS, f"it took {time.monotonic() - start:.0f} s to say: {text}"
    return text


def one_message(texts: list[str], *parts: str) -> None:
    """Every rank said the same, and it contains each part."""
    assert all(text == texts[0] for text in texts), "ranks say different things:\n" + "\n".join(texts)
    for part in parts:
        assert any(p in texts[0] for p in part.split("|")), f"{part!r} is not in: {texts[0]}"


def unchanged(pair: Pair, fn: Callable[[], Any]) -> str:
    """The message of the error of `fn`, after which the parameters are what they were."""
    before = [p.detach().clone() for p in pair.params]
    text = quick_message(fn)
    pair.optimizer.synchronize()
    assert all(map(same_bits, pair.params, before)), f"parameters changed although the step failed: {text}"
    return text


def failing_step(
    world_size: int, spoil: Callable[[int, Pair], Any], repair: Callable[[int, Pair], Any] | None = None, **options: Any
) -> list[str]:
    """Train, spoil something, fail, repair, and train on with the right bits; the messages of the ranks."""

    def ranks(rank: int) -> str:
        pair = Pair(make_parameters(PLAIN), **{"lr": 0.1, "t0": 1, **options})
        pair.train(range(4))

        def go() -> None:
            spoil(rank, pair)
            pair.optimizer.step()

        text = unchanged(pair, go)
        if repair is not None:
            repair(rank, pair)
        pair.check_state("after the failed step")
        pair.optimizer.zero_grad()
        pair.train(range(10, 16))
        return text

    return run_ranks(world_size, ranks, timeout=40)
