"""
A model's own torch modules: loaded, told how to pool, and wrapped so that they trace and export.

Importing this takes seconds, for it imports torch and sentence-transformers; only a start without a cached choice,
the torch runtime and the exporters need it.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

from services.common.encoders.description import ModelDescription, variant_of
from services.common.encoders.golden import GOLDEN_TEXTS
from services.common.encoders.projection import Projection
from services.common.encoders.protocol import EncoderOptions
from services.common.encoders.tokenizer import TextTokenizer, make_tokenizer
from services.common.model_errors import InvalidModel

# What models without a limit of their own read: a longer text would take them minutes.
_DEFAULT_MAX_TOKENS = 512
_NO_LIMIT = 1 << 20
# Their first position is the one after the padding id.
_OFFSET_POSITIONS = frozenset(
    {"roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet", "longformer", "data2vec-text"}
)


def load_modules(directory: Path, options: EncoderOptions, *, device: str) -> SentenceTransformer:
    """
    Load the model in *directory* at fp32 onto *device*, in evaluation mode, with *options*' pooling in its modules.

    A directory with plain transformers weights gets mean pooling, as sentence-transformers has it.

    Raises:
        InvalidModel: Its files are damaged, it is no text encoder, or it needs `trust_remote_code`.
    """
    try:
        model = SentenceTransformer(
            str(directory),
            device=device,
            local_files_only=True,
            trust_remote_code=options.trust_remote_code,
            model_kwargs={"dtype": torch.float32},
        ).eval()
    except Exception as error:  # Damaged weights, unknown architectures and foreign code each raise something else.
        raise not_loaded(directory, error) from error
    modules = list(model.children())
    if not modules or not isinstance(modules[0], Transformer) or model.tokenizer is None:
        kind = type(modules[0]).__name__ if modules else "nothing"
        raise InvalidModel(f"{directory} is no text encoder that can be used: its first module is {kind}")
    config = modules[0].auto_model.config
    if getattr(config, "use_cache", False):
        config.use_cache = False  # Keys and values for generating text, which nobody reads.
    return _with_pooling(model, options.pooling) if options.pooling else model


def not_loaded(directory: Path, error: Exception) -> InvalidModel:
    """Return what to raise where a library could not load the model in *directory*."""
    hint = "; its code runs only with trust_remote_code" if "trust_remote_code" in str(error) else ""
    return InvalidModel(f"{directory} could not be loaded{hint}: {error}")


def without_normalize(model: SentenceTransformer) -> SentenceTransformer:
    """Take a last module that brings vectors to unit length off *model*: callers say whether they want that."""
    while len(model) > 1 and isinstance(model[-1], Normalize):
        del model[-1]
    return model


def _with_pooling(model: SentenceTransformer, mode: str) -> SentenceTransformer:
    """Replace the pooling module of *model*, or put one behind its transformer."""
    for name, module in model.named_children():
        if isinstance(module, Pooling):
            setattr(model, name, Pooling(module.embedding_dimension, mode, include_prompt=module.include_prompt))
            return model
    first, *rest = model.children()
    pooled = SentenceTransformer(
        modules=[first, Pooling(first.get_embedding_dimension(), mode), *rest],
        device=str(model.device),
        prompts=model.prompts,
        default_prompt_name=model.default_prompt_name,
        similarity_fn_name=model.similarity_fn_name,
        truncate_dim=model.truncate_dim,
    )
    return pooled.eval()


class TraceableEncoder(torch.nn.Module):  # type: ignore[misc]
    """
    The modules as one function of two tensors, for running, tracing and exporting.

    `forward(input_ids, attention_mask)`, both int64 of shape [batch, tokens], mask 1 for tokens and 0 for the padding
    on their right, returns `(sentence_embedding, token_embeddings)` of shapes [batch, dim] and
    [batch, tokens, token_dim]; the first with the model's own truncation and with *projection* applied. Neither is
    normalised beyond what the model's modules do. Both axes are dynamic; there is no state.
    """

    def __init__(self, model: SentenceTransformer, projection: Projection | None = None) -> None:
        super().__init__()
        self.model = model
        self.kept = model.truncate_dim
        self.mean: torch.Tensor | None
        self.components: torch.Tensor | None
        self.register_buffer("mean", None if projection is None else torch.from_numpy(projection.mean))
        self.register_buffer("components", None if projection is None else torch.from_numpy(projection.components))
        self.to(model.device)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See the class."""
        output = self.model({"input_ids": input_ids, "attention_mask": attention_mask})
        sentence, tokens = output["sentence_embedding"], output["token_embeddings"]
        if self.kept is not None:
            sentence = sentence[:, : self.kept]
        if self.mean is not None and self.components is not None:
            # At unit length, as the vectors were that it was fitted on.
            sentence = torch.nn.functional.normalize(sentence.float(), dim=-1)
            sentence = (sentence - self.mean) @ self.components.T
        return sentence, tokens


def describe(
    model: SentenceTransformer,
    name: str,
    directory: Path,
    digest: str,
    options: EncoderOptions,
    projection: Projection | None,
) -> tuple[ModelDescription, TextTokenizer, str | None]:
    """
    Return what *model* is, its tokenizer, and the tokenizer's JSON where the `tokenizers` library suffices.

    Raises:
        InvalidModel: The options ask for more than the model has, or its modules do not fit together.
    """
    transformer: Any = model[0]
    config = transformer.auto_model.config
    max_tokens = max_tokens_of(model, options.max_tokens)
    tokenizer, tokenizer_json = make_tokenizer(model.tokenizer, max_tokens=max_tokens, samples=GOLDEN_TEXTS)
    pad_id = int(model.tokenizer.pad_token_id or 0)
    with _told_as_invalid(directory), torch.inference_mode():
        ids = torch.tensor([tokenizer.tokenize(["a"])[0].ids], device=model.device)
        sentence, tokens = TraceableEncoder(model, projection)(ids, torch.ones_like(ids))
    if sentence.ndim != 2 or tokens.ndim != 3:
        raise InvalidModel(
            f"{directory} is no text encoder that can be used: it gives vectors of shape {sentence.shape}"
        )
    pooling = [module for module in model.children() if isinstance(module, Pooling)]
    modes = [mode for module in pooling for mode in _modes(module)]
    variant = variant_of(
        directory, pooling=options.pooling, projection=projection, trust_remote_code=options.trust_remote_code
    )
    description = ModelDescription(
        name=name,
        directory=directory,
        files_digest=digest,
        variant=variant,
        digest=hashlib.sha256(f"{digest}{variant}".encode()).hexdigest() if variant else digest,
        dim=int(sentence.shape[1]),
        token_dim=int(tokens.shape[2]),
        max_tokens=max_tokens,
        prompts={key: value for key, value in model.prompts.items() if value},
        default_prompt=model.default_prompt_name,
        pools_prompt=all(module.include_prompt for module in pooling),
        pooling="+".join(modes) or "none",
        dimensions=() if projection else _matryoshka(directory, config, int(sentence.shape[1])),
        vocabulary_size=int(transformer.auto_model.get_input_embeddings().weight.shape[0]),
        pad_id=pad_id,
        weights_bytes=4 * sum(parameter.numel() for parameter in model.parameters()),
        model_type=str(getattr(config, "model_type", "")),
        similarity=str(model.similarity_fn_name or "cosine"),
    )
    return description, tokenizer, tokenizer_json


def _modes(pooling: Pooling) -> tuple[str, ...]:
    return (pooling.pooling_mode,) if isinstance(pooling.pooling_mode, str) else tuple(pooling.pooling_mode)


def max_tokens_of(model: Any, asked: int | None) -> int:
    """
    Return how many tokens a sentence-transformers *model* reads: as many as are *asked*, or its own limit.

    Raises:
        InvalidModel: It has fewer positions than are asked.
    """
    transformer: Any = model[0]
    config = transformer.auto_model.config
    positions = int(getattr(config.get_text_config(), "max_position_embeddings", None) or _NO_LIMIT)
    if positions < 0:
        positions = _NO_LIMIT  # XLNet's way to say so.
    if config.model_type in _OFFSET_POSITIONS:
        positions -= int(config.pad_token_id or 0) + 1
    if asked is not None:
        if asked > positions:
            raise InvalidModel(f"max_tokens {asked} is more than the {positions} positions that the model has")
        return asked
    own = min(int(model.max_seq_length or _DEFAULT_MAX_TOKENS), positions)
    return own if own < _NO_LIMIT else _DEFAULT_MAX_TOKENS


def _matryoshka(directory: Path, config: Any, dim: int) -> tuple[int, ...]:
    """Return the sizes that the model's configuration declares as `matryoshka_dimensions` (Jina, Snowflake, Nomic)."""
    declared = getattr(config, "matryoshka_dimensions", None)
    own = directory / "config_sentence_transformers.json"
    if declared is None and own.is_file():
        declared = json.loads(own.read_bytes()).get("matryoshka_dimensions")
    if not isinstance(declared, list):
        return ()
    return tuple(sorted({size for size in declared if isinstance(size, int) and 0 < size <= dim}))


@contextmanager
def _told_as_invalid(directory: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise InvalidModel(f"{directory} has modules that do not work together as asked: {error}") from error
