"""``python -m exeunt``."""

import sys

from exeunt.cli import main

if __name__ == "__main__":
    sys.exit(main())
