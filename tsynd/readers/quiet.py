"""Other packages' remarks on a file's header, which may quote it: neither shown nor logged."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["quietly"]


@contextmanager
def quietly(logger_name: str) -> Iterator[None]:
    """Without warnings, and without what this logger says."""
    logger = logging.getLogger(logger_name)
    before = logger.disabled
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger.disabled = True
        try:
            yield
        finally:
            logger.disabled = before
