"""Every error that `mlo` raises on purpose.

A message says where, what was expected, what was found and how to mend it. `MloError` is the base, so that a caller can
catch all of them; it is a `ValueError` because each of them is about something that the user passed in.
"""

from __future__ import annotations


class MloError(ValueError):
    """Base of all errors raised by `mlo`."""


class GraphError(MloError):
    """The levels or edges of a graph are declared wrongly, or a loss does not read what was declared."""


class RecipeError(MloError):
    """A recipe, or a value given on the command line, is not valid."""


class DivergenceError(MloError):
    """A loss, a gradient or an estimator's linear system became infinite or not a number."""


class CheckpointError(MloError):
    """A checkpoint cannot be written, read, or does not belong to this graph."""


class ProcessLostError(MloError):
    """Another process of a job that runs in several has ended, or no longer answers."""


class InteropError(MloError):
    """Another framework is missing, or cannot express what a graph asks of it; everything that it cannot is named."""
