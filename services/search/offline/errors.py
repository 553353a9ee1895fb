"""What can go wrong with a service's data that a user can mend; the message says why and what to do."""


class OfflineError(Exception):
    """What was asked for could not be done."""


class BackupError(OfflineError):
    """A backup could not be made or restored."""


class MigrationError(OfflineError):
    """A ledger could not be moved."""
