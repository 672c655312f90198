"""The shape of the package, read from its source: imports go one way, functions stay small, no asserts."""

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "dist_asgd"
FILES = sorted(PACKAGE.rglob("*.py"))

# A folder, or a file that stands in none, may import only what is in the floors above its own in this list.
FLOORS = [
    {"_torch_private", "boxes", "c_library"},
    {"comm"},
    {"averages"},
    {"asgd"},
    {"kernels"},
    {"sharding"},
    {"buckets", "pieces", "wrappers", "planning"},
    {"step"},
    {"swap", "state_dict", "metrics"},
    {"state_view", "model_averages"},
    {"optimizer", "sharded_averages"},
    {"__init__"},
    {"cli", "integrations"},
    {"__main__"},
]
# The folders of checkpoints stand on few others only: they serve any torch state dict.
CHECKPOINT_FLOORS = [
    {"checkpoint.metrics", "checkpoint.progress", "checkpoint.storage"},
    {"checkpoint.errors"},
    {"checkpoint.format"},
    {"checkpoint.run"},
    {"checkpoint.retention", "checkpoint.state", "checkpoint.stock"},
    {"checkpoint.loading", "checkpoint.saving"},
    {"checkpoint.checkpointer", "checkpoint.export"},
    {"checkpoint.merging"},
    {"checkpoint"},
]
BELOW_CHECKPOINT = {"_torch_private", "boxes", "c_library", "comm", "averages"}
ABOVE_CHECKPOINT = {"__init__", "cli", "integrations", "__main__"}
MAX_FUNCTION_LINES = 35


def module_of(path: Path) -> str:
    """Names a file's module: dist_asgd/asgd/rule.py is asgd.rule; a folder's __init__.py is the folder."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def place_of(module: str) -> str:
    """Names the folder of a module, or the module where it stands in none: "step", "checkpoint.saving", "optimizer"."""
    parts = module.split(".")
    return ".".join(parts[: 2 if parts[0] == "checkpoint" else 1])


def allowed_from(place: str) -> set[str] | None:
    """Returns the places that ``place`` may import, or None for a place that is on no floor."""
    for floors, below in ((FLOORS, set()), (CHECKPOINT_FLOORS, BELOW_CHECKPOINT)):
        for number, floor in enumerate(floors):
            if place in floor:
                allowed = set().union(*floors[:number]) | below
                return allowed | set().union(*CHECKPOINT_FLOORS) if place in ABOVE_CHECKPOINT else allowed
    return None


def imported_names(path: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of every import in the file, those inside functions too."""
    folder = ["dist_asgd", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = folder[: len(folder) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{source}.{alias.name}") for alias in node.names)


def package_imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, module of this package); "__init__" where something is taken from the package's root."""
    for line, name in imported_names(path):
        head, _, rest = name.partition(".")
        if head == "dist_asgd":
            parts = rest.split(".")
            prefixes = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
            yield line, next((prefix for prefix in prefixes if prefix in MODULES), "__init__")


def functions(path: Path) -> Iterator[tuple[ast.FunctionDef | ast.AsyncFunctionDef, int]]:
    """Every function with its number of lines, without its signature and its docstring."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[ast.get_docstring(node) is not None :]
            yield node, body[-1].end_lineno - body[0].lineno + 1 if body else 0


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE.parent))


MAKERS = "empty empty_strided zeros ones full tensor as_tensor asarray arange linspace logspace eye rand randn randint"
MAKES_TENSORS = {f"torch.{name}" for name in MAKERS.split()}


def each_file(check):
    """Makes one test of a check of one file, since a test for each of them would take longer than the checks."""

    def test():
        for path in FILES:
            check(path)

    return test


@each_file
def test_every_module_has_its_place(path):
    place = place_of(module_of(path))
    assert allowed_from(place) is not None, (
        f"{name_of(path)} stands on no floor: put it into one of the folders in FLOORS, or add {place!r} there, below "
        "everything that imports it, and to the map of folders in docs/design.md."
    )


@each_file
def test_imports_go_one_way(path):
    place = place_of(module_of(path))
    allowed = allowed_from(place)
    for line, module in package_imports(path):
        imported = place_of(module)
        assert imported in allowed or (imported == place != "__init__"), (
            f"{name_of(path)}:{line} imports {module}, but {place} may import only {sorted(allowed)}. "
            "Move what both need into the lower folder, or hand it over as an argument."
        )


def test_no_import_cycles():
    graph = {module: {m for _, m in package_imports(path)} for module, path in MODULES.items()}
    while True:
        free = {module for module, imported in graph.items() if not imported & graph.keys()}
        if not free:
            break
        graph = {module: imported for module, imported in graph.items() if module not in free}
    assert not graph, (
        f"{sorted(graph)} import each other in a circle or from one: move what they share into a module below them all."
    )


@each_file
def test_only_kernels_import_triton(path):
    lines = [line for line, name in imported_names(path) if name.split(".")[0] == "triton"]
    assert not lines or place_of(module_of(path)) == "kernels", (
        f"{name_of(path)}:{lines[0]} imports triton: put that code into dist_asgd/kernels/ and call it from there."
    )


@each_file
def test_functions_are_small(path):
    for function, lines in functions(path):
        assert lines <= MAX_FUNCTION_LINES, (
            f"{name_of(path)}:{function.lineno} {function.name} has {lines} lines without signature and docstring, "
            f"more than {MAX_FUNCTION_LINES}: give a part of it a name and a function of its own."
        )


@each_file
def test_no_asserts(path):
    lines = [node.lineno for node in ast.walk(tree(path)) if isinstance(node, ast.Assert)]
    assert not lines, (
        f"{name_of(path)}:{lines[0]} asserts: raise ValueError, TypeError or RuntimeError with a message that says "
        "what to do (python -O removes asserts), or restructure so that mypy sees it by itself."
    )


@each_file
def test_new_tensors_name_their_device(path):
    for node in ast.walk(tree(path)):
        if not (isinstance(node, ast.Call) and ast.unparse(node.func) in MAKES_TENSORS):
            continue
        assert any(keyword.arg in ("device", None) for keyword in node.keywords), (
            f"{name_of(path)}:{node.lineno} calls {ast.unparse(node.func)} without device=: it would make a tensor on "
            "the device that the user has given to torch.set_default_device."
        )


def test_no_test_imports_a_test_or_a_benchmark():
    folder = PACKAGE.parent / "tests"
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(tree(path)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            source = getattr(node, "module", None) or ""
            found = [name for name in (source, *names) if name.split(".")[-1].startswith("test_")]
            assert not found and source.split(".")[0] != "benchmarks" and "benchmarks" not in names, (
                f"{path.relative_to(folder.parent)}:{node.lineno} imports {found or 'a benchmark'}: move what both "
                "need into tests/support."
            )
