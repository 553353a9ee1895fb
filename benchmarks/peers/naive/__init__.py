"""sentence-transformers behind FastAPI, as a first attempt would have it."""
