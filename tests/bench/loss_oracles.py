"""How far the losses of every stage after pretraining are from those of TRL, verl, torchtune and old TRL.

    python tests/bench/loss_oracles.py [--quick]

The golden fixtures of tests/fixtures/oracles hold inputs, losses, gradients and advantages that other people's code
has computed in fp32 (tools/make_oracle_fixtures.py makes them). Ours are computed on the same inputs in float64, one
sequence a row and, in full, all of them packed into one row. The error of a case is the largest of its tensors'
differences, over the tensor's largest number, and of a loss below 1 the difference itself. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))

import torch  # noqa: E402

from tests import oracles  # noqa: E402


def main() -> None:
    """Print the table of the stages, and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one sequence a row alone")
    quick: bool = parser.parse_args().quick
    torch.set_num_threads(1)
    layouts = [None] if quick else [None, oracles.in_one_row]
    errors: dict[str, list[float]] = defaultdict(list)
    for stage, name in oracles.cases():
        of_stage = layouts if stage in oracles.OURS else [None]
        errors[stage].append(max(oracles.answer(stage, name, layout).error for layout in of_stage))
    print(f"{'stage':<14}{'fixtures':>10}{'worst error':>14}  computed with")
    for stage, found in errors.items():
        print(f"{stage:<14}{len(found):>10}{max(found):>14.1e}  {computed_with(stage)}")
    worst = max(max(found) for found in errors.values())
    print(json.dumps({"worst_error": float(f"{worst:.3g}"), "fixtures": sum(map(len, errors.values()))}))


def computed_with(stage: str) -> str:
    """The oracles of a stage with their releases."""
    found = oracles.fixture(stage)
    versions = found["versions"]
    names = dict.fromkeys(case["oracle"] for case in found["cases"])
    older = stage in ("ppo", "advantages")
    return ", ".join(
        f"{name} {versions[name if name == 'trl' and not older else f'{name} (source)']}" for name in names
    )


if __name__ == "__main__":
    main()
