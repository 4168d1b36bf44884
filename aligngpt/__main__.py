"""`python -m aligngpt` is the command `aligngpt`."""

import sys

from .cli import main

sys.exit(main())
