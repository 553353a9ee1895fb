"""What errors of PostgreSQL and of the connection to it mean to a caller."""

import asyncpg

from services.common.errors import Conflict, Internal, InvalidInput, TercetError, TooLarge, Unavailable

RETRY_AFTER_S = 1.0

# By SQLSTATE, and where that is missing by its first two characters, the class (PostgreSQL, appendix A).
_UNAVAILABLE = {
    "08": "the connection to it was lost",
    "25006": "it takes no writes: it is a standby, or is set to read only",
    "25P03": "a transaction took too long",
    "28": "it does not let this user in: check the user, the password and pg_hba.conf",
    "3D": "there is no such database: create it",
    "40": "two changes stood in each other's way",
    "42501": "this user lacks a privilege",
    "53100": "its disk is full: free some space",
    "53200": "it is out of memory",
    "53300": "it has no connection left: raise max_connections, or run fewer or smaller pools",
    "53": "it is out of resources",
    "55P03": "a lock was not free in time",
    "57014": "a statement took too long",
    "57": "it is starting, stopping or restarting",
    "58": "it cannot read or write its files",
}


def explain(error: Exception, place: str, *, writing: bool) -> TercetError:
    """
    Return what *error*, raised by work on the ledger at *place*, means: what is wrong and how to mend it.

    A lost connection leaves open whether a change was stored; the message of a *writing* call says so.
    """
    match error:
        case TercetError():
            return error
        case asyncpg.UniqueViolationError():
            return Conflict(f"The ledger {place} has that already: {error.detail or error}")
        case asyncpg.CharacterNotInRepertoireError() | asyncpg.UntranslatableCharacterError():
            return InvalidInput(f"A name has a character that PostgreSQL cannot keep: {error}")
        case asyncpg.ProgramLimitExceededError():
            return TooLarge(f"A document or its id is larger than the ledger can hold: {error}")
        case asyncpg.PostgresError():
            state = error.sqlstate or ""
            reason = _UNAVAILABLE.get(state) or _UNAVAILABLE.get(state[:2])
        case asyncpg.DataError() | asyncpg.UnsupportedClientFeatureError():
            reason = None
        case TimeoutError():
            reason = "it did not answer in time, or all connections were busy"
        case OSError() | asyncpg.InterfaceError() | asyncpg.InternalClientError():
            reason = "it cannot be reached"
        case _:
            reason = None
    lost = not isinstance(error, asyncpg.PostgresError) or (error.sqlstate or "")[:2] in ("08", "57")
    if reason is None:
        return Internal(f"Work on the ledger {place} failed: {type(error).__name__}: {error}")
    unknown = "; whether the change was stored is not known, and repeating it does no harm" if writing and lost else ""
    return Unavailable(
        f"The ledger {place} is unavailable: {reason} ({type(error).__name__}: {error}){unknown}",
        retry_after_s=RETRY_AFTER_S,
    )
