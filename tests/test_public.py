"""What users may import is a fact that a test holds on to: adding or removing a name must be meant."""

import inspect
from importlib.metadata import version

import dist_asgd

PUBLIC = {"Checkpointer", "NonMonotonicTrigger", "ShardedASGD", "__version__", "export", "load", "merge", "save"}
PUBLIC |= {"EMA", "PolynomialDecay", "ShardedAverages", "Tail", "TwoTailed", "Uniform"}


def test_exported_names():
    assert set(dist_asgd.__all__) == PUBLIC, (
        "dist_asgd.__all__ changed. If you meant it, change PUBLIC here and the README's list of names too."
    )
    assert len(dist_asgd.__all__) == len(PUBLIC), "dist_asgd.__all__ names something twice: remove one."


def test_every_exported_name_exists():
    missing = [name for name in dist_asgd.__all__ if not hasattr(dist_asgd, name)]
    assert not missing, f"dist_asgd.__all__ promises {missing}, which dist_asgd/__init__.py does not import."


def test_every_public_name_and_method_says_what_it_does():
    """The API reference is made of docstrings."""
    for name in sorted(PUBLIC - {"__version__"}):
        found = getattr(dist_asgd, name)
        assert inspect.getdoc(found), name
        for method, value in vars(found).items() if inspect.isclass(found) else ():
            if not method.startswith("_") and (callable(value) or isinstance(value, property)):
                assert inspect.getdoc(value), f"{name}.{method} has no docstring"


def test_version_is_the_installed_one():
    installed = version("dist-asgd")
    assert dist_asgd.__version__ == installed, (
        f"dist_asgd.__version__ is {dist_asgd.__version__}, the installed package says {installed}: "
        "make it equal to version in pyproject.toml, then run launch/test.sh, which installs again."
    )
