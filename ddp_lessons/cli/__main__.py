"""`python -m ddp_lessons.cli`."""

import sys

from ddp_lessons.cli import main

sys.exit(main())
