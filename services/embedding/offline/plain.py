"""`export --format sentence-transformers`: a model's directory as sentence-transformers loads it, whole."""

import json
import shutil
from pathlib import Path

from services.common.model_files import check_model_files, files_digest, resolve_model
from services.embedding.offline.output import MARK, check_free, new_directory


def export_plain(model: str, out: Path, *, revision: str | None, force: bool) -> str:
    """
    Write the files of *model*, an encoder or a reranker, into *out* and return a digest of them.

    What ships without some of its weights is made whole: the directory needs nothing else.

    Raises:
        ModelNotFound: There is no such model, or a file of it is missing or damaged.
        OfflineError: *out* is taken.
    """
    check_free(out, force=force)
    source = resolve_model(model, revision=revision)
    check_model_files(source)
    digest = files_digest(source)
    with new_directory(out, force=force) as made:
        shutil.copytree(source, made, dirs_exist_ok=True)
        record = {"model": model, "format": "sentence-transformers", "digest": digest}
        (made / MARK).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return digest
