"""``mslm profile report``, run by path: ``python tools/nsight_report.py rank-0.sqlite rank-1.sqlite``."""

from __future__ import annotations

import sys

from megatron_slm.commands.profile import report
from megatron_slm.errors import UserError


def main() -> int:
    """Print the report, and return the exit code of ``mslm profile report``."""
    try:
        return report("profile report", sys.argv[1:])
    except UserError as error:
        print(f"nsight_report: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
