#!/usr/bin/env bash
# This workstation trains on by itself after a reboot: two systemd user units. uninstall.sh removes them.
#
#   install.sh --runs RUNS_DIR [--dry-run]      RUNS_DIR: the folder of runs, as in --runs-dir
#
#   fvlm-cluster.service  start.sh, and again when the cluster dies
#   fvlm-resume.service   python -m ray_jobs.resume RUNS_DIR, after every start of the cluster
#
# PATH and the variables of start.sh (FVLM_CLUSTER_DIR, ports, ...) are written down as they are in this shell; to change
# them, run it again. Secrets such as WANDB_API_KEY belong into ~/.config/fvlm/environment, which is made with mode 600.
set -euo pipefail

local=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=cluster/local/units.sh
source "$local/units.sh"
runs=
while (($#)); do
    case $1 in
        --runs) runs=${2:-}; shift $(($# > 1 ? 2 : 1)) ;;
        --dry-run) dry_run=yes; shift ;;
        -h | --help) sed -n '2,/^set /{/^#/s/^# \?//p}' "$0"; exit 0 ;;
        *) fail "unknown option $1. Usage: install.sh --runs RUNS_DIR [--dry-run]" ;;
    esac
done
[[ $runs ]] || fail "--runs is missing: the folder in which runs lie, as in --runs-dir."
[[ ! ${FVLM_HEAD:-} ]] || fail "FVLM_HEAD is set: these units are the head's. Run start.sh here after a reboot."
[[ -d $runs ]] || fail "--runs $runs: no such folder. Give the one in which runs lie, or make it first."

project=$(cd "$local/../.." && pwd) runs=$(cd "$runs" && pwd)
dir=$(realpath -ms "${FVLM_CLUSTER_DIR:-$HOME/.fvlm-cluster}")
if [[ -x $project/.venv/bin/ray ]]; then PATH=$project/.venv/bin:$PATH; fi # as start.sh does
command -v ray > /dev/null || fail "there is no \`ray\` on the PATH. Activate the environment that the project is installed in."
((${#dir} <= 38)) || fail "$dir is too long for Ray's sockets. Set FVLM_CLUSTER_DIR to a path of at most 38 characters."
for path in "$project" "$runs" "$dir" "$config" "$PATH"; do
    if [[ $path == *[[:cntrl:]]* || $path == *[\\[:space:]] ]]; then
        fail "a unit cannot hold the path '$path': it has control characters, or ends in a space or backslash. Rename it."
    fi
done

[[ $config != *[]*?[\\]* ]] || fail "a unit cannot name $environment: its folder has one of the characters * ? [ ] \\ in it."

value() { printf '%s' "${1//'%'/%%}"; } # % begins a specifier of systemd
quoted() { local text=${1//\\/\\\\}; value "\"${text//\"/\\\"}\""; }
argument() { quoted "${1//'$'/\$\$}"; } # of a command line, in which $ begins a variable

settings() { # start.sh's, as far as this shell sets them
    local name
    printf 'Environment=%s\n' "$(quoted "FVLM_CLUSTER_DIR=$dir")"
    for name in FVLM_HOST FVLM_DASHBOARD_PORT FVLM_METRICS_PORT FVLM_BASE_PORT FVLM_NUM_CPUS FVLM_OBJECT_STORE_MB; do
        [[ ! ${!name:-} ]] || printf 'Environment=%s\n' "$(quoted "$name=${!name}")"
    done
}

cluster=$(cat << END
$header
[Unit]
Description=fvlm: this machine as a Ray cluster
RequiresMountsFor=$(quoted "$project") $(quoted "$dir") $(quoted "$runs")
StartLimitIntervalSec=3600
StartLimitBurst=20

[Service]
Type=forking
PIDFile=$(value "$dir")/pid
WorkingDirectory=$(value "$project")
Environment=$(quoted "PATH=$PATH")
$(settings)
EnvironmentFile=-$(value "$environment")
ExecStart=/usr/bin/env bash $(argument "$local/start.sh")
ExecStop=/usr/bin/env bash $(argument "$local/stop.sh")
TimeoutStartSec=180
TimeoutStopSec=40
# What stop.sh, or a head that died, leaves behind has nothing to save: checkpoints are on disk already.
KillSignal=SIGKILL
Restart=on-failure
RestartSec=5
# Ray replaces a worker that the kernel killed for lack of memory; systemd would end the whole cluster for it.
OOMPolicy=continue

[Install]
WantedBy=default.target
END
)
resume=$(cat << END
$header
[Unit]
Description=fvlm: unfinished runs, submitted again after every start of the cluster
# It ends with the cluster, however that ends, so that the cluster's next start starts it anew.
BindsTo=fvlm-cluster.service
After=fvlm-cluster.service
StartLimitIntervalSec=3600
StartLimitBurst=40

[Service]
Type=oneshot
RemainAfterExit=yes
WorkingDirectory=$(value "$project")
Environment=$(quoted "PATH=$PATH")
Environment=RAY_AUTH_MODE=token $(quoted "RAY_AUTH_TOKEN_PATH=$dir/token")
ExecStart=/usr/bin/env python -m ray_jobs.resume $(argument "$runs") --address http://${FVLM_HOST:-127.0.0.1}:${FVLM_DASHBOARD_PORT:-8265} --wait 600
Restart=on-failure
RestartSec=30
# 2: the input was at fault, which trying again does not mend
RestartPreventExitStatus=2

[Install]
WantedBy=fvlm-cluster.service
END
)

write() { # file, mode, content
    if [[ $dry_run ]]; then
        printf 'would write %s (mode %s):\n\n%s\n\n' "$1" "$2" "$3"
    else
        mkdir -p "$(dirname "$1")"
        (umask 077 && printf '%s\n' "$3" > "$1.new")
        chmod "$2" "$1.new"
        mv "$1.new" "$1"
        echo "wrote $1"
    fi
}

refuse_foreign "$cluster_unit"
refuse_foreign "$resume_unit"
if ! systemctl --user show-environment > /dev/null 2>&1; then
    no_systemd="systemd does not run here. On WSL2: write 'systemd=true' under [boot] in /etc/wsl.conf, then run \`wsl --shutdown\` in Windows; $local/../README.md says what else to do there, or without systemd."
    [[ ! -d /run/systemd/system ]] || no_systemd="systemd answers no session of $(id -un) here; su and sudo open none. Log in as $(id -un) itself, or run: sudo loginctl enable-linger $(id -un); export XDG_RUNTIME_DIR=/run/user/$(id -u)"
    [[ $dry_run ]] || fail "$no_systemd"
    echo "note: install.sh would end here: $no_systemd" >&2
fi

write "$cluster_unit" 644 "$cluster"
write "$resume_unit" 644 "$resume"
if [[ -e $environment ]]; then
    run chmod 600 "$environment"
else
    write "$environment" 600 "$environment_template"
fi
run systemctl --user daemon-reload
run systemctl --user enable fvlm-cluster.service fvlm-resume.service
run loginctl enable-linger "$(id -un)" || cat >&2 << END
Not permitted: without it the units start at your next login only. Let an administrator run this once:
  sudo loginctl enable-linger $(id -un)
END
[[ $dry_run ]] || cat << END
From the next boot on this machine trains by itself. To begin now (first end a cluster that start.sh started by hand):
  systemctl --user start fvlm-cluster.service
  systemctl --user status 'fvlm-*'
END
