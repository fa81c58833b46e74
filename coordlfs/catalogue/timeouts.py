"""How long the kernel may believe the names and attributes that it is shown: FUSE's entry_timeout and attr_timeout.

Both loops answer with these. It knows the attributes of one name, and nothing else.
"""

from __future__ import annotations

import os
import stat

NAME_TIMEOUT = 86400  # seconds that the kernel may believe names and attributes
EMPTY_TIMEOUT = 1  # of attributes of an empty file: nobody reads it, so that nothing else would show that it has grown


def attr_timeout(st: os.stat_result) -> int:
    """Seconds that the kernel may believe these attributes."""
    return NAME_TIMEOUT if st.st_size or not stat.S_ISREG(st.st_mode) else EMPTY_TIMEOUT
