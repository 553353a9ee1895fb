"""Training on the judgements and the collection of a user: `tercet train-reranker`."""
