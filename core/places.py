"""Where in somebody else's folder an exception came from."""

from __future__ import annotations

import traceback
from pathlib import Path


def place_in(folder: Path, error: BaseException) -> str:
    """``file:line`` of the innermost frame inside ``folder``; empty where there is none.

    Args:
        folder: absolute.
        error: as it was caught; of a SyntaxError, the line that it is about.
    """
    places = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, SyntaxError) and error.filename:
        places.append((error.filename, error.lineno))
    inside = [(Path(file), line) for file, line in places if Path(file).is_relative_to(folder)]
    return f"{inside[-1][0].relative_to(folder)}:{inside[-1][1]}" if inside else ""
