"""``python -m mendfast``."""

import sys

from .cli import main

sys.exit(main())
