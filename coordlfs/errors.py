"""What goes wrong in a way that a user can mend.

Whoever finds it writes the text; what becomes of it is decided in `coordlfs.commands`.
"""

from __future__ import annotations

from collections.abc import Sequence


class UserError(Exception):
    """One line that says what, why and what to do. `status` is the exit status: 2 for usage, else 1.

    `output` are lines that a user's own command printed last, to be shown beneath.
    """

    def __init__(self, message: str, status: int = 1, output: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.status = status
        self.output = output
