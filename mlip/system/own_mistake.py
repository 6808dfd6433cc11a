"""Whether an error that is caught as a fault of a file is a mistake of this program."""

from __future__ import annotations

import functools
import logging

logger = logging.getLogger(__name__)

# what no content raises where it is checked; ValueError, OSError and struct.error are of content
_KINDS = (AssertionError, AttributeError, IndexError, KeyError, NameError, TypeError)


def own_mistake(error: BaseException) -> str | None:
    """Kind and place of an error that arose in a line of this package; None for any other.

    Logged once a place, so that it can be reported. Neither holds the error's text, which may be of
    a patient.
    """
    trace = error.__traceback__
    if trace is None or not isinstance(error, _KINDS):
        return None
    while trace.tb_next is not None:
        trace = trace.tb_next
    module = str(trace.tb_frame.f_globals.get("__name__"))
    if not module.startswith("mlip."):
        return None
    place = f"{type(error).__name__} in {module}, line {trace.tb_lineno}"
    _log_once(place)
    return place


@functools.cache
def _log_once(place: str) -> None:
    logger.error("%s: an error of this program, not of a file: please report it", place)
