"""`python -m lm_trust` is `lm-trust`."""

import sys

from lm_trust.cli import main

if __name__ == "__main__":
    sys.exit(main())
