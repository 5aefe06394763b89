"""`python -m loraplex`: the command line, as accelerate and torchrun start it."""

import sys

from loraplex.commands.cli import main

if __name__ == "__main__":
    sys.exit(main())
