"""A text encoder's name to a running encoder."""

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from services.common.encoders import starting
from services.common.encoders.choice import REFERENCE, Candidate
from services.common.encoders.description import ModelDescription, variant_of
from services.common.encoders.golden import MIN_COSINE
from services.common.encoders.graph_encoder import GraphEncoder
from services.common.encoders.projection import Projection
from services.common.encoders.protocol import Encoder, EncoderOptions
from services.common.encoders.tokenizer import TextTokenizer
from services.common.encoders.trial import TextTrial, text_nearness

if TYPE_CHECKING:
    import torch

    from services.common.encoders.modules import TraceableEncoder


def open_encoder(name: str, options: EncoderOptions) -> Encoder:
    """
    Load the model *name*: a directory, a hub id or a packaged model. Takes seconds: call it in a thread.

    The first time on a machine its runtime and precision are chosen by measurement; the choice is kept, and held
    against fp32's vectors of a few texts at every later start.

    Raises:
        ModelNotFound: There is no such model.
        InvalidModel: A file of it is missing or damaged, or it cannot be computed as asked.
    """
    return starting.start(_TextOpening(name, options))


def measure(name: str, options: EncoderOptions) -> None:
    """Choose what computes *name* and keep the choice, whatever is kept already. Raises as open_encoder does."""
    starting.measure(_TextOpening(name, options)).close()


class _TextOpening(starting.Opening[ModelDescription, TextTokenizer, Encoder]):
    """See Opening."""

    task = "texts"

    def __init__(self, name: str, options: EncoderOptions) -> None:
        super().__init__(name, options)
        self._projection = Projection.load(options.projection) if options.projection else None
        self._modules: TraceableEncoder | None = None

    @cached_property
    def variant(self) -> str:
        """See Opening."""
        return variant_of(
            self.directory,
            pooling=self.options.pooling,
            projection=self._projection,
            trust_remote_code=self.options.trust_remote_code,
        )

    def describe(self) -> None:
        """See Opening."""
        from services.common.encoders.modules import describe

        self.description, self.tokenizer, self.tokenizer_json = describe(
            self.modules().model, self.name, self.directory, self.digest, self.options, self._projection
        )

    def read_description(self, text: str) -> ModelDescription:
        """See Opening."""
        return ModelDescription.from_json(text, name=self.name, directory=self.directory)

    def read_tokenizer(self, text: str, description: ModelDescription) -> TextTokenizer:
        """See Opening."""
        return TextTokenizer.from_json(text, max_tokens=description.max_tokens)

    def trial(self) -> TextTrial:
        """See Opening."""
        return TextTrial(self.make(REFERENCE))

    def nearness(self, model: Encoder, golden: NDArray[np.float32]) -> float:
        """See Opening."""
        return text_nearness(model, golden)

    def within_bounds(self, figures: Mapping[str, float]) -> bool:
        """See Opening."""
        return figures["min_cosine"] >= MIN_COSINE

    def through_openvino(self, graph: Any, precision: str) -> GraphEncoder:
        """See Opening."""
        assert self.description is not None
        assert self.tokenizer is not None
        threads = self.options.threads
        return GraphEncoder(graph, self.description, self.tokenizer, precision=precision, threads=threads)

    def through_torch(self, modules: "torch.nn.Module", candidate: Candidate) -> Encoder:
        """See Opening."""
        from services.common.encoders.torch_encoder import TorchEncoder

        assert self.description is not None
        assert self.tokenizer is not None
        return TorchEncoder(
            modules,
            self.description,
            self.tokenizer,
            device=self.device,
            precision=candidate.precision,
            autocast=candidate.autocast,
        )

    def modules(self) -> "TraceableEncoder":
        """See Opening."""
        if self._modules is None:
            from services.common.encoders.modules import TraceableEncoder, load_modules, without_normalize

            self.use_threads()
            model = without_normalize(load_modules(self.directory, self.options, device=self.device))
            self._modules = TraceableEncoder(model, self._projection).eval()
        return self._modules
