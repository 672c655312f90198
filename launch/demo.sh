#!/usr/bin/env bash
# A real run from one command. Two ranks train a small language model, are stopped by a signal half way, and three ranks
# go on and finish. Then a table and a plot. Options go to launch/train.py:  launch/demo.sh --model lstm
set -euo pipefail

# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$ROOT"

RUN="runs/demo-$(date +%Y%m%d-%H%M%S)"
STOP_AFTER=900 # steps; averaging starts at 700, so that both halves have something to show
export OMP_NUM_THREADS=1

# Starts ranks in the background; $torchrun is the process that watches over them.
start_ranks() {
    local ranks="$1"
    shift
    "$PY" -m torch.distributed.run --standalone --nproc-per-node "$ranks" launch/train.py \
        --out "$RUN" --checkpoint-dir "$RUN/checkpoints" --t0 700 --steps 1600 --eval-every 100 "$@" &
    torchrun=$!
}

wait_for_step() {
    until grep -qs "\"step\": $1," "$RUN/metrics.jsonl"; do
        kill -0 "$torchrun" 2>/dev/null || die "the ranks ended before step $1: see the messages above."
        sleep 0.2
    done
}

setup_environment train
mkdir -p "$RUN"
trap 'kill -TERM "$torchrun" 2>/dev/null || true' EXIT # Ctrl-C ends the ranks too

say "two ranks train; at step $STOP_AFTER they will be told to stop"
start_ranks 2 "$@"
wait_for_step "$STOP_AFTER"
say "kill -TERM $torchrun (torchrun, which passes it on)"
kill -TERM "$torchrun"
wait "$torchrun" || true # torchrun reports a signal as a failure, also when all ranks have ended well
compgen -G "$RUN/checkpoints/step-*/complete.json" >/dev/null || die "the ranks stopped without a checkpoint: see the messages above."

say "three ranks go on"
start_ranks 3 "$@"
wait "$torchrun" || die "the three ranks failed: see the messages above."

say "held-out bits per byte, and bytes of optimizer state per rank"
"$PY" launch/report.py "$RUN"
say "the plot of both curves: $RUN/loss.png"
