"""Shapes of `POST /msearch`: a search a line in, and what it came to a line out."""

from services.common.wire.search import BatchAnswer


class SearchLine(BatchAnswer):
    """What one line came to: its *index*, counted from 0 without blank lines, and an *answer* or an *error*."""

    index: int
