"""The version, in one place that everything may import."""

from importlib.metadata import PackageNotFoundError, version

__all__ = ["__version__"]

try:
    __version__ = version("tsynd")
except PackageNotFoundError:  # run from its sources, never installed
    __version__ = "0.0.0+unknown"
