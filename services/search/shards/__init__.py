"""Shards: one hash slice of a collection each, derived from the ledger."""
