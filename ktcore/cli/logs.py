"""What --verbose shows: the log records of ktcore and its backends, as lines on stderr."""

from __future__ import annotations

import logging
import sys

FORMAT = "%(levelname)s %(name)s: %(message)s"


class Records(logging.Handler):
    """Writes records of packages whose names begin with ktcore to the stderr of now; others' are left alone."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter(FORMAT))

    def emit(self, record: logging.LogRecord) -> None:
        """One line."""
        if record.name.startswith("ktcore"):
            sys.stderr.write(self.format(record) + "\n")


def show_records(times: int) -> None:
    """Show records from INFO on, and of DEBUG too when --verbose was given more than once."""
    root = logging.getLogger()
    if not any(isinstance(handler, Records) for handler in root.handlers):
        root.addHandler(Records())
    root.setLevel(logging.DEBUG if times > 1 else logging.INFO)
