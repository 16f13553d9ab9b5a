"""Names in a study file, and what was probably meant by one that is not known."""

import difflib
from collections.abc import Collection

BUNDLED = "bundled:"  # before the name of a file of the package's demo


def nearest(name: str, valid: Collection[str]) -> str:
    """Return the name that was probably meant, as the end of a message."""
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.0)
    return (
        f"did you mean {close[0]}? valid here: {', '.join(dict.fromkeys(valid))}"
        if close
        else "there is none"
    )
