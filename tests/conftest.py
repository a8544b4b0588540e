"""What holds for every test: one compute thread, and a warm parent for the ranks of the tests in ``dist``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Before anything imports torch: a process whose thread pool has started is not safe to fork, and ranks share the cores.
os.environ["OMP_NUM_THREADS"] = "1"

# For `tests.ranks`. Last, so that the folders `kernels`, `launch`, `parallel` here hide no installed package.
ROOT = str(Path(__file__).resolve().parents[1])
if ROOT not in sys.path:
    sys.path.append(ROOT)


def pytest_collect_file(file_path: Path) -> None:
    """Begin to warm the ranks' parent while the test modules are still being imported."""
    if file_path.suffix == ".py" and file_path.parent.name == "dist":
        from tests import ranks

        ranks.warm_parent()
