"""A cross-encoder's name to a running scorer of pairs."""

import hashlib
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from services.common.encoders import starting
from services.common.encoders.choice import REFERENCE, Candidate
from services.common.encoders.description import variant_of
from services.common.encoders.pairs.form import PairTokenizer
from services.common.encoders.pairs.golden import MAX_PROBABILITY_ERROR, MIN_CORRELATION
from services.common.encoders.pairs.graph import GraphPairs, inputs_of
from services.common.encoders.pairs.model import PairDescription, PairModel
from services.common.encoders.pairs.trial import PairTrial, pair_nearness
from services.common.encoders.protocol import EncoderOptions
from services.common.encoders.tokenizer import TextTokenizer

if TYPE_CHECKING:
    import torch


def open_pair_model(name: str, options: EncoderOptions) -> PairModel:
    """
    Load the cross-encoder *name*, any that sentence-transformers loads and whose modules end in scores of text pairs.

    Of *options*, pooling and projection are not read, and max_tokens is cut to what the model reads. Takes seconds:
    call it in a thread. How it is computed is chosen as open_encoder chooses, held against fp32's scores of pairs.

    Raises:
        ModelNotFound: There is no such model.
        InvalidModel: A file of it is missing or damaged, or it cannot be computed as asked.
    """
    return starting.start(_PairOpening(name, options))


def measure_pairs(name: str, options: EncoderOptions) -> None:
    """Choose what computes *name* and keep the choice, whatever is kept already. Raises as open_pair_model does."""
    starting.measure(_PairOpening(name, options)).close()


class _PairOpening(starting.Opening[PairDescription, PairTokenizer, PairModel]):
    """See Opening."""

    task = "pairs"

    def __init__(self, name: str, options: EncoderOptions) -> None:
        super().__init__(name, options)
        self._modules: torch.nn.Module | None = None

    @cached_property
    def variant(self) -> str:
        """See Opening."""
        return "+pairs" + self._own_variant

    @cached_property
    def _own_variant(self) -> str:
        """What changes the model's scores beside the files of `files_digest`: its own code, and its chat template."""
        code = variant_of(
            self.directory, pooling=None, projection=None, trust_remote_code=self.options.trust_remote_code
        )
        templates = sorted(self.directory.rglob("*.jinja"))
        digest = hashlib.sha256(b"\0".join(file.read_bytes() for file in templates)).hexdigest()
        return f"{code}+chat-{digest[:8]}" if templates else code

    @property
    def graph_inputs(self) -> tuple[str, ...]:
        """See Opening."""
        assert self.description is not None
        return inputs_of(self.description.form)

    def describe(self) -> None:
        """See Opening."""
        from services.common.encoders.pairs.modules import describe_pairs

        described = describe_pairs(
            self._load(), self.name, self.directory, self.digest, self._own_variant, self.options
        )
        self.description, self.tokenizer = described.description, described.tokenizer
        self.tokenizer_json, self._modules = described.tokenizer_json, described.modules

    def read_description(self, text: str) -> PairDescription:
        """See Opening."""
        return PairDescription.from_json(text, name=self.name, directory=self.directory)

    def read_tokenizer(self, text: str, description: PairDescription) -> PairTokenizer:
        """See Opening."""
        whole = TextTokenizer.from_json(text, max_tokens=description.max_tokens)
        return PairTokenizer(whole, description.form, max_tokens=description.max_tokens)

    def trial(self) -> PairTrial:
        """See Opening."""
        return PairTrial(self.make(REFERENCE))

    def nearness(self, model: PairModel, golden: NDArray[np.float32]) -> float:
        """See Opening."""
        return pair_nearness(model, golden)

    def within_bounds(self, figures: Mapping[str, float]) -> bool:
        """See Opening."""
        error = figures["max_probability_error"]
        return figures["correlation"] >= MIN_CORRELATION and error <= MAX_PROBABILITY_ERROR

    def through_openvino(self, graph: Any, precision: str) -> GraphPairs:
        """See Opening."""
        assert self.description is not None
        assert self.tokenizer is not None
        threads = self.options.threads
        return GraphPairs(graph, self.description, self.tokenizer, precision=precision, threads=threads)

    def through_torch(self, modules: "torch.nn.Module", candidate: Candidate) -> PairModel:
        """See Opening."""
        from services.common.encoders.pairs.torch_pairs import TorchPairs

        assert self.description is not None
        assert self.tokenizer is not None
        return TorchPairs(
            modules,
            self.description,
            self.tokenizer,
            device=self.device,
            precision=candidate.precision,
            autocast=candidate.autocast,
        )

    def modules(self) -> "torch.nn.Module":
        """See Opening."""
        if self._modules is None:
            from services.common.encoders.pairs.modules import traceable

            self._modules = traceable(self._load())
        return self._modules

    def _load(self) -> Any:
        from services.common.encoders.pairs.modules import load_cross_encoder

        self.use_threads()
        return load_cross_encoder(self.directory, self.options, device=self.device)
