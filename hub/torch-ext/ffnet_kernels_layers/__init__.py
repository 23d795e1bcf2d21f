"""Depthwise convolutions and FFNet's mixers of ffnet_kernels, as layers for ``kernels.kernelize``."""

import importlib.util
import sys
from pathlib import Path

# The package that is installed, if any: its operators can be registered once only in a process. Else the one that lies
# beside this file.
if importlib.util.find_spec("ffnet_kernels") is None:
    sys.path.append(str(Path(__file__).parent / "packages"))

from . import layers

__all__ = ["layers"]
