"""The search service: documents in a ledger, derived shards, and the pipeline that answers questions."""
