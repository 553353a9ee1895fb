"""`python -m services.embedding.offline export|fit-pca …`: what `tercet export` and `tercet fit-pca` run."""

import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from services.common.model_errors import ModelNotFound
from services.common.model_files import DEFAULT_MODEL
from services.embedding.offline.console import OfflineError, fail, say, say_facts, silence_libraries
from services.embedding.specs import POOLINGS

if TYPE_CHECKING:
    from services.embedding.offline.fitting import Fitted
    from services.embedding.offline.onnx_export import Exported, Source

_EXPORT_NEEDS = ("onnx", "onnxscript", "onnxruntime", "google.protobuf")
_INTERRUPTED = 130

Model = Annotated[str, typer.Option(help="A packaged model, a directory or a hub id.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")]
Pooling = Annotated[
    str | None, typer.Option(help=f"Instead of the model's own: {', '.join(POOLINGS)}.", show_default=False)
]
MaxTokens = Annotated[int | None, typer.Option(help="Instead of the model's own limit.", min=1, show_default=False)]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run the code that the model brings.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what an earlier run wrote.")]


class _Commands(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        silence_libraries()
        try:
            return super().invoke(ctx)
        except (OfflineError, ModelNotFound) as error:
            fail(str(error))
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            raise typer.Exit(_INTERRUPTED) from None


app = typer.Typer(cls=_Commands, no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)


@app.command("export")
def export(
    out: Annotated[Path, typer.Option(help="The directory to write; for Triton the repository to add a model to.")],
    model: Model = DEFAULT_MODEL,
    format: Annotated[
        Literal["onnx", "triton", "sentence-transformers"],
        typer.Option(
            help="A directory with model.onnx, a Triton model repository, or the model's own files, whole, as "
            "sentence-transformers loads them: of a reranker too."
        ),
    ] = "onnx",
    precision: Annotated[Literal["fp32", "int8"], typer.Option(help="int8 is lossy: the loss is measured.")] = "fp32",
    pooling: Pooling = None,
    max_tokens: MaxTokens = None,
    projection: Annotated[Path | None, typer.Option(help="A file that `tercet fit-pca` wrote.")] = None,
    opset: Annotated[int | None, typer.Option(help="ONNX operator set.", min=18, show_default="torch's")] = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    force: Force = False,
    name: Annotated[str | None, typer.Option(help="Triton: the model's name.", show_default="its own")] = None,
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Triton: where instances run.")] = "cpu",
    instances: Annotated[int, typer.Option(help="Triton: how many, on each device.", min=1)] = 1,
    max_batch_size: Annotated[int, typer.Option(help="Triton: texts in a batch.", min=1)] = 64,
    max_queue_delay_us: Annotated[int, typer.Option(help="Triton: how long a batch may wait, in µs.", min=0)] = 2000,
) -> None:
    """
    Write a model as ONNX and check it: valid, and the same vectors as torch over golden texts.

    The graph takes input_ids and attention_mask (int64, any number of texts and tokens) and gives sentence_embedding
    and token_embeddings. At fp32 it is written only if its vectors are the model's: cosine 0.9999 at least.
    """
    if format == "sentence-transformers":
        changing = {"--precision": precision != "fp32", "--pooling": pooling, "--max-tokens": max_tokens}
        _write_plain(model, out, revision, {**changing, "--projection": projection, "--opset": opset}, force=force)
        return
    _need_export_packages()
    from services.common.encoders import EncoderOptions
    from services.embedding.offline.exporting import TritonTarget, export_onnx, export_triton

    options = EncoderOptions(
        revision=revision,
        device="cpu",
        pooling=_pooling(pooling),
        max_tokens=max_tokens,
        trust_remote_code=trust_remote_code,
        projection=projection,
    )
    if format == "triton":
        target = TritonTarget(name, max_batch_size, max_queue_delay_us, device, instances)
        written = export_triton(model, options, out, target, precision=precision, opset=opset, force=force)
    else:
        written = export_onnx(model, options, out, precision=precision, opset=opset, force=force)
    _say_export(*written)
    if format == "triton":
        say(f"serve it: tritonserver --model-repository={out.absolute()}")
        if device == "cuda" and precision == "int8":
            say("ONNX Runtime has no int8 kernels of this kind for CUDA: fp32 will be faster there", "yellow")


@app.command("fit-pca")
def fit_pca(
    texts: Annotated[Path, typer.Option(help='One text a line, or .jsonl with "text" ("title", "_id"); .gz too.')],
    dimensions: Annotated[int, typer.Option(help="How many to keep.", min=1)],
    out: Annotated[Path, typer.Option(help="The projection file to write, .npz.")],
    model: Model = DEFAULT_MODEL,
    queries: Annotated[
        Path | None, typer.Option(help='Queries to measure nDCG@10 with: .jsonl with "_id", "text".')
    ] = None,
    qrels: Annotated[Path | None, typer.Option(help="Their judgements: query, document, grade.")] = None,
    sample: Annotated[int, typer.Option(help="Embed so many texts, drawn evenly; 0 for all.", min=0)] = 20_000,
    pooling: Pooling = None,
    max_tokens: MaxTokens = None,
    device: Annotated[Literal["auto", "cpu", "cuda", "mps"], typer.Option(help="Where to embed.")] = "auto",
    precision: Annotated[
        Literal["auto", "fp32", "bf16", "fp16"], typer.Option(help="What to embed with; auto is measured.")
    ] = "auto",
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    force: Force = False,
) -> None:
    """
    Fit a projection of a model's vectors to fewer dimensions on your texts, and measure what it loses.

    A tenth of the texts (1,000 at most) is held out: recall@10 says how many of their ten nearest texts stay so.
    """
    from services.common.encoders import EncoderOptions
    from services.embedding.offline.fitting import choose_documents, fit_projection, read_judged, save
    from services.embedding.offline.texts import read_documents

    if (queries is None) != (qrels is None):
        raise OfflineError("--queries and --qrels go together")
    if out.exists() and not force:
        raise OfflineError(f"{out} exists; --force replaces it")
    options = EncoderOptions(
        revision=revision,
        device=device,
        precision=precision,
        pooling=_pooling(pooling),
        max_tokens=max_tokens,
        trust_remote_code=trust_remote_code,
    )
    judged = read_judged(queries, qrels) if queries and qrels else None
    documents = choose_documents(read_documents(texts), sample=sample, judged=judged)
    fitted = fit_projection(model, options, documents, dimensions, judged)
    save(fitted.projection, out)
    _say_fitted(fitted, out)


def _need_export_packages() -> None:
    missing = []
    for name in _EXPORT_NEEDS:
        try:
            found = importlib.util.find_spec(name)
        except ModuleNotFoundError:  # `google` itself is not there.
            found = None
        if found is None:
            missing.append(name)
    if missing:
        raise OfflineError(f"exporting needs {', '.join(missing)}: pip install 'tercet[export]'")


def _write_plain(model: str, out: Path, revision: str | None, changing: Mapping[str, object], *, force: bool) -> None:
    for option, given in changing.items():
        if given:
            raise OfflineError(f"{option} changes a graph: --format sentence-transformers writes the model's own files")
    from services.embedding.offline.plain import export_plain

    digest = export_plain(model, out, revision=revision, force=force)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    say(f"written: {out} ({size / 1e6:.1f} MB), files {digest[:16]}", "green")


def _pooling(name: str | None) -> Any:
    if name is not None and name not in POOLINGS:
        raise OfflineError(f"--pooling is one of {', '.join(POOLINGS)}, not {name!r}")
    return name


def _say_export(source: "Source", exported: "Exported", place: Path) -> None:
    parity, description = exported.parity, source.description
    size = sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
    say(f"written: {place} ({size / 1e6:.1f} MB)", "green")
    say_facts(
        [
            ("fingerprint", exported.fingerprint),
            (
                "vectors",
                f"{description.dim} dimensions, {description.pooling} pooling, {description.max_tokens} tokens",
            ),
            ("opset", str(exported.opset)),
            ("beside torch fp32", f"{parity.texts} texts in {parity.batches} batches of different shapes"),
            ("cosine", f"least {parity.min_cosine:.6f}, mean {parity.mean_cosine:.6f}"),
            ("of token vectors", f"least {parity.min_token_cosine:.6f}"),
            ("largest difference", f"{parity.max_abs_difference:.2e}"),
        ]
    )
    if exported.precision == "int8":
        say(
            f"int8 is lossy: vectors are {1 - parity.mean_cosine:.4f} from fp32's in the mean (cosine distance), "
            f"{1 - parity.min_cosine:.4f} at worst, and depend a little on what else is in the batch",
            "bold yellow",
        )


def _say_fitted(fitted: "Fitted", out: Path) -> None:
    kept = len(fitted.projection.components)
    say(f"written: {out} ({out.stat().st_size / 1e3:.0f} kB)", "green")
    facts = [
        ("model", f"{fitted.model}, {fitted.computed_by}"),
        ("dimensions", f"{fitted.dim} → {kept}"),
        ("texts", f"{fitted.texts}: {fitted.fitted_on} to fit on, {fitted.held_out} held out"),
        ("variance kept", f"{fitted.variance_kept:.1%}"),
        ("recall@10", f"{fitted.recall:.3f} of the held-out texts' nearest by the whole vectors"),
    ]
    if fitted.ndcg:
        before, after = fitted.ndcg
        change = f" ({(after - before) / before:+.1%})" if before else ""
        facts.append(("nDCG@10", f"{before:.4f} → {after:.4f}{change}, over these texts"))
    facts.append(("fingerprint", f"the model's, with +{fitted.projection.name}"))
    say_facts(facts)
    say("serve it:")
    say(f"  python -m services.embedding --model '{fitted.model};projection={out.absolute()}'")
    say("or, with the whole stack:")
    say(f"  EMBEDDING_MODEL='{fitted.model};projection={out.absolute()}' tercet up")


if __name__ == "__main__":
    sys.exit(app(prog_name="tercet"))
