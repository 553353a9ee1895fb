"""The rerank service: scores query-document pairs, the best candidates first, in the time there is."""
