"""`python -m training.own …`: what `tercet train-reranker` runs; see training.own.command."""

import os
import sys

if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # See training.__main__.
    from training.own.command import main

    sys.exit(main())
