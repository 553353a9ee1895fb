"""The system of record: documents, vectors and numbered operations in one transactional database."""
