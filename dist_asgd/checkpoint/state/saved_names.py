"""Matches names in a checkpoint, which may have those of wrappers or a prefix in them, with names of live modules.

A checkpoint has other names than the live module where the module was wrapped at the save by what a ``state_dict()``
names, such as DistributedDataParallel (``module.``) or ``torch.compile`` (``_orig_mod.``), or was a part of another
module (``model.``). Checkpoints of modules themselves have no names of wrappers: ``module_names.py`` leaves them out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping

from dist_asgd._torch_private import WRAPPER_NAMES
from dist_asgd.checkpoint.errors import CheckpointError

_LEFT_OUT = WRAPPER_NAMES | {"module"}  # "module" is what DistributedDataParallel and DataParallel add


def renamed(saved: Iterable[str], live: Collection[str], prefix: str = "") -> dict[str, str]:
    """Returns the live name of each saved name, or, where there is none, the saved name without ``prefix``.

    A name that is a live one as it is stays. Others are compared without the parts that wrappers add.

    Raises:
        CheckpointError: two saved names become one.
    """
    counts = Counter(map(_unwrapped, live))
    by_unwrapped = {_unwrapped(name): name for name in live if counts[_unwrapped(name)] == 1}
    short = {name: name.removeprefix(prefix) for name in saved}
    exact = set(short.values()) & set(live)
    found: dict[str, str] = {}
    for name, rest in short.items():
        match = by_unwrapped.get(_unwrapped(rest), rest)
        found[name] = rest if rest in exact or match in exact else match
    _check_distinct(found, prefix)
    return found


def without_wrappers(names: Collection[str]) -> dict[str, str]:
    """Returns each name without the parts that wrappers add; ``module`` only where every name begins with it.

    Raises:
        CheckpointError: two names become one.
    """
    found = {name: ".".join(part for part in name.split(".") if part not in WRAPPER_NAMES) for name in names}
    if all(name.startswith("module.") for name in found.values()):
        found = {name: bare.removeprefix("module.") for name, bare in found.items()}
    _check_distinct(found, "")
    return found


def _check_distinct(found: Mapping[str, str], prefix: str) -> None:
    sources: dict[str, str] = {}
    for name, new in sorted(found.items()):
        if sources.setdefault(new, name) != name:
            raise CheckpointError(
                f"the entries {sources[new]!r} and {name!r} both become {new!r}, without the names of wrappers and the "
                f"prefix {prefix!r}: take another prefix=, or a checkpoint that has one of them"
            )


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _LEFT_OUT)
