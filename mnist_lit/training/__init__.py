"""What a run has: callbacks, checkpoints, its directory, metrics, plots, loggers."""
