"""The one error type that users meet.

Policy: a mistake that the user can mend raises `UserError` with one line that names the value and the remedy;
the command line prints that line and exits with status 2. A failure of one completion or one verdict is data, not
an error: it is recorded as `unscored` or `failed` with its reason, and counted apart. Anything else is a bug.
"""

from __future__ import annotations


class UserError(ValueError):
    """A mistake that the user can mend; the message is one line naming the value and the remedy."""
