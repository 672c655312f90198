#!/usr/bin/env bash
# Runs the telling tests with other versions of torch, one after the other, and prints a row of a table for each:
#
#   launch/matrix.sh 2.11.0 2.15.0                       # with python3
#   PYTHON=/path/to/python3.13 launch/matrix.sh 2.13.0   # with another Python
#   launch/matrix.sh "2.11.0 numpy<2.4"                  # with other packages beside torch, as pip writes them
#
# A version has an environment of its own, made as a newcomer makes it: pip install "torch==2.11.0" ".[test]", without
# constraints.txt. It takes 5.5 GB below $TMPDIR (or /tmp) and is removed before the next one is made; output of pip and
# pytest goes to standard error. benchmarks/results/versions.md has the rows. Where pip's own configuration has constraints
# that forbid a version, PIP_CONFIG_FILE=/dev/null leaves that configuration out.
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
PYTHON="${PYTHON:-python3}"

# Tests that a release of torch may break, each with the reason. They are few, so that a version takes minutes.
T=tests/optimizer B=tests/sharded_averages C=tests/checkpoint
TELLING=(
    tests/test_torch_private.py # private names of torch, which any release may change
    tests/comm/test_collectives.py # gloo, and the names of collectives that 2.13 deprecated
    $T/test_bits.py::test_without_torch_distributed_it_equals_torch # torch.optim.ASGD: its operators, options and state
    $T/test_bits.py::test_odd_shapes_and_options_equal_torch # the same on 1 to 4 ranks, with hooks of autograd
    $T/test_layouts.py::test_training_is_that_of_one_process # DDP, FSDP2, HSDP and tensor parallelism
    $T/test_ddp_and_compile.py # torch.compile, compiled autograd
    $T/test_portability.py::test_stock_pytorch_reads_it_without_this_library # DCP's functions on state dicts, dcp.load
    $T/test_portability.py::test_copies_of_the_state_dict_do_not_change_with_the_optimizer # dcp.async_save
    $B/test_optimizers.py::test_every_step_is_an_iterate # hooks of all optimizers of torch
    $B/test_layouts.py # averages beside another optimizer, under every layout
    $B/test_fsdp1.py # FSDP1, whose slices are found by private names
    $C/test_dcp_metadata.py # stock dcp.load reads files of ours
    $C/test_stock_metadata.py::test_what_two_ranks_saved_is_read_back # what stock dcp.save writes, field by field
    $C/test_stock_metadata.py::test_every_dtype_is_read # what torch.save writes, dtype by dtype
    $C/test_stock_load.py::test_any_number_of_ranks_to_any_other # load() reads files of stock dcp.save
    $C/test_other_versions.py # files of other versions of torch, and ours on this one beside theirs
    tests/test_previous_release.py # files of the last release of this library
    tests/kernels/test_cpu.py::test_one_pass_has_the_bits_of_the_operators # the update in C against torch's operators
    tests/kernels/test_gpu.py::test_by_the_interpreter # the Triton kernels, by the Triton that this torch comes with
    tests/launch/test_train.py::test_one_process_goes_on_where_two_ranks_were # launch/train.py, started and resumed
)

die() {
    printf 'dist_asgd: %s\n' "$*" >&2
    exit 1
}

# Prints a row: versions, then the counts in pytest's report, or the words of the second argument instead of them.
row() {
    "$WORK/env/bin/python" - "$@" <<'PRINT'
import importlib.metadata, platform, sys
import xml.etree.ElementTree as tree

asked, result = sys.argv[1:]

def version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"

cells = [asked, version("triton"), version("numpy"), platform.python_version()]
if result.endswith(".xml"):
    suite = tree.parse(result).getroot().find("testsuite")
    tests, failed, errors, skipped = (int(suite.get(name)) for name in ("tests", "failures", "errors", "skipped"))
    cells += [str(tests - failed - errors - skipped), str(failed + errors), str(skipped), f"{float(suite.get('time')):.0f}"]
else:
    cells += [result, "", "", ""]
print("|", " | ".join(cells), "|", flush=True)
PRINT
}

# uv, where it is installed, does it in a tenth of the time, and links files from its cache instead of copying them.
install() {
    if command -v uv >/dev/null; then
        uv pip install -q --python "$WORK/env/bin/python" "$@"
    else
        "$WORK/env/bin/python" -m pip install -q --no-input --disable-pip-version-check "$@"
    fi
}

run_version() {
    local version status=0 beside
    read -r version beside <<<"$1"
    rm -rf "$WORK/env"
    "$PYTHON" -m venv "$WORK/env" || die "$PYTHON cannot make virtual environments: install its venv and pip."
    # shellcheck disable=SC2086 # several packages are several words
    if ! install "torch==$version" "$ROOT[test]" $beside </dev/null >&2; then
        row "$version" "could not be installed"
        return
    fi
    # Tests run on the files here, which are those that were installed. OMP_NUM_THREADS: ranks share the cores.
    (cd "$ROOT" && OMP_NUM_THREADS=1 "$WORK/env/bin/python" -m pytest -q -p no:cacheprovider \
        --junitxml "$WORK/report.xml" "${TELLING[@]}" </dev/null >&2) || status=$?
    ((status <= 1)) || die "pytest ended with status $status on torch $version: see its message above."
    row "$version" "$WORK/report.xml"
}

(($#)) || die "say which versions of torch: launch/matrix.sh 2.11.0 2.15.0"
command -v "$PYTHON" >/dev/null || die "$PYTHON is missing."
WORK="$(mktemp -d)"
trap 'rm -rf "$WORK"' EXIT
echo "| torch | Triton | NumPy | Python | passed | failed | skipped | seconds |"
echo "|---|---|---|---|---:|---:|---:|---:|"
for version in "$@"; do
    run_version "$version"
done
