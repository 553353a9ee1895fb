"""Request and reply shapes of other products, as thin routes over the same reranker."""
