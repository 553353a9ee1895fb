"""What a model's files can be wrong by."""


class ModelNotFound(Exception):
    """There is no such model; the message says where it was looked for."""


class InvalidModel(ModelNotFound):
    """A model's files are there in part, damaged, or cannot be used as asked; the message names the file."""
