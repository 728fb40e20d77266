"""`python -m resnest_det` is the command `resnest-det`, also under torchrun: `torchrun -m resnest_det train-det`."""

import sys

from resnest_det.cli import main

if __name__ == "__main__":
    sys.exit(main())
