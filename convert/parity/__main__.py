"""`python -m mediatok.convert.parity CASE_DIR [...]`: exit 0 all equal, 1 a difference, 2 a folder that is no case."""

from __future__ import annotations

import argparse
import sys

from ...core.errors import MediatokError
from . import run


def main() -> int:
    """Replay the cases named on the command line."""
    parser = argparse.ArgumentParser(prog="python -m mediatok.convert.parity", description=run.__doc__.split("\n")[0])
    parser.add_argument("case_dirs", nargs="+", metavar="CASE_DIR")
    try:
        return 0 if run(parser.parse_args().case_dirs) else 1
    except MediatokError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
