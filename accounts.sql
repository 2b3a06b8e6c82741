-- The schema of accounts.db. docs/accounts.md tells what each table is for.
--
-- This file only grows: a section, once released, is never edited. A database remembers in
-- PRAGMA user_version how many sections it has been through; opening it applies the rest, each in one
-- transaction with its number. Times are seconds since 1970-01-01 UTC.

-- section 1
CREATE TABLE accounts (
    id            TEXT    NOT NULL PRIMARY KEY,             -- UUID, also the folder's name
    name          TEXT    NOT NULL,                         -- login name
    uid           INTEGER NOT NULL CHECK (uid BETWEEN 1000 AND 59999),  -- in the guest
    hostname      TEXT    NOT NULL,
    machine_id    BLOB    NOT NULL CHECK (length(machine_id) = 16),     -- /etc/machine-id
    password      TEXT,                                     -- argon2id, PHC string; NULL: keys only
    disabled      INTEGER NOT NULL DEFAULT 0 CHECK (disabled IN (0, 1)),
    created       INTEGER NOT NULL,
    removed       INTEGER,                                  -- NULL: alive
    disk_bytes    INTEGER NOT NULL CHECK (disk_bytes > 0),
    max_sessions  INTEGER NOT NULL CHECK (max_sessions > 0),
    linger_s      INTEGER CHECK (linger_s >= 0)             -- NULL: as the service's configuration says
) STRICT;

-- A removed account keeps its row until it is purged, so that its disk still has an owner; its name is free.
CREATE UNIQUE INDEX accounts_by_name ON accounts (name) WHERE removed IS NULL;

CREATE TABLE keys (
    id            INTEGER NOT NULL PRIMARY KEY,
    account       TEXT    NOT NULL REFERENCES accounts (id) ON DELETE CASCADE,
    type          TEXT    NOT NULL,                         -- ssh-ed25519, …
    blob          BLOB    NOT NULL,                         -- as on the wire (RFC 4253 §6.6)
    fingerprint   TEXT    NOT NULL,                         -- SHA256:…, as ssh-keygen -l prints it
    comment       TEXT    NOT NULL,
    added         INTEGER NOT NULL,
    UNIQUE (account, blob)
) STRICT;

CREATE TABLE sessions (
    id            INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT,
    account       TEXT    NOT NULL REFERENCES accounts (id) ON DELETE CASCADE,
    source        TEXT    NOT NULL,                         -- address and port of the client
    kind          TEXT    NOT NULL,                         -- shell, exec, sftp, …
    started       INTEGER NOT NULL,
    ended         INTEGER,                                  -- NULL: going on
    outcome       TEXT                                      -- how it ended, for people
) STRICT;

CREATE INDEX sessions_by_account ON sessions (account, id);
CREATE INDEX sessions_open ON sessions (id) WHERE ended IS NULL;

-- What the service was about to do with an account's machine: written before it is done, read when the
-- service starts again.
CREATE TABLE machines (
    account       TEXT    NOT NULL PRIMARY KEY REFERENCES accounts (id) ON DELETE CASCADE,
    state         TEXT    NOT NULL,
    since         INTEGER NOT NULL,
    pid           INTEGER,
    base          TEXT,
    detail        TEXT                                      -- why, for people
) STRICT;

-- section 2
-- What happens to a machine when nobody is logged in: its memory is saved, it stays, or it is dropped.
ALTER TABLE accounts ADD COLUMN policy TEXT NOT NULL DEFAULT 'save'
    CHECK (policy IN ('save', 'keep', 'discard'));
-- The terminals that wait for their user, the one left last first: "3 0 5".
ALTER TABLE machines ADD COLUMN terminals TEXT;

-- section 3
-- How long work may keep a machine awake after the last session; NULL: as the service's configuration says.
ALTER TABLE accounts ADD COLUMN max_linger_s INTEGER CHECK (max_linger_s >= 0);
-- Until when an operator wants the machine kept awake; a time that is over means nothing.
ALTER TABLE accounts ADD COLUMN hold_until INTEGER;
-- What was at work in the machine when it was saved.
ALTER TABLE machines ADD COLUMN paused TEXT;

-- section 4
-- What a login by the key may do: options as before a key in an authorized_keys file; empty: anything.
ALTER TABLE keys ADD COLUMN options TEXT NOT NULL DEFAULT '';

-- section 5
-- The class that says, in the service's configuration, what an account has no word of its own about.
ALTER TABLE accounts ADD COLUMN class TEXT;
-- Limits became the account's own or NULL: as its class or the configuration says. What was everybody's
-- default before is nobody's own.
ALTER TABLE accounts ADD COLUMN own_sessions INTEGER CHECK (own_sessions > 0);
UPDATE accounts SET own_sessions = max_sessions WHERE max_sessions <> 32;
ALTER TABLE accounts DROP COLUMN max_sessions;
ALTER TABLE accounts RENAME COLUMN own_sessions TO max_sessions;
ALTER TABLE accounts ADD COLUMN own_policy TEXT CHECK (own_policy IN ('save', 'keep', 'discard'));
UPDATE accounts SET own_policy = policy WHERE policy <> 'save';
ALTER TABLE accounts DROP COLUMN policy;
ALTER TABLE accounts RENAME COLUMN own_policy TO policy;
-- Streams that one of its connections forwards at a time.
ALTER TABLE accounts ADD COLUMN max_streams INTEGER CHECK (max_streams >= 0);
-- From then on nobody logs in; NULL: never so.
ALTER TABLE accounts ADD COLUMN expires INTEGER;
-- Until when `disabled` counts; NULL: until it is taken back.
ALTER TABLE accounts ADD COLUMN disabled_until INTEGER;
-- The user's name in the guest, where the account was renamed since its first start; NULL: the account's.
ALTER TABLE accounts ADD COLUMN guest_name TEXT;
CREATE INDEX accounts_by_expiry ON accounts (expires) WHERE expires IS NOT NULL;
-- What a session's login was by, for people: "key SHA256:…", "password", "certificate …"; NULL: from
-- before this was kept.
ALTER TABLE sessions ADD COLUMN login TEXT;
-- How it found its machine: running, forked, resumed, or cold (started from the disk though there was memory);
-- NULL: it got none, or it goes on.
ALTER TABLE sessions ADD COLUMN machine TEXT;

-- section 6
-- A code with which whoever has it gives an account its first key or password, once. What is kept is the
-- SHA-256 of 128 random bits, so nobody finds the code by it.
CREATE TABLE invitations (
    account       TEXT    NOT NULL PRIMARY KEY REFERENCES accounts (id) ON DELETE CASCADE,
    hash          BLOB    NOT NULL CHECK (length(hash) = 32),
    expires       INTEGER NOT NULL
) STRICT;

-- section 7
-- Bytes that its disk, saved memory and checkpoints may take on the host together; 0: without end, NULL: as its
-- class or the configuration says.
ALTER TABLE accounts ADD COLUMN quota_bytes INTEGER CHECK (quota_bytes >= 0);
-- What accounts used, a row for each day (UTC) on which there was something. Days long past are deleted.
CREATE TABLE usage (
    account       TEXT    NOT NULL REFERENCES accounts (id) ON DELETE CASCADE,
    day           INTEGER NOT NULL,                         -- since 1970-01-01
    sessions      INTEGER NOT NULL DEFAULT 0,               -- that began
    awake_s       INTEGER NOT NULL DEFAULT 0,               -- seconds that its machine ran
    cpu_ms        INTEGER NOT NULL DEFAULT 0,               -- milliseconds that it had of processors
    received      INTEGER NOT NULL DEFAULT 0,               -- bytes from its sessions' clients
    sent          INTEGER NOT NULL DEFAULT 0,               -- bytes to them
    disk_bytes    INTEGER,                                  -- what it took on the host, when last looked
    PRIMARY KEY (account, day)
) STRICT, WITHOUT ROWID;
CREATE INDEX usage_by_day ON usage (day);

-- section 8
-- What the host lets the account's machine take: its weight against others', hundredths of one processor,
-- bytes and operations a second of the disk in each direction (0: without end); NULL: as its class or the
-- configuration says.
ALTER TABLE accounts ADD COLUMN cpu_weight INTEGER CHECK (cpu_weight BETWEEN 1 AND 10000);
ALTER TABLE accounts ADD COLUMN cpu_percent INTEGER CHECK (cpu_percent >= 0);
ALTER TABLE accounts ADD COLUMN io_rate INTEGER CHECK (io_rate >= 0);
ALTER TABLE accounts ADD COLUMN io_operations INTEGER CHECK (io_operations >= 0);

-- section 9
-- What the account's machine is to have of memory and processors, where its base can give it; NULL: as its class or
-- the base says.
ALTER TABLE accounts ADD COLUMN memory_bytes INTEGER CHECK (memory_bytes > 0);
ALTER TABLE accounts ADD COLUMN vcpus INTEGER CHECK (vcpus BETWEEN 1 AND 255);

-- section 10
-- Most processes and threads of the user's in the account's machine (0: as many as its kernel has); NULL: as its class
-- or the configuration says.
ALTER TABLE accounts ADD COLUMN processes INTEGER CHECK (processes >= 0);
