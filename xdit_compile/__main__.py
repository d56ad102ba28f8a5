"""``python -m xdit_compile`` is the same command as ``xdit-compile``."""

import sys

from xdit_compile.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
