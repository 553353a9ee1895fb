"""What a user imports or types: the client, the command line, the local stack runner and evaluation."""

__version__ = "0.1.0"
