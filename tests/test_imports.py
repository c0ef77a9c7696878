"""The package imports where only its core stands: the GPU target has none of these three."""

import subprocess
import sys

BARE = """
import sys
for name in ("deepspeed", "datasets", "pycocotools", "matplotlib", "lmms_eval"):
    sys.modules[name] = None  # as if not installed
import importlib, pkgutil, switchkd
for module in pkgutil.walk_packages(switchkd.__path__, "switchkd."):
    importlib.import_module(module.name)
print("imported")
"""


def test_every_module_imports_without_the_optional_packages():
    ran = subprocess.run([sys.executable, "-c", BARE], capture_output=True, text=True, check=False)
    assert ran.stdout.strip() == "imported", ran.stderr
