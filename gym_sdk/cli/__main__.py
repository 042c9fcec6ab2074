"""`python -m gym_sdk.cli`."""

import sys

from gym_sdk.cli import main

if __name__ == "__main__":
    sys.exit(main())
