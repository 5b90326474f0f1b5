"""`sealpush` and `python -m sealpushd`: the command line."""

from __future__ import annotations

import sys
from typing import NoReturn

from sealpushd.cli.app import run


def main() -> NoReturn:
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
