#!/usr/bin/env bash
# This machine as a Ray cluster, for `python -m ray_jobs.submit` and `ray job submit`. stop.sh ends it.
#
# Everything listens on loopback, and all but the metrics asks for a token. What training starts inherits this shell's
# environment: set WANDB_API_KEY here (or `wandb login` once), never in a job's description.
#
#   FVLM_HOST             this machine's address in the network; then Ray listens there too, see "Two workstations" in
#                         ../README.md                            127.0.0.1
#   FVLM_HEAD             ADDRESS:PORT of the head to join        none: this machine is the head
#   FVLM_CLUSTER_DIR      token, log and Ray's session folder     ~/.fvlm-cluster  (at most 38 characters)
#   FVLM_DASHBOARD_PORT   dashboard and jobs                      8265
#   FVLM_METRICS_PORT     Prometheus text, /metrics               8080
#   FVLM_BASE_PORT        Ray's own: this one and the next six    6379
#   FVLM_NUM_CPUS         CPUs that Ray hands out                 all
#   FVLM_OBJECT_STORE_MB  shared memory for decoded batches       2048
set -euo pipefail

dir=$(mkdir -p "${FVLM_CLUSTER_DIR:-$HOME/.fvlm-cluster}" && cd "${FVLM_CLUSTER_DIR:-$HOME/.fvlm-cluster}" && pwd)
temp=$dir/ray pid_file=$dir/pid log=$dir/ray-start.log base=${FVLM_BASE_PORT:-6379}
host=${FVLM_HOST:-127.0.0.1} head=${FVLM_HEAD:-} metrics=${FVLM_METRICS_PORT:-8080}
url=http://$host:${FVLM_DASHBOARD_PORT:-8265}
fail() { echo "error: $*" >&2; exit 2; }

# Ray puts unix sockets 64 characters below its folder, and the kernel allows them 107.
((${#dir} <= 38)) || fail "$dir is too long for Ray's sockets. Set FVLM_CLUSTER_DIR to a path of at most 38 characters."
venv=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)/.venv
if [[ -x $venv/bin/ray ]]; then PATH=$venv/bin:$PATH; fi # jobs run the `python` that is found first here
command -v ray > /dev/null || fail "there is no \`ray\` on the PATH. Activate the environment that the project is installed in."
if [[ -f $pid_file ]] && grep -qsaF -- "--temp-dir=$temp" "/proc/$(< "$pid_file")/cmdline"; then
    fail "the cluster of $dir is running already (process $(< "$pid_file")). Stop it with $(dirname "$0")/stop.sh first."
elif [[ -f $pid_file ]]; then
    "$(dirname "$0")/stop.sh" # it died: what is left of it keeps its ports
fi
# Ray keeps the folders of all its sessions; the last one, with its logs, is enough.
if [[ -d $temp ]]; then find "$temp" -maxdepth 1 -name 'session_2*' -type d | sort | head -n -1 | xargs -r -d '\n' rm -rf; fi

python -c 'import ipaddress, socket, sys; socket.create_server((str(ipaddress.IPv4Address(sys.argv[1])), 0))' "$host" \
    2> /dev/null || fail "FVLM_HOST=$host is not an IPv4 address of this machine; \`hostname -I\` prints those that it has."
for port in "${url##*:}" "$metrics" $(seq "$base" $((base + 6))); do
    if (exec 3<> "/dev/tcp/$host/$port") 2> /dev/null; then
        fail "port $port is taken. Choose others with FVLM_DASHBOARD_PORT, FVLM_METRICS_PORT and FVLM_BASE_PORT."
    fi
done

if [[ $head ]]; then
    [[ $host != 127.* ]] || fail "FVLM_HEAD needs FVLM_HOST: the address at which the head reaches this machine."
    [[ -s $dir/token ]] || fail "$dir/token is missing: copy the head's there, which has the same name on the head."
    python -c 'import socket, sys; socket.create_connection(sys.argv[1].split(":"), 5)' "$head" 2> /dev/null ||
        fail "nothing answers at FVLM_HEAD=$head. Start the head first, or give its FVLM_HOST:FVLM_BASE_PORT (6379)."
fi
[[ -s $dir/token ]] || (umask 077 && python -c 'import secrets; print(secrets.token_hex(32))' > "$dir/token")
chmod 600 "$dir/token"
unset RAY_ADDRESS RAY_API_SERVER_ADDRESS RAY_AUTH_TOKEN
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$dir/token RAY_USAGE_STATS_ENABLED=0
if [[ $host == 127.* ]]; then export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0; fi # or Ray takes another address for it
export RAY_free_objects_batch_size=1 # or what training has dropped lies in the object store for another second
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0 # stop means now: checkpoints are on disk already
export RAY_JOB_STOP_WAIT_TIME_S=30 # of 3: `ray job stop` lets a job finish its step and save before it is killed

if [[ $head ]]; then
    role=(--address="$head")
else
    role=(--head --port="$base" --ray-client-server-port=$((base + 3)) --dashboard-host="$host" --dashboard-port="${url##*:}")
fi
# A session of its own: it outlives this terminal, and stop.sh can tell its processes from any other cluster's.
setsid ray start "${role[@]}" --block --temp-dir="$temp" --node-ip-address="$host" \
    --node-manager-port=$((base + 1)) --object-manager-port=$((base + 2)) \
    --dashboard-agent-grpc-port=$((base + 4)) --dashboard-agent-listen-port=$((base + 5)) \
    --runtime-env-agent-port=$((base + 6)) --min-worker-port=0 --max-worker-port=0 --metrics-export-port="$metrics" \
    ${FVLM_NUM_CPUS:+--num-cpus="$FVLM_NUM_CPUS"} \
    --object-store-memory=$((${FVLM_OBJECT_STORE_MB:-2048} * 1024 * 1024)) < /dev/null > "$log" 2>&1 &
echo $! > "$pid_file"

for ((i = 0; i < 240; i++)); do
    if ! kill -0 "$(< "$pid_file")" 2> /dev/null; then
        if grep -q AuthenticationError "$log"; then fail "the head at $head refuses the token in $dir/token. Copy the head's."; fi
        tail -n 20 "$log" >&2
        fail "the cluster did not start; see $log"
    fi
    if grep -q 'Ray runtime started' "$log"; then
        if [[ $head ]]; then echo "This machine has joined the cluster of $head."; exit 0; fi
        printf 'The cluster is up: %s. Tell this shell its token, and submit:\n\n' "$url"
        printf 'export RAY_AUTH_MODE=token\nexport RAY_AUTH_TOKEN_PATH=%q\n' "$dir/token"
        exit 0
    fi
    sleep 0.5
done
fail "the cluster is not up after two minutes; see $log, and end what is there with $(dirname "$0")/stop.sh"
