"""A linear projection of pooled vectors to fewer dimensions (PCA), as a file beside a model."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from services.common.model_errors import InvalidModel


@dataclass(frozen=True, slots=True)
class Projection:
    """
    Maps a pooled vector x to `components @ (x - mean)`.

    *mean* is float32 of shape [dim], *components* float32 of shape [kept, dim], most variance first.
    """

    mean: NDArray[np.float32]
    components: NDArray[np.float32]

    @property
    def name(self) -> str:
        """Size and content hash, as a fingerprint has them: `pca128-1a2b3c4d`."""
        digest = hashlib.sha256(np.ascontiguousarray(self.mean, dtype="<f4").tobytes())
        digest.update(np.ascontiguousarray(self.components, dtype="<f4").tobytes())
        return f"pca{len(self.components)}-{digest.hexdigest()[:8]}"

    def save(self, path: Path) -> None:
        """Write a NumPy .npz with the arrays `mean` and `components` at exactly *path*."""
        with path.open("wb") as stream:
            np.savez(stream, mean=self.mean.astype("<f4"), components=self.components.astype("<f4"))

    @classmethod
    def load(cls, path: Path) -> Self:
        """
        Read what `save` wrote.

        Raises:
            InvalidModel: There is no such file, or it holds something else.
        """
        try:
            with np.load(path, allow_pickle=False) as arrays:
                mean, components = arrays["mean"].astype(np.float32), arrays["components"].astype(np.float32)
        except (OSError, ValueError, KeyError, EOFError, AttributeError) as error:
            raise InvalidModel(f"{path} is no projection that can be used: {error}") from error
        if mean.ndim != 1 or components.ndim != 2 or components.shape[1] != len(mean) or not len(components):
            raise InvalidModel(
                f"{path} is no projection: mean {mean.shape} and components {components.shape} do not fit"
            )
        if not (np.isfinite(mean).all() and np.isfinite(components).all()):
            raise InvalidModel(f"{path} is no projection that can be used: it holds values that are not finite")
        return cls(mean, components)
