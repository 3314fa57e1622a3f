#!/usr/bin/env bash
# Takes back what install.sh wrote: stops and disables the units (a run that trains loses the steps since its last
# checkpoint), and removes them. A file of another hand is refused; an environment file that you filled in is kept.
#
#   uninstall.sh [--dry-run]
set -euo pipefail

# shellcheck source=cluster/local/units.sh
source "$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/units.sh"
case ${1:-} in
    '') ;;
    --dry-run) dry_run=yes ;;
    -h | --help) sed -n '2,/^set /{/^#/s/^# \?//p}' "$0"; exit 0 ;;
    *) fail "unknown option $1. Usage: uninstall.sh [--dry-run]" ;;
esac

refuse_foreign "$cluster_unit"
refuse_foreign "$resume_unit"
if [[ -e $cluster_unit || -e $resume_unit ]]; then
    run systemctl --user disable --now fvlm-resume.service fvlm-cluster.service ||
        echo "systemd could not stop or disable them; the files are removed all the same" >&2
    run rm -f "$cluster_unit" "$resume_unit"
    run systemctl --user daemon-reload || true
else
    echo "no units are installed in ${cluster_unit%/*}"
fi
if [[ -f $environment ]]; then
    if [[ $(< "$environment") == "$environment_template" ]]; then
        run rm "$environment"
        [[ $dry_run ]] || rmdir --ignore-fail-on-non-empty "${environment%/*}"
    else
        echo "kept: $environment, which you changed"
    fi
fi
echo "Lingering stays as it is, since other services may need it; loginctl disable-linger $(id -un) ends it."
