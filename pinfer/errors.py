"""The exception that users see: what happened, and the command that fixes it."""

from __future__ import annotations

import errno

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""what the system says where a disk, a quota or the largest size of a file is used up"""


class PinferError(Exception):
    """What happened, in one line, and what to type next.

    The command line prints ``message`` and ``hint`` on one line to stderr and exits with code 1.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}; {self.hint}" if self.hint else self.message
