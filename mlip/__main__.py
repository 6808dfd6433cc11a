"""`python -m mlip` is the `mlip` command."""

import sys

from mlip.cli import main

sys.exit(main())
