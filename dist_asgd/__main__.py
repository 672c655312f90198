"""``python -m dist_asgd`` is the ``dist-asgd`` command."""

import sys

from dist_asgd.cli.main import main

sys.exit(main())
