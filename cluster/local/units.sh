# What install.sh and uninstall.sh have to agree on; they source this file.
# shellcheck shell=bash disable=SC2034

header="# Written by fvlm's cluster/local/install.sh. uninstall.sh removes it; a change is lost when install.sh runs again."
config=${XDG_CONFIG_HOME:-$HOME/.config}
cluster_unit=$config/systemd/user/fvlm-cluster.service resume_unit=$config/systemd/user/fvlm-resume.service
environment=$config/fvlm/environment
environment_template="# NAME=value, a line each: the environment of everything that the fvlm cluster runs. Read when the cluster starts.
#WANDB_API_KEY=
#HF_HOME=
#AWS_ACCESS_KEY_ID=
#AWS_SECRET_ACCESS_KEY="
dry_run=

fail() { echo "error: $*" >&2; exit 2; }

run() { # the command, or what it would be
    if [[ $dry_run ]]; then echo "would run: $*"; else "$@"; fi
}

refuse_foreign() { # a unit of this name that somebody else wrote
    [[ ! -e $1 && ! -L $1 ]] || [[ -f $1 && $(head -n 1 "$1") == "$header" ]] ||
        fail "$1 was not written by install.sh, and stays as it is. Move it away first, if you do not need it."
}
