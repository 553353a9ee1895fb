"""Makes the cross-encoder that Tercet ships: see README.md beside this file, or run `python -m training --help`."""
