"""The embedding service: text to vectors, with one model behind a shared batcher."""
