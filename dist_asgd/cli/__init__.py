"""The ``dist-asgd`` command: ``cli/main.py`` parses arguments and maps errors to exit statuses, one module a command.

The module of a command has ``HELP`` (one line of text), ``add_arguments(parser)`` and ``run(arguments)``, which takes
the parsed ``argparse.Namespace`` and returns the exit status.
"""
