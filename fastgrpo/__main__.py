"""`python -m fastgrpo` is `fastgrpo`."""

import sys

from fastgrpo.cli import main

if __name__ == "__main__":
    sys.exit(main())
