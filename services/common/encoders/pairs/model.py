"""What a scorer of pairs is, whatever computes it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from services.common.encoders.pairs.form import PairForm, PairTokenizer, PairTokens


@dataclass(frozen=True, slots=True)
class PairDescription:
    """
    A model that scores pairs of texts.

    *files_digest*, *variant* and *digest* are as in ModelDescription, but *digest* is never that of the same files as
    an encoder. *outputs* is how many numbers a pair gets, *labels* their names, in order. *activation* is the name of
    the function of torch.nn that the model's configuration has for them (`Sigmoid`, `Identity`). *form* is how a pair
    is put together. *weights_bytes* counts 4 bytes a parameter.
    """

    name: str
    directory: Path
    files_digest: str
    variant: str
    digest: str
    outputs: int
    labels: tuple[str, ...]
    activation: str
    max_tokens: int
    form: PairForm
    pad_id: int
    weights_bytes: int

    @property
    def dim(self) -> int:
        """The width of what the model gives for a pair."""
        return self.outputs

    def to_json(self) -> str:
        """Return all but the name and the directory, which are the caller's."""
        values = asdict(self)
        del values["name"], values["directory"]
        return json.dumps(values | {"form": self.form.to_values()}, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str, *, name: str, directory: Path) -> "PairDescription":
        """
        Return what `to_json` wrote.

        Raises:
            ValueError: It was not written by this version's `to_json`, or is damaged.
        """
        values = json.loads(text)
        expected = {field.name for field in fields(cls)} - {"name", "directory"}
        if not isinstance(values, dict) or set(values) != expected:
            raise ValueError("no description of a scorer of pairs")
        numbers = ("outputs", "max_tokens", "pad_id", "weights_bytes")
        if not all(type(values[key]) is int for key in numbers) or not isinstance(values["labels"], list):
            raise ValueError("no description of a scorer of pairs")
        try:
            values["form"] = PairForm.from_values(values["form"])
        except (TypeError, KeyError, IndexError) as error:
            raise ValueError(f"no form of pairs: {error}") from error
        values["labels"] = tuple(str(label) for label in values["labels"])
        return cls(name=name, directory=directory, **values)


class PairModel(Protocol):
    """
    A loaded scorer of pairs. *tokenizer* may be used by any thread; `outputs` and `close` by one at a time.

    For the other attributes see Encoder; *measured* has `correlation` and `max_probability_error` to fp32,
    `batch_pairs_per_s` and `short_pair_ms`.
    """

    description: PairDescription
    tokenizer: PairTokenizer
    runtime: str
    device: str
    precision: str
    reason: str
    measured: Mapping[str, Mapping[str, float]]
    weights_bytes: int

    def outputs(self, batch: Sequence[PairTokens]) -> NDArray[np.float32]:
        """
        Return the model's outputs, before any activation: float32, shape [len(batch), outputs], in order.

        Raises:
            OutOfMemory: The device's memory does not hold even one of the pairs.
        """
        ...

    def close(self) -> None:
        """Give the memory back; nothing is called afterwards."""
        ...
