"""Errors that a user sees as one line, and the exit status each ends the program with."""


class FlmError(Exception):
    """Something failed that the message explains in one line; the program ends with `status`."""

    status = 1


class RequestError(FlmError, ValueError):
    """What was asked for cannot be done as asked: the message gives the values and how to mend them."""

    status = 2


class DamagedError(FlmError):
    """Stored data is damaged: the message names the file or tensor."""
