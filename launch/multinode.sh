#!/bin/bash
# Starts torchrun on one host of several. Run the same command on each host; hosts may come and go while it runs:
#
#   bash launch/multinode.sh 10.0.0.1:29400 2:4 --nproc-per-node 8 launch/train.py --steps 100000 \
#       --out s3://bucket/run --checkpoint-dir s3://bucket/run/checkpoints
#
# HOST:PORT is the rendezvous: one of the hosts, by an address that the others reach, and a free port. MIN:MAX is how
# many hosts train. What follows goes to torchrun, whose later options win over those below. The checkpoints must lie
# where every host sees them: a bucket or a shared file system.
#
# - A rank or a host dies: the others start again on the hosts left, at least MIN, from the newest checkpoint.
# - A host comes, or comes again: the others save, and all of them go on from there, at most MAX.
# - The rendezvous host dies: the others try again every 5 s. Start the command on it again, and no more.
# - SIGTERM, SIGINT, SIGUSR1, SIGUSR2 or SIGHUP: this host saves and ends with status 75, and the others go on.
set -uo pipefail
if [ $# -lt 3 ]; then
    echo "usage: bash launch/multinode.sh HOST:PORT MIN:MAX [options of torchrun] launch/train.py [its options]" >&2
    exit 2
fi
rendezvous=$1 nodes=$2
shift 2

# The address and the interface by which this host reaches the rendezvous: a host name often resolves to 127.0.1.1,
# and gloo and NCCL otherwise take an interface of their own choice (docker0, a management network).
ip=$(getent ahostsv4 "${rendezvous%:*}" | awk 'NR == 1 { print $1 }')
address=$(ip -oneline -4 route get "$ip" 2>/dev/null | sed -n 's/.* src \([0-9.]*\).*/\1/p')
interface=$(ip -oneline -4 address show to "$address" 2>/dev/null | awk 'NR == 1 { print $2 }')
if [ -z "$ip" ] || [ -z "$interface" ]; then
    echo "multinode.sh: this host has no IPv4 route to ${rendezvous%:*}: take an address that it reaches" >&2
    exit 2
fi
export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$interface} NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$interface}

# Ranks meet in a store that rank 0 opens for each round. With the rendezvous' own store shared for that, as torch 2.13
# does by default, the survivor of a lost host saves and stops, and a host that joins waits for ever.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

options=(
    --nnodes "$nodes"
    --rdzv-backend c10d --rdzv-endpoint "$ip:${rendezvous##*:}" --rdzv-id "${rendezvous##*:}"
    --local-addr "$address"
    --max-restarts 100 # a host that comes or goes counts as one on each of the others
    # is_host: torchrun's own guess compares names. join_timeout: how long to wait for MIN hosts. last_call_timeout: how
    # long to wait for more than MIN. A host that says nothing for 3 keep-alives of 2 s is taken for dead.
    --rdzv-conf "is_host=$([ "$ip" = "$address" ] && echo 1 || echo 0),join_timeout=600,last_call_timeout=5,\
keep_alive_interval=2,keep_alive_max_attempt=3,read_timeout=30"
)

# torchrun knows SIGTERM, SIGINT and SIGHUP; all that a scheduler may send as a warning becomes SIGTERM.
stopped=
trap 'stopped=1; [ -z "${agent:-}" ] || kill -TERM "$agent" 2>/dev/null' TERM INT HUP USR1 USR2

# torchrun itself ends when it loses the rendezvous, and when its restarts are used up: then it is started again.
for attempt in {1..20}; do
    torchrun "${options[@]}" "$@" &
    agent=$!
    [ -z "$stopped" ] || kill -TERM "$agent"
    wait "$agent"
    status=$?
    while kill -0 "$agent" 2>/dev/null; do # a signal ends `wait` before torchrun has ended
        wait "$agent"
        status=$?
    done
    [ "$status" -ne 0 ] || exit 0
    [ -z "$stopped" ] || exit 75
    [ "$status" -ne 2 ] || exit 2 # a wrong option stays wrong
    echo "multinode.sh: torchrun ended with status $status; attempt $attempt of 20, the next in 5 s" >&2
    sleep 5
    [ -z "$stopped" ] || exit 75
done
exit "$status"
