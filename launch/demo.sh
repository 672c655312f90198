#!/usr/bin/env bash
# A real run from one command. Two ranks train a small language model, are stopped by a signal half way, and three ranks
# go on and finish. Then a table and a plot. Options go to launch/train.py:  launch/demo.sh --model lstm
set -euo pipefail

# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$ROOT"

RUN="runs/demo-$(date +%Y%m%d-%H%M%S)"
STOP_AFTER=1300 # steps of 1600. Averaging starts at 1000, so that both parts have something to show
export OMP_NUM_THREADS=1

# Starts ranks in the background; $torchrun is the process that watches over them.
start_ranks() {
    local ranks="$1"
    shift
    "$PY" -m torch.distributed.run --standalone --nproc-per-node "$ranks" launch/train.py \
        --out "$RUN" --checkpoint-dir "$RUN/checkpoints" "$@" &
    torchrun=$!
}

wait_for_step() {
    until grep -qs "\"step\": $1," "$RUN/metrics.jsonl"; do
        kill -0 "$torchrun" 2>/dev/null ||
            die "the ranks ended before step $1 was evaluated: see the messages above; --steps and --eval-every must lead there."
        sleep 0.2
    done
}

setup_environment train
mkdir -p "$RUN"
trap 'kill -TERM "$torchrun" 2>/dev/null || true' EXIT # Ctrl-C ends the ranks too

say "two ranks train; after step $STOP_AFTER one of them will be told to stop"
start_ranks 2 "$@"
wait_for_step "$STOP_AFTER"
read -ra ranks < <(cat "/proc/$torchrun/task/$torchrun/children" && echo) # torchrun's children
say "kill -TERM ${ranks[0]}"
kill -TERM "${ranks[0]}"
if wait "$torchrun"; then
    die "the two ranks ended as if the last step were done: see the messages above."
fi # torchrun fails as its ranks do, which say by a status of their own that they were stopped

say "three ranks go on"
start_ranks 3 "$@"
wait "$torchrun" || die "the three ranks failed: see the messages above."
grep -q "\"step\": $STOP_AFTER,.*\"world_size\": 2" "$RUN/metrics.jsonl" ||
    die "the three ranks did not go on from where the two were stopped: see the messages above."

say "held-out bits per byte; bytes of optimizer state per rank, beside torch.optim.ASGD and AveragedModel"
"$PY" launch/report.py "$RUN"
say "the plot of the curves: $RUN/loss.png"
