"""The embedding service: text to vectors, with one model or several, each behind a batcher that its callers share."""
