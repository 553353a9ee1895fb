"""
A cross-encoder's own torch modules: loaded, and wrapped so that they trace.

Importing this takes seconds, for it imports torch and sentence-transformers; only a start without a cached choice and
the torch runtime need it.
"""

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import CrossEncoder
from sentence_transformers.cross_encoder.modules import LogitScore, Transformer

from services.common.encoders.golden import GOLDEN_TEXTS
from services.common.encoders.modules import max_tokens_of, not_loaded
from services.common.encoders.pairs.form import PairTokenizer
from services.common.encoders.pairs.model import PairDescription
from services.common.encoders.pairs.probing import SAMPLES, find_form
from services.common.encoders.pairs.torch_pairs import TorchPairs
from services.common.encoders.protocol import EncoderOptions
from services.common.encoders.tokenizer import make_tokenizer
from services.common.model_errors import InvalidModel

_TOLERANCE = 1e-3


def load_cross_encoder(directory: Path, options: EncoderOptions, *, device: str) -> CrossEncoder:
    """
    Load the model in *directory* at fp32 onto *device*, in evaluation mode.

    Raises:
        InvalidModel: Its files are damaged, it reads no text, or it needs `trust_remote_code`.
    """
    try:
        model = CrossEncoder(
            str(directory),
            device=device,
            local_files_only=True,
            trust_remote_code=options.trust_remote_code,
            model_kwargs={"dtype": torch.float32},
        ).eval()
    except Exception as error:  # Damaged weights, unknown architectures and foreign code each raise something else.
        raise not_loaded(directory, error) from error
    modules = list(model.children())
    if not modules or not isinstance(modules[0], Transformer) or modules[0].tokenizer is None:
        kind = type(modules[0]).__name__ if modules else "nothing"
        raise InvalidModel(f"{directory} is no cross-encoder that can be used: its first module is {kind}")
    return model


class TraceablePairs(torch.nn.Module):  # type: ignore[misc]
    """
    The modules as one function of two or three tensors, for running and tracing.

    `forward(input_ids, attention_mask[, token_type_ids])`, all int64 of shape [batch, tokens], mask 1 for tokens and 0
    for the padding on their right, returns the scores before any activation, shape [batch, outputs]. Both axes are
    dynamic.
    """

    def __init__(self, model: CrossEncoder) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See the class."""
        features = {"input_ids": input_ids, "attention_mask": attention_mask}
        if token_type_ids is not None:
            features["token_type_ids"] = token_type_ids
        return self.model(features)["scores"]


class _Last:
    """Where each text's last token is: a plain object, which tracing leaves alone, and each copy of a model has its own."""

    def __init__(self) -> None:
        self.positions: torch.Tensor | None = None


class _WordsAfterLast(torch.nn.Module):  # type: ignore[misc]
    """Takes the place of a causal model's head: the logits of a few words only, and after each text's last token only."""

    def __init__(self, head: Any, words: list[int], last: _Last) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(head.weight.detach()[words].clone(), requires_grad=False)
        bias = getattr(head, "bias", None)
        self.bias = None if bias is None else torch.nn.Parameter(bias.detach()[words].clone(), requires_grad=False)
        self._last = last

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return logits of shape [batch, 1, words] for hidden states of shape [batch, tokens, width]."""
        assert self._last.positions is not None
        at = self._last.positions[:, None, None].expand(-1, 1, hidden.shape[-1])
        return torch.nn.functional.linear(torch.gather(hidden, 1, at), self.weight, self.bias)


class TraceableWords(torch.nn.Module):  # type: ignore[misc]
    """
    A causal model whose score is the logit of one word after the pair, less that of another; see TraceablePairs.

    Padding stands on the right, where no token sees it. *model* is changed: its head is replaced.
    """

    def __init__(self, model: CrossEncoder) -> None:
        super().__init__()
        words = [model[-1].true_token_id, model[-1].false_token_id]
        self.causal = model[0].model
        self._last = _Last()
        head = self.causal.get_output_embeddings()
        self.causal.set_output_embeddings(
            _WordsAfterLast(head, [word for word in words if word is not None], self._last)
        )

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """See TraceablePairs; shape [batch, 1]."""
        self._last.positions = attention_mask.sum(dim=1) - 1
        logits = self.causal(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits[:, 0]
        return logits[:, :1] - logits[:, 1:] if logits.shape[1] > 1 else logits


def traceable(model: CrossEncoder) -> torch.nn.Module:
    """Return *model*'s modules as one function; a causal model is changed and can do nothing else afterwards."""
    made = TraceableWords(model) if isinstance(model[-1], LogitScore) else TraceablePairs(model)
    return made.eval()


class Described(NamedTuple):
    """A cross-encoder as `describe_pairs` found it; *tokenizer_json* where the `tokenizers` library suffices."""

    description: PairDescription
    tokenizer: PairTokenizer
    tokenizer_json: str | None
    modules: torch.nn.Module


def describe_pairs(
    model: CrossEncoder, name: str, directory: Path, digest: str, variant: str, options: EncoderOptions
) -> Described:
    """
    Return what *model* is, and its modules; they are held against the library's own predictions of a few pairs.

    Raises:
        InvalidModel: It has no head that scores pairs, or cannot be given them as tokens.
    """
    limit = max_tokens_of(model, None)
    max_tokens = min(limit, options.max_tokens or limit)
    text_tokenizer, tokenizer_json = make_tokenizer(model.tokenizer, max_tokens=max_tokens, samples=GOLDEN_TEXTS)
    form = find_form(model, text_tokenizer, directory)
    tokenizer = PairTokenizer(text_tokenizer, form, max_tokens=max_tokens)
    pad_id = int(model.tokenizer.pad_token_id or 0)
    activation, config = type(model.activation_fn).__name__, model[0].model.config
    expected = _predictions(model, directory)
    device = str(model.device)
    try:
        modules = traceable(model)
    except AttributeError as error:
        raise InvalidModel(f"{directory} has a head that cannot be used: {error}") from error
    description = PairDescription(
        name=name,
        directory=directory,
        files_digest=digest,
        variant=variant,
        digest=hashlib.sha256(f"pairs {digest}{variant}".encode()).hexdigest(),
        outputs=expected.shape[1],
        labels=_labels(config, expected.shape[1]),
        activation=activation,
        max_tokens=max_tokens,
        form=form,
        pad_id=pad_id,
        weights_bytes=4 * sum(parameter.numel() for parameter in modules.parameters()),
    )
    whole = PairTokenizer(text_tokenizer, form, max_tokens=limit)
    _check(TorchPairs(modules, description, whole, device=device, precision="fp32"), expected)
    return Described(description, tokenizer, tokenizer_json, modules)


def _predictions(model: CrossEncoder, directory: Path) -> NDArray[np.float32]:
    """Return the library's scores of SAMPLES before any activation, shape [pairs, outputs]."""
    try:
        made = model.predict(
            [list(pair) for pair in SAMPLES], batch_size=1, activation_fn=torch.nn.Identity(), show_progress_bar=False
        )
    except Exception as error:  # Modules that do not fit together raise anything.
        raise InvalidModel(f"{directory} has no head that scores pairs: {type(error).__name__}: {error}") from error
    if made.ndim not in (1, 2) or len(made) != len(SAMPLES):
        raise InvalidModel(f"{directory} has no head that scores pairs: it gives arrays of shape {made.shape}")
    return np.asarray(made, dtype=np.float32).reshape(len(SAMPLES), -1)


def _labels(config: Any, outputs: int) -> tuple[str, ...]:
    """Return the configuration's labels if they are as many as there are outputs, else numbered ones."""
    named = getattr(config, "id2label", None) or {}
    labels = [str(named[key]) for key in sorted(named, key=int)]
    return tuple(labels) if len(labels) == outputs else tuple(f"LABEL_{number}" for number in range(outputs))


def _check(made: TorchPairs, expected: NDArray[np.float32]) -> None:
    """See that the modules as they are run, padding and all, give the library's own predictions where it cuts no pair."""
    pairs, theirs = [], []
    for (query, document), outputs in zip(SAMPLES, expected, strict=True):
        ids, _ = made.tokenizer.query(query)
        content, _ = made.tokenizer.documents([document])[0]
        if made.tokenizer.size(len(ids), len(content)) <= made.tokenizer.max_tokens:
            pairs.append(made.tokenizer.join(ids, content))
            theirs.append(outputs)
    if not pairs:
        return
    error = np.abs(made.outputs(pairs) - np.stack(theirs)).max()
    if not error <= _TOLERANCE * max(0.1, float(np.abs(expected).max())):
        raise InvalidModel(
            f"{made.description.directory} cannot be used: put together here, and padded on the right, pairs get scores "
            f"that differ from sentence-transformers' by {error:.4g}"
        )
