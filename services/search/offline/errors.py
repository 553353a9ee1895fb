"""What can go wrong with a backup that a user can mend."""


class BackupError(Exception):
    """A backup could not be made or restored; the message says why and what to do."""
