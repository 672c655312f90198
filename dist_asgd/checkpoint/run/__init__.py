"""The files below the URL of a run: the directories of its checkpoints, and the history of its saves."""
