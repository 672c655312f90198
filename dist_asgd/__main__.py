"""Runs the ``dist-asgd`` command for ``python -m dist_asgd``."""

import sys

from dist_asgd.cli.main import main

sys.exit(main())
