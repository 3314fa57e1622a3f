#!/usr/bin/env bash
# Ends the cluster that start.sh started with this FVLM_CLUSTER_DIR, and nothing else (`ray stop` would end every
# Ray cluster on the machine). A run that was training goes on from its last checkpoint when it is submitted again.
# shellcheck disable=SC2086 # $left is a list of numbers
set -euo pipefail

dir=${FVLM_CLUSTER_DIR:-$HOME/.fvlm-cluster}
[[ -f $dir/pid ]] || { echo "no cluster was started in $dir"; exit 0; }
dir=$(cd "$dir" && pwd)
leader=$(< "$dir/pid")

# The processes of the session that start.sh opened. Each has files open in our folder; by this we know them even when
# the number in the file has become another process's.
members() {
    local pid
    for pid in $(ps -o pid= --sid "$leader"); do
        [[ ! $(find "/proc/$pid/fd" -lname "$dir/*" -print -quit 2> /dev/null) ]] || echo "$pid"
    done
}

left=$(members) patience=30
if grep -qx "$leader" <<< "$left"; then
    kill -TERM "$leader" # `ray start` ends its processes in the right order
elif [[ $left ]]; then
    kill -TERM $left || true # what a killed `ray start` left; some end by themselves
    patience=3
fi
for ((i = 0; i < 2 * patience; i++)); do
    left=$(members)
    [[ $left ]] || break
    sleep 0.5
done
[[ ! $left ]] || { echo "killing what ignores SIGTERM:" $left; kill -KILL $left; }
rm "$dir/pid"
echo "stopped the cluster of $dir"
