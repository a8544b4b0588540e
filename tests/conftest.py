"""What holds for every test: one compute thread, and a warm parent for the ranks of the tests in ``dist``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

# Before anything imports torch: a process whose thread pool has started is not safe to fork, and ranks share the cores.
os.environ["OMP_NUM_THREADS"] = "1"

# For `tests.ranks`. Last, so that the folders `kernels`, `launch`, `parallel` here hide no installed package.
ROOT = str(Path(__file__).resolve().parents[1])
if ROOT not in sys.path:
    sys.path.append(ROOT)


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--full``: see tests/breadth.py."""
    parser.addoption("--full", action="store_true", help="also the cases marked breadth (tests/breadth.py)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what only a full run makes; tests named on the command line are run."""
    if config.getoption("--full") or any("::" in argument for argument in config.args):
        return
    left_out = [item for item in items if item.get_closest_marker("breadth")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if not item.get_closest_marker("breadth")]


def pytest_collect_file(file_path: Path) -> None:
    """Begin to warm the ranks' parent while the test modules are still being imported."""
    if file_path.suffix == ".py" and file_path.parent.name == "dist":
        from tests import ranks

        ranks.warm_parent()
