"""Something to search in the first minute: the documentation of the Python that runs, and questions about it."""
