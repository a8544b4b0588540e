"""Writes docs/config.md, the list of every configuration key, from the dataclasses themselves.

Run it after changing a section: ``python tools/config_reference.py``. ``--check`` writes nothing and ends with exit
code 1 if the committed page is out of date.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_slm.config.keys import Key, all_keys, sections
from megatron_slm.config.presets import PRESETS
from megatron_slm.config.values import show

PAGE = Path(__file__).resolve().parents[1] / "docs" / "config.md"

INTRODUCTION = """\
# Configuration

*Written by `tools/config_reference.py` from the code; change the dataclasses, not this page.*

A configuration is a YAML file of the sections below. Every value can also be given on the command line, as
`section.key=value` or as Megatron's flag, in any order; abbreviations are not accepted. Precedence: defaults < preset <
file < command line. `runs/NAME/provenance.json` keeps the source of every value of a run. A boolean flag takes no value
(`--bf16`, `--no-bf16`); a list is written `[a, b]` in a file and `a,b` on the command line; `null` unsets an optional
key. `mslm check CONFIG` lists every rule that a configuration violates.
"""


def reference() -> str:
    """The whole page."""
    parts = [INTRODUCTION, _table("Top level", [key for key in all_keys().values() if "." not in key.name])]
    for section in sections():
        keys = [key for key in all_keys().values() if key.name.startswith(f"{section}.")]
        parts.append(_table(f"`{section}`", keys))
    parts.append(_presets())
    return "\n".join(parts)


def _table(title: str, keys: list[Key]) -> str:
    rows = [f"## {title}\n", "| key | default | meaning | values | flag |", "|---|---|---|---|---|"]
    for key in keys:
        cells = [f"`{key.field}`", f"`{show(key.default)}`", key.help, key.expects, _flags(key)]
        rows.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(rows) + "\n"


def _flags(key: Key) -> str:
    """Megatron's spelling first, then our own; the negation of a boolean goes without saying."""
    spelled = [flag for flag in key.flags if not flag.startswith("--no-")]
    return ", ".join(f"`{flag}`" for flag in sorted(spelled, key=lambda flag: flag == key.own_flag))


def _presets() -> str:
    rows = ["## Presets\n", "| `preset` | published as | parameters |", "|---|---|---|"]
    for name, preset in PRESETS.items():
        count = f"{preset.parameters:,}" if preset.parameters is not None else "4.0 M with a vocabulary of 4,096"
        rows.append(f"| `{name}` | {preset.origin} | {count} |")
    return "\n".join(rows) + "\n"


def main() -> int:
    """Write or check the page; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if the page is out of date")
    if parser.parse_args().check:
        current = PAGE.is_file() and PAGE.read_text(encoding="utf-8") == reference()
        print(f"{PAGE.name} is {'current' if current else 'out of date: run python tools/config_reference.py'}")
        return 0 if current else 1
    PAGE.write_text(reference(), encoding="utf-8")
    print(f"wrote {PAGE.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
