"""A model started as it was chosen at an earlier start; or chosen now, by measurement, and kept for later ones."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import numpy as np
import structlog
from numpy.typing import NDArray

from services.common.encoders.apart import Task, measured_apart
from services.common.encoders.choice import Candidate, Unusable, candidates, choose
from services.common.encoders.graphs import (
    TEXT_INPUTS,
    GraphError,
    drop_graph,
    graph_directory,
    keep_graph,
    make_graph,
    read_graph,
)
from services.common.encoders.hardware import processor, resolve_device, usable_cores
from services.common.encoders.protocol import EncoderOptions
from services.common.encoders.store import DescriptionT, EncoderStore, TokenizerT, choice_key
from services.common.encoders.trial import Computes, Trial
from services.common.model_errors import ModelNotFound
from services.common.model_files import check_model_files, default_cache_dir, files_digest, resolve_model

if TYPE_CHECKING:
    import torch

log = structlog.get_logger(__name__)


class Started(Computes, Protocol):
    """A model that says why it is computed as it is: see Encoder for the attributes."""

    runtime: str
    precision: str
    reason: str
    measured: Mapping[str, Mapping[str, float]]


StartedT = TypeVar("StartedT", bound=Started)


class Opening(ABC, Generic[DescriptionT, TokenizerT, StartedT]):
    """One model being opened: what its candidates have in common is made once, when it is first needed."""

    task: Task

    def __init__(self, name: str, options: EncoderOptions) -> None:
        """Raises ModelNotFound where there is no such model, InvalidModel where a file of it is missing."""
        self.name = name
        self.options = options
        self.directory = resolve_model(name, revision=options.revision)
        check_model_files(self.directory)
        asked = options.device if options.runtime != "openvino" or options.device != "auto" else "cpu"
        self.device = resolve_device(asked)
        self.tried = candidates(options, self.device, processor())
        self.digest = files_digest(self.directory)
        self.store = EncoderStore(options.cache_dir or default_cache_dir())
        self.description: DescriptionT | None = None
        self.tokenizer: TokenizerT | None = None
        self.tokenizer_json: str | None = None
        self._graph: Any = None

    @property
    @abstractmethod
    def variant(self) -> str:
        """What was asked for that changes the model's outputs, beside its files."""

    @property
    def graph_inputs(self) -> Sequence[str]:
        """The names of what the modules take; after `describe`."""
        return TEXT_INPUTS

    @abstractmethod
    def describe(self) -> None:
        """Fill in the description and the tokenizer from the model's modules."""

    @abstractmethod
    def read_description(self, text: str) -> DescriptionT:
        """Return what the description's `to_json` wrote; raises ValueError."""

    @abstractmethod
    def read_tokenizer(self, text: str, description: DescriptionT) -> TokenizerT:
        """Return the tokenizer of a kept `tokenizer.json`; raises ValueError."""

    @abstractmethod
    def modules(self) -> "torch.nn.Module":
        """Return the model's modules at fp32, on the device."""

    @abstractmethod
    def through_openvino(self, graph: Any, precision: str) -> StartedT:
        """Return the model computed by *graph*; raises GraphError where it does not run here."""

    @abstractmethod
    def through_torch(self, modules: "torch.nn.Module", candidate: Candidate) -> StartedT:
        """Return the model computed by *modules*, whose weights are at *candidate*'s precision, or at fp32 if it autocasts."""

    @abstractmethod
    def trial(self) -> Trial[StartedT]:
        """Return what candidates are held to; the reference is torch at fp32."""

    @abstractmethod
    def nearness(self, model: StartedT, golden: NDArray[np.float32]) -> float:
        """See Trial."""

    @abstractmethod
    def within_bounds(self, figures: Mapping[str, float]) -> bool:
        """Whether a candidate with these figures is as near to fp32 as `auto` asks."""

    def make(self, candidate: Candidate) -> StartedT:
        """
        Return *candidate*'s model.

        Raises:
            Unusable: OpenVINO cannot convert or run it.
        """
        if candidate.runtime == "openvino":
            try:
                return self.through_openvino(self.traced(), candidate.precision)
            except GraphError as error:
                raise Unusable(str(error)) from error
        from services.common.encoders.torch_encoder import reduced

        whole = candidate.precision == "fp32" or candidate.autocast
        modules = self.modules() if whole else reduced(self.modules(), candidate.precision)
        return self.through_torch(modules, candidate)

    @property
    def key(self) -> str:
        """The name of the choice."""
        return choice_key(self.digest, self.variant, self.options, self.device)

    def traced(self) -> Any:
        """
        Return the model's graph: the kept one, or one made now and kept.

        Raises:
            GraphError: OpenVINO cannot convert it.
        """
        if self._graph is None:
            assert self.description is not None
            place = graph_directory(self.store.cache_dir, self.description.digest)
            try:
                self._graph = read_graph(place)
            except GraphError:
                drop_graph(place)
                made = make_graph(self.modules(), self.graph_inputs)
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
                drop_graph(graph_directory(self.store.cache_dir, self.description.digest))

    def use_threads(self) -> None:
        """Have torch compute with as many threads as the options say."""
        import torch

        threads = self.options.threads or min(usable_cores(), torch.get_num_threads())
        if threads != torch.get_num_threads():
            torch.set_num_threads(threads)


def start(opening: Opening[DescriptionT, TokenizerT, StartedT]) -> StartedT:
    """
    Return the model as it was chosen before, held against fp32's kept outputs; else choose, and keep the choice.

    Raises:
        InvalidModel: It cannot be computed as asked.
    """
    model = _as_kept(opening)
    if model is not None:
        return model
    # One process at a time: measuring side by side measures the other process, and makes everything twice.
    with opening.store.measuring(opening.key):
        model = _as_kept(opening)
        if model is None and opening.options.measure_apart and opening.device == "cpu":
            if measured_apart(opening.task, opening.name, opening.options):
                model = _as_kept(opening)
            if model is not None:
                _tell(opening, model)
        return model or measure(opening)


def measure(opening: Opening[DescriptionT, TokenizerT, StartedT]) -> StartedT:
    """Return the best of the candidates, and keep the choice, whatever is kept already. Raises as `start` does."""
    opening.describe()
    assert opening.description is not None
    honour = opening.options.precision != "auto"
    model, choice = choose(opening.tried, opening.make, opening.trial(), honour=honour)
    model.reason, model.measured = choice.reason, choice.measured
    opening.store.save(opening.key, opening.description, opening.tokenizer_json, choice)
    _tell(opening, model)
    return model


def _as_kept(opening: Opening[DescriptionT, TokenizerT, StartedT]) -> StartedT | None:
    """Return the model as it was chosen before; None where none was, or it does not do any more what it did."""
    kept = opening.store.load(opening.key, opening.read_description, opening.read_tokenizer)
    if kept is None:
        return None
    choice = kept.choice
    opening.description, opening.tokenizer = kept.description, kept.tokenizer
    try:
        if kept.tokenizer is None:
            opening.describe()
        model = opening.make(Candidate(choice.runtime, choice.precision, choice.autocast))
        nearness = opening.nearness(model, choice.golden)
    except ModelNotFound:
        raise
    except Exception as error:  # Whatever the runtime trips over: what is kept may be damaged in ways unforeseen.
        log.warning("kept_choice_fails", model=opening.name, error=f"{type(error).__name__}: {error}")
        opening.drop_graph()
        return None
    if nearness < choice.floor:
        model.close()
        log.warning("kept_choice_differs_from_fp32", model=opening.name, nearness=nearness, floor=choice.floor)
        opening.drop_graph()
        return None
    model.reason, model.measured = choice.reason, choice.measured
    return model


def _tell(opening: Opening[DescriptionT, TokenizerT, StartedT], model: StartedT) -> None:
    """Log what was chosen, as a warning where it loses more than `auto` would take."""
    start = f"{model.runtime} {model.precision}"
    chosen = [figures for candidate, figures in model.measured.items() if candidate.startswith(start)]
    say = log.info if all(opening.within_bounds(figures) for figures in chosen) else log.warning
    say("encoder_chosen", model=opening.name, reason=model.reason, measured=model.measured)
