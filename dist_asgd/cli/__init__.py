"""What each command of ``dist-asgd`` does: ``run`` takes the parsed arguments and returns the exit status."""
