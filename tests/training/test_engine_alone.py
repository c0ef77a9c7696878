"""The engine knows no model and no data: it can be imported without either."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import switchkd.training

FOLDER = Path(switchkd.training.__file__).parent
MODULES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__")


def test_training_imports_neither_models_nor_data():
    """Of transformers' LLaVA the model: 5.17 has names of its image processors without anything being asked for."""
    assert {"trainer", "checkpoints", "evaluation"} <= set(MODULES)
    script = f"""
import importlib, sys
for name in {MODULES}:
    importlib.import_module(f"switchkd.training.{{name}}")
ours = [name for name in sys.modules if name.startswith(("switchkd.models", "switchkd.data", "switchkd.tasks"))]
theirs = [name for name in sys.modules if name.startswith("transformers.models.llava") and ".modeling" in name]
assert not ours + theirs, ours + theirs
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
