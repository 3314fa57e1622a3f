"""`python -m ray_jobs.doctor [PRESET] [--key value ...]`: look, before a start, at all that a run will need.

Light to import: where Ray or torch cannot be imported, this says so, and does not end in a traceback of theirs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable

from fvlm import presets
from fvlm.checks.finding import Finding
from fvlm.checks.software import INSTALL, look_at_software

HELP = f"""
PRESET with the options of ray_jobs.train looks at exactly that run; without PRESET only at the machine.
Presets: {", ".join(presets.PRESETS)}. `PRESET --help` lists the keys.

  ok    as it should be                     note  worth knowing
  warn  slower or less safe than need be    FAIL  a run would not begin, or would end

Disks are read and written for a few seconds, at most 256 MB each; nothing stays. No secret is printed.

exit code: 0; 1 when a run would fail; 2 when the options are at fault.
"""


def main() -> None:
    """The command. Ends the process."""
    own, training = arguments(sys.argv[1:])
    try:
        from ray_jobs.checkup import checkup
        from ray_jobs.cli import run_command
    except ImportError as error:
        show([*look_at_software(), Finding("FAIL", "imports", str(error), INSTALL)], own.json)
        sys.exit(1)

    def command() -> None:
        sys.exit(1 if show(checkup(training), own.json) else 0)

    run_command(command)


def arguments(args: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our own options, and the rest, which is ray_jobs.train's."""
    parser = argparse.ArgumentParser(
        prog="python -m ray_jobs.doctor",
        usage="%(prog)s [PRESET [--key value ...]] [--json]",
        description="Look, before a start, at all that a run will need: a line for each thing, and its cure.",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="an object a line")
    own, training = parser.parse_known_args(args)
    if training and training[0] in ("-h", "--help"):
        parser.print_help()
        sys.exit(0)
    return own, training


def show(findings: Iterable[Finding], as_json: bool) -> list[Finding]:
    """Print each as soon as it is made. -> those that fail."""
    failed = []
    for finding in findings:
        print(finding.to_json() if as_json else finding, flush=True)
        failed += [finding] if finding.level == "FAIL" else []
    return failed


if __name__ == "__main__":
    main()
