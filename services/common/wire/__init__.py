"""The shapes that travel between services and to callers: pydantic models, and nothing else."""
