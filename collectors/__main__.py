"""`python -m collectors` in a checkout, `python -m perfmodel.collectors` where the package is installed."""

import sys

from .cli import main

sys.exit(main())
