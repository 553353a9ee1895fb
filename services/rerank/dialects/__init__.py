"""
Request and reply shapes of other products, as thin routes over the same reranker.

*routers* are all of them; *error_dialects* names, for `create_service_app`, the shape in which each path's errors are written.
"""

from typing import Final

from services.rerank.dialects import compatible, score, tei

routers: Final = [compatible.router, score.router, tei.router]
error_dialects: Final[dict[str, str]] = {"/v1/rerank": "reranker", "/v2": "reranker", "/tei": "tei"}
