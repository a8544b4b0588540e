"""EleutherAI's lm-evaluation-harness on a run of ours: its own command line, with the model "mslm".

    python tools/lm_harness.py --model mslm --model_args run=runs/kjv --tasks arc_easy --limit 100

It needs the extra: ``pip install 'megatron-slm[lm-eval]'``. The model is loaded on one rank.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

from megatron_slm.errors import UserError


def main() -> int:
    """Run the harness with the arguments of this program."""
    from megatron_slm.evaluate.lm_eval import Opened, model_class
    from megatron_slm.run_eval import opened_alone

    with contextlib.ExitStack() as stack:

        def opened(run: str) -> Opened:
            return stack.enter_context(opened_alone(Path(run)))

        try:
            model_class(opened)
            from lm_eval.__main__ import cli_evaluate

            cli_evaluate()
        except UserError as error:
            print(f"lm_harness: {error}", file=sys.stderr)
            return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
