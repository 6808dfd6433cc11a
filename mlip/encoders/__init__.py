"""Towers and heads; the walls of tests/test_architecture.py name who else imports transformers."""

import sys

from mlip.settings.config import ConfigError

if sys.flags.optimize > 1:  # its own error names a class of transformers and no way out
    raise ConfigError(
        "expected a Python that keeps docstrings, which transformers reads as it is imported; got "
        "-OO or PYTHONOPTIMIZE=2: unset it, or set 1"
    )
