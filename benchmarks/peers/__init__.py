"""The servers we are compared with."""
