"""The plain types that pass through every port."""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float32]
MetadataValue = str | int | float | bool | list[str]
Metric = Literal["cosine", "dot", "l2"]
AttributeKind = Literal["any", "keyword", "number", "bool", "date"]
LexicalMatch = Literal["any", "all", "phrase"]
