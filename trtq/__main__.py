"""`python -m trtq`: the command line."""

import sys

from trtq.cli.main import main

sys.exit(main())
