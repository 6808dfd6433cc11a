"""Towers and heads; with dataloading/reports.py the only code that imports transformers."""

import sys

from mlip.config import ConfigError

if sys.flags.optimize > 1:  # its own error names a class of transformers and no way out
    raise ConfigError(
        "expected a Python that keeps docstrings, which transformers reads as it is imported; got "
        "-OO or PYTHONOPTIMIZE=2: unset it, or set 1"
    )
