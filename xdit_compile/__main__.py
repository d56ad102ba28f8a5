"""``python -m xdit_compile`` is the same command as ``xdit-compile``."""

from xdit_compile.cli.main import entry

if __name__ == "__main__":
    entry()
