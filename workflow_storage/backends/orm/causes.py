"""Why a database refused a statement, told by the codes of its errors, and what to do about it.

For `dialects`, which says whose codes they are, and for `errors`, which makes messages of it.
"""

from __future__ import annotations

import re
from enum import Enum, auto
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import django.db


class Cause(Enum):
    """Why a database refused a statement, as far as it matters here."""

    MISSING = auto()
    """A table or a column is not there."""
    GAVE_WAY = auto()
    """It was rolled back in favour of another transaction: a deadlock, a serialization failure."""
    NOT_READY = auto()
    """The server takes no statements now, as a node that is not in step with its cluster."""
    UNPREPARED = auto()
    """A prepared statement is gone, or somebody else's, or reads a column of another type now."""
    LOCKED = auto()
    """Another one held a lock for longer than the timeout."""
    SHARED = auto()
    """Another thread has locked a table of a database in memory, for which none waits."""
    READ_ONLY = auto()
    """The server takes no writes: a standby, or one that was demoted under an open connection."""
    THERE_ALREADY = auto()
    """A table, column, index or constraint that is to be made is there, or one to be dropped not.

    Told only where a change of the schema is no transaction."""
    TOO_LARGE = auto()
    """The statement is larger than the server takes."""
    FULL = auto()
    """There is no room for what is to be written: the disk, or what the database may have of it."""
    TOO_SLOW = auto()
    """The statement took longer than the server allows one."""
    DENIED = auto()
    """The server does not know the user, or not with this password."""
    FORBIDDEN = auto()
    """The user may not do that."""
    NO_DATABASE = auto()
    """The server has no database with that name."""
    CROWDED = auto()
    """The server takes no more connections."""
    STARTING = auto()
    """The server is starting, or shutting down."""
    NO_FILE = auto()
    """The file of a database cannot be opened."""
    DAMAGED = auto()
    """The file is no database, or a damaged one."""
    OTHER = auto()


ADVICE = {
    Cause.NOT_READY: "Let the node join its cluster, or connect to another one.",
    Cause.FULL: "Make room on its disk, or delete finished runs with runs.delete_finished().",
    Cause.TOO_SLOW: (
        "It took longer than the server allows a statement (statement_timeout, "
        "max_statement_time), or somebody cancelled it: raise that, or end what it waited for."
    ),
    Cause.DENIED: "Check the user and the password.",
    Cause.FORBIDDEN: (
        "Grant the user SELECT, INSERT, UPDATE and DELETE on the tables of workflow_storage; to "
        "make them, CREATE, too."
    ),
    Cause.NO_DATABASE: "Check its name, or create it.",
    Cause.CROWDED: (
        "All connections that it takes are taken: close some, let it take more, or put a pooler "
        "before it."
    ),
    Cause.STARTING: "It is starting or shutting down; try again in a moment.",
    Cause.NO_FILE: "Check that its folder is there, and that this user may write to it.",
    Cause.DAMAGED: "Check the path, or restore the file from a backup.",
    Cause.OTHER: "Check that the server runs and that the settings of the database are right.",
}
"""What to do, where that is the same for every database."""

# PostgreSQL: https://www.postgresql.org/docs/current/errcodes-appendix.html
_SQLSTATES = {
    "40001": Cause.GAVE_WAY,
    "40P01": Cause.GAVE_WAY,
    "55P03": Cause.LOCKED,
    "25006": Cause.READ_ONLY,
    "42P01": Cause.MISSING,
    "42703": Cause.MISSING,
    "26000": Cause.UNPREPARED,
    "42P05": Cause.UNPREPARED,
    "0A000": Cause.UNPREPARED,
    "54000": Cause.TOO_LARGE,
    "53100": Cause.FULL,
    "57014": Cause.TOO_SLOW,
    "28000": Cause.DENIED,
    "28P01": Cause.DENIED,
    "42501": Cause.FORBIDDEN,
    "3D000": Cause.NO_DATABASE,
    "53300": Cause.CROWDED,
    "57P03": Cause.STARTING,
}
# What the server says when it refuses a connection comes without a code, in the server's language.
_REFUSALS = {
    re.compile(r"password|authentication failed|role .* does not exist|pg_hba"): Cause.DENIED,
    re.compile(r"database .* does not exist"): Cause.NO_DATABASE,
    re.compile(r"too many (clients|connections)|connection slots"): Cause.CROWDED,
    re.compile(r"is (starting up|shutting down|not yet accepting)|in recovery mode"): (
        Cause.STARTING
    ),
}
# MySQL and MariaDB: ER_LOCK_DEADLOCK, ER_CHECKREAD, ER_BAD_FIELD_ERROR, ER_NO_SUCH_TABLE,
# ER_NET_PACKET_TOO_LARGE, CR_NET_PACKET_TOO_LARGE, ER_OPTION_PREVENTS_STATEMENT (--read-only),
# ER_READ_ONLY_MODE; ER_LOCK_WAIT_TIMEOUT, which Galera has for a conflict, too;
# ER_TRANSACTION_ROLLBACK_DURING_COMMIT, a conflict in a MySQL group. Galera refuses a statement
# with ER_UNKNOWN_COM_ERROR before anything of it is done ("WSREP has not yet prepared node").
_ERRNOS = {
    1213: Cause.GAVE_WAY,
    1020: Cause.GAVE_WAY,
    1205: Cause.GAVE_WAY,
    3101: Cause.GAVE_WAY,
    1047: Cause.NOT_READY,
    1054: Cause.MISSING,
    1146: Cause.MISSING,
    1153: Cause.TOO_LARGE,
    2020: Cause.TOO_LARGE,
    1290: Cause.READ_ONLY,
    1836: Cause.READ_ONLY,
    # ER_DISK_FULL, ER_RECORD_FILE_FULL, and what InnoDB says of a disk (ER_ERROR_ON_WRITE).
    **dict.fromkeys((1021, 1114, 1026), Cause.FULL),
    # ER_QUERY_TIMEOUT, ER_STATEMENT_TIMEOUT (MariaDB), ER_QUERY_INTERRUPTED
    **dict.fromkeys((3024, 1969, 1317), Cause.TOO_SLOW),
    # ER_ACCESS_DENIED_ERROR, ER_ACCESS_DENIED_NO_PASSWORD_ERROR, ER_HOST_NOT_PRIVILEGED
    **dict.fromkeys((1045, 1698, 1130), Cause.DENIED),
    # ER_DBACCESS_DENIED_ERROR, ER_TABLEACCESS_DENIED_ERROR
    **dict.fromkeys((1044, 1142), Cause.FORBIDDEN),
    1049: Cause.NO_DATABASE,
    # ER_CON_COUNT_ERROR, ER_TOO_MANY_USER_CONNECTIONS, ER_USER_LIMIT_REACHED
    **dict.fromkeys((1040, 1203, 1226), Cause.CROWDED),
    # Tables, columns, keys, columns or keys that are not there, foreign keys, checks; MariaDB has
    # the last two as one, and 1005 or 1022 for a foreign key.
    **dict.fromkeys((1050, 1060, 1061, 1091, 1826, 3822, 1022), Cause.THERE_ALREADY),
}
# EE_WRITE, ER_GET_ERRNO: what the system says of a file; 28 is ENOSPC.
_OF_A_FILE = {3, 1030}
_NO_SPACE = re.compile(r"\b28\b|No space left")
_FOREIGN_KEY_IS_THERE = "errno: 121"
# SQLite has codes (https://www.sqlite.org/rescode.html: PERM, BUSY, LOCKED, READONLY, CORRUPT,
# FULL, CANTOPEN, TOOBIG, NOTADB; the lowest byte of an extended one, such as
# LOCKED_SHAREDCACHE), but only texts for what is missing.
_SQLITE_SHARED = 262
_SQLITE_CODES = {
    3: Cause.NO_FILE,
    5: Cause.LOCKED,
    6: Cause.LOCKED,
    8: Cause.READ_ONLY,
    11: Cause.DAMAGED,
    13: Cause.FULL,
    14: Cause.NO_FILE,
    18: Cause.TOO_LARGE,
    26: Cause.DAMAGED,
}
_SQLITE_MISSING = ("no such table", "no such column", "has no column named")

_POSTGRESQL_LOCK_TIMEOUT = "55P03"
_MYSQL_LOCK_TIMEOUT = 1205  # ER_LOCK_WAIT_TIMEOUT


def postgresql_cause(exc: django.db.Error) -> Cause:
    """Return the cause of an error of PostgreSQL."""
    state = _sqlstate(exc)
    if state is not None:
        return _SQLSTATES.get(state, Cause.OTHER)
    text = str(exc)
    return next((cause for said, cause in _REFUSALS.items() if said.search(text)), Cause.OTHER)


def mysql_cause(exc: django.db.Error) -> Cause:
    """Return the cause of an error of MySQL or MariaDB."""
    number = _errno(exc)
    if number in _OF_A_FILE and _NO_SPACE.search(str(exc)):
        return Cause.FULL
    if number == 1005 and _FOREIGN_KEY_IS_THERE in str(exc):
        return Cause.THERE_ALREADY
    return _ERRNOS.get(number, Cause.OTHER) if isinstance(number, int) else Cause.OTHER


def sqlite_cause(exc: django.db.Error) -> Cause:
    """Return the cause of an error of SQLite."""
    code = getattr(exc.__cause__, "sqlite_errorcode", 0)
    if code == _SQLITE_SHARED:
        return Cause.SHARED
    if code & 0xFF in _SQLITE_CODES:
        return _SQLITE_CODES[code & 0xFF]
    text = str(exc)
    return Cause.MISSING if any(part in text for part in _SQLITE_MISSING) else Cause.OTHER


def no_cause(exc: django.db.Error) -> Cause:
    """Return that nothing is known of an error."""
    return Cause.OTHER


def is_postgresql_lock_timeout(exc: django.db.Error) -> bool:
    """Whether somebody else held a lock for too long."""
    return _sqlstate(exc) == _POSTGRESQL_LOCK_TIMEOUT


def is_mysql_lock_timeout(exc: django.db.Error) -> bool:
    """Whether somebody else held a lock for too long."""
    return _errno(exc) == _MYSQL_LOCK_TIMEOUT


def _sqlstate(exc: django.db.Error) -> str | None:
    driver_error = exc.__cause__
    # psycopg's name for it, or psycopg2's
    state = getattr(driver_error, "sqlstate", None) or getattr(driver_error, "pgcode", None)
    return None if state is None else str(state)


def _errno(exc: django.db.Error) -> object:
    return exc.args[0] if exc.args else None
