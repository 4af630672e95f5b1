"""``python -m mlxsae.cli``: the command line where the ``mlxsae`` script is not on the path."""

from __future__ import annotations

import sys

from mlxsae.cli import main

if __name__ == "__main__":
    sys.exit(main())
