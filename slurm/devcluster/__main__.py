"""`python -m slurm.devcluster`."""

import sys

from slurm.devcluster.cluster import main

if __name__ == "__main__":
    sys.exit(main())
