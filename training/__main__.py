"""`python -m training`: see training.command."""

import os
import sys

if __name__ == "__main__":
    # Read when torch is loaded. Threads that wait by spinning take the cores from each other as soon as another process
    # wants one too: a step would last many times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from training.command import main

    sys.exit(main())
