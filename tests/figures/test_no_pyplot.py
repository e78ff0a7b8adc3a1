"""Figures are drawn without pyplot, whose state and backend are those of whoever imports the package."""
import subprocess
import sys
from pathlib import Path

import nnunet_transplant

ALONE = """
import pkgutil
import sys
from importlib import import_module
import matplotlib
before = dict.__getitem__(matplotlib.rcParams, "backend")
import nnunet_transplant.figures
modules = [module.name for module in pkgutil.iter_modules(nnunet_transplant.figures.__path__)]
for name in modules:
    import_module(f"nnunet_transplant.figures.{name}")
assert "common" in modules
assert dict.__getitem__(matplotlib.rcParams, "backend") is before and "matplotlib.pyplot" not in sys.modules
"""


def test_drawing_needs_no_pyplot() -> None:
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_nothing_of_the_package_imports_it_or_switches_the_backend() -> None:
    package = Path(nnunet_transplant.__file__).parent
    switches = ("import matplotlib.pyplot", "from matplotlib import pyplot", "matplotlib.use(")
    assert not [path for path in package.rglob("*.py") if any(words in path.read_text("utf-8") for words in switches)]
