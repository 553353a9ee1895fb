"""What every dialect asks of a request besides its shape, and how the settings fill in what it leaves out."""

from collections.abc import Sequence, Sized

from fastapi import Request

from services.common.errors import EmptyInput, TooLarge
from services.embedding.resources import embedding_of


def check_inputs(request: Request, inputs: Sequence[Sized], field: str, *, more: int = 0) -> None:
    """
    Raise if *inputs*, which the caller knows as *field*, cannot be worked on; *more* inputs come with them.

    Raises:
        EmptyInput: There is none, or one is the empty string or no token at all.
        TooLarge: There are more than the settings allow in one request.
    """
    if not inputs:
        raise EmptyInput(f"`{field}` cannot be empty", param=field)
    most, count = embedding_of(request).settings.max_client_batch, len(inputs) + more
    if count > most:
        raise TooLarge(f"batch size {count} > maximum allowed batch size {most}", param=field)
    for index, one in enumerate(inputs):
        if not one:
            raise EmptyInput(f"`{field}.{index}` cannot be empty", param=f"{field}.{index}")


def truncate_of(request: Request, asked: bool | None = None) -> bool:
    """Return whether inputs over the model's limit are cut: what the caller asked, else the setting."""
    return embedding_of(request).settings.auto_truncate if asked is None else asked
