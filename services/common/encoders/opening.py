"""A model's name to a running encoder."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import structlog

from services.common.encoders.apart import measured_apart
from services.common.encoders.choice import REFERENCE, Candidate, Unusable, candidates, choose
from services.common.encoders.description import ModelDescription, variant_of
from services.common.encoders.golden import MIN_COSINE, SHORT_GOLDEN_TEXTS, agreement
from services.common.encoders.graph_encoder import (
    GraphEncoder,
    GraphError,
    drop_graph,
    graph_directory,
    keep_graph,
    make_graph,
    read_graph,
)
from services.common.encoders.hardware import processor, resolve_device, usable_cores
from services.common.encoders.projection import Projection
from services.common.encoders.protocol import Encoder, EncoderOptions
from services.common.encoders.store import EncoderStore, choice_key, default_cache_dir
from services.common.encoders.tokenizer import TextTokenizer
from services.common.model_files import ModelNotFound, check_model_files, files_digest, resolve_model

if TYPE_CHECKING:
    from services.common.encoders.modules import TraceableEncoder

log = structlog.get_logger(__name__)


def open_encoder(name: str, options: EncoderOptions) -> Encoder:
    """
    Load the model *name*: a directory, a hub id or a packaged model. Takes seconds: call it in a thread.

    The first time on a machine its runtime and precision are chosen by measurement; the choice is kept, and held
    against fp32's vectors of a few texts at every later start.

    Raises:
        ModelNotFound: There is no such model.
        InvalidModel: A file of it is missing or damaged, or it cannot be computed as asked.
    """
    asked = _Asked.of(name, options)
    encoder = _as_kept(asked)
    if encoder is not None:
        return encoder
    # One process at a time: measuring side by side measures the other process, and makes everything twice.
    with asked.store.measuring(asked.key):
        encoder = _as_kept(asked)
        if encoder is None and options.measure_apart and asked.device == "cpu" and measured_apart(name, options):
            encoder = _as_kept(asked)
            if encoder is not None:
                _tell(asked, encoder)
        return encoder or _measured(asked)


def _tell(asked: "_Asked", encoder: Encoder) -> None:
    """Log what was chosen, as a warning where it loses more than `auto` would take."""
    least = min((figures["min_cosine"] for figures in _chosen(encoder)), default=1.0)
    say = log.warning if least < MIN_COSINE else log.info
    say("encoder_chosen", model=asked.opening.name, reason=encoder.reason, measured=encoder.measured)


def _chosen(encoder: Encoder) -> list[Mapping[str, float]]:
    start = f"{encoder.runtime} {encoder.precision}"
    return [figures for candidate, figures in encoder.measured.items() if candidate.startswith(start)]


def measure(name: str, options: EncoderOptions) -> None:
    """Choose what computes *name* and keep the choice, whatever is kept already. Raises as open_encoder does."""
    _measured(_Asked.of(name, options)).close()


class _Asked(NamedTuple):
    """What was asked for, where the answer is kept, and what may be the answer."""

    opening: "_Opening"
    store: EncoderStore
    key: str
    device: str
    tried: Sequence[Candidate]

    @classmethod
    def of(cls, name: str, options: EncoderOptions) -> "_Asked":
        directory = resolve_model(name, revision=options.revision)
        check_model_files(directory)
        device = resolve_device(options.device if options.runtime != "openvino" or options.device != "auto" else "cpu")
        tried = candidates(options, device, processor())
        projection = Projection.load(options.projection) if options.projection else None
        digest = files_digest(directory)
        variant = variant_of(
            directory, pooling=options.pooling, projection=projection, trust_remote_code=options.trust_remote_code
        )
        store = EncoderStore(options.cache_dir or default_cache_dir())
        key = choice_key(digest, variant, options, device)
        opening = _Opening(name, directory, digest, options, device, projection, store.cache_dir)
        return cls(opening, store, key, device, tried)


def _measured(asked: _Asked) -> Encoder:
    """Return the best of the candidates, and keep the choice."""
    opening = asked.opening
    opening.describe()
    honour = opening.options.precision != "auto"
    encoder, choice = choose(asked.tried, opening.make, opening.reference(), honour=honour)
    encoder.reason, encoder.measured = choice.reason, choice.measured
    asked.store.save(asked.key, encoder.description, opening.tokenizer_json, choice)
    _tell(asked, encoder)
    return encoder


def _as_kept(asked: _Asked) -> Encoder | None:
    """Return the encoder that was chosen before; None where none was, or it does not do any more what it did."""
    opening = asked.opening
    kept = asked.store.load(asked.key, name=opening.name, directory=opening.directory)
    if kept is None:
        return None
    choice = kept.choice
    opening.description, opening.tokenizer = kept.description, kept.tokenizer
    try:
        if kept.tokenizer is None:
            opening.describe()
        encoder = opening.make(Candidate(choice.runtime, choice.precision, choice.autocast))
        least = agreement(encoder.pooled(encoder.tokenize(SHORT_GOLDEN_TEXTS)), choice.golden).least
    except ModelNotFound:
        raise
    except Exception as error:  # Whatever the runtime trips over: what is kept may be damaged in ways unforeseen.
        log.warning("kept_choice_fails", model=opening.name, error=f"{type(error).__name__}: {error}")
        opening.drop_graph()
        return None
    if least < choice.floor:
        encoder.close()
        log.warning("kept_choice_differs_from_fp32", model=opening.name, min_cosine=least, floor=choice.floor)
        opening.drop_graph()
        return None
    encoder.reason, encoder.measured = choice.reason, choice.measured
    return encoder


class _Opening:
    """One model being opened: what its candidates have in common is made once, when it is first needed."""

    def __init__(
        self,
        name: str,
        directory: Path,
        digest: str,
        options: EncoderOptions,
        device: str,
        projection: Projection | None,
        cache_dir: Path,
    ) -> None:
        self.name = name
        self.directory = directory
        self.description: ModelDescription | None = None
        self.tokenizer: TextTokenizer | None = None
        self.tokenizer_json: str | None = None
        self._digest = digest
        self.options = options
        self._device = device
        self._projection = projection
        self._cache_dir = cache_dir
        self._modules: TraceableEncoder | None = None
        self._graph: Any = None

    def describe(self) -> None:
        """Fill in the description and the tokenizer from the model's modules."""
        from services.common.encoders.modules import describe

        self.description, self.tokenizer, self.tokenizer_json = describe(
            self.modules().model, self.name, self.directory, self._digest, self.options, self._projection
        )

    def reference(self) -> Encoder:
        """Return the encoder that others are held against: torch at fp32."""
        return self.make(REFERENCE)

    def make(self, candidate: Candidate) -> Encoder:
        """
        Return *candidate*'s encoder.

        Raises:
            Unusable: OpenVINO cannot convert or run the model.
        """
        assert self.description is not None
        assert self.tokenizer is not None
        if candidate.runtime == "openvino":
            try:
                return GraphEncoder(
                    self._traced(),
                    self.description,
                    self.tokenizer,
                    precision=candidate.precision,
                    threads=self.options.threads,
                )
            except GraphError as error:
                raise Unusable(str(error)) from error
        from services.common.encoders.torch_encoder import TorchEncoder, reduced

        whole = candidate.precision == "fp32" or candidate.autocast
        return TorchEncoder(
            self.modules() if whole else reduced(self.modules(), candidate.precision),
            self.description,
            self.tokenizer,
            device=self._device,
            precision=candidate.precision,
            autocast=candidate.autocast,
        )

    def modules(self) -> "TraceableEncoder":
        """Return the model's modules at fp32."""
        if self._modules is None:
            import torch

            from services.common.encoders.modules import TraceableEncoder, load_modules, without_normalize

            threads = self.options.threads or min(usable_cores(), torch.get_num_threads())
            if threads != torch.get_num_threads():
                torch.set_num_threads(threads)
            model = without_normalize(load_modules(self.directory, self.options, device=self._device))
            self._modules = TraceableEncoder(model, self._projection).eval()
        return self._modules

    def _traced(self) -> Any:
        if self._graph is None:
            assert self.description is not None
            place = graph_directory(self._cache_dir, self.description)
            try:
                self._graph = read_graph(place)
            except GraphError:
                drop_graph(place)
                made = make_graph(self.modules())
                try:
                    keep_graph(place, made)
                    self._graph = read_graph(place)
                except OSError as error:
                    log.warning("graph_not_kept", directory=str(place), error=str(error))
                    self._graph = made
        return self._graph

    def drop_graph(self) -> None:
        """Forget the kept graph: what it computes is wrong."""
        self._graph = None
        if self.description is not None:
            with suppress(GraphError):
                drop_graph(graph_directory(self._cache_dir, self.description))
