"""The version of the package, also of a clone that is not installed."""

__version__ = "0.1.0"
