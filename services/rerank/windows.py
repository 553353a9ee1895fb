"""Which parts of a long document are scored. Pure."""


def windows(length: int, room: int, *, overlap: int, most: int) -> list[tuple[int, int]]:
    """
    Return the parts (start, end) that cover *length* tokens, in order, each of up to *room*; no tokens are one empty part.

    Neighbours share *overlap* tokens, half a part at most, so that what is asked for is not cut in two. There are at
    most *most* parts: what comes after those is not read.
    """
    if length <= room:
        return [(0, length)]
    step = room - min(overlap, room // 2)
    starts = range(0, length - room + step, step)
    return [(start, min(start + room, length)) for start in starts[:most]]
