"""``mslm plan``, run by path: ``python tools/plan.py --model llama3-405b --cluster h100 --gpus 16384``."""

from __future__ import annotations

import sys

from megatron_slm.commands.plan import plan
from megatron_slm.errors import UserError


def main() -> int:
    """Search, and return the exit code of ``mslm plan``."""
    try:
        return plan("plan", sys.argv[1:])
    except UserError as error:
        print(f"plan: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
