-- A database as the programs with schema 9 left it: a dump of it, and the version.
PRAGMA foreign_keys=OFF;
BEGIN TRANSACTION;
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
    linger_s      INTEGER CHECK (linger_s >= 0)             -- NULL: as the service's configuration says
, max_linger_s INTEGER CHECK (max_linger_s >= 0), hold_until INTEGER, class TEXT, max_sessions INTEGER CHECK (max_sessions > 0), policy TEXT CHECK (policy IN ('save', 'keep', 'discard')), max_streams INTEGER CHECK (max_streams >= 0), expires INTEGER, disabled_until INTEGER, guest_name TEXT, quota_bytes INTEGER CHECK (quota_bytes >= 0), cpu_weight INTEGER CHECK (cpu_weight BETWEEN 1 AND 10000), cpu_percent INTEGER CHECK (cpu_percent >= 0), io_rate INTEGER CHECK (io_rate >= 0), io_operations INTEGER CHECK (io_operations >= 0), memory_bytes INTEGER CHECK (memory_bytes > 0), vcpus INTEGER CHECK (vcpus BETWEEN 1 AND 255)) STRICT;
INSERT INTO "accounts" VALUES('11111111-1111-4111-8111-111111111111','alice',1000,'alice',X'000102030405060708090A0B0C0D0E0F','$argon2id$v=19$x',0,1763000000,NULL,10737418240,NULL,NULL,NULL,'student',NULL,'keep',NULL,4086547200,NULL,'alicia',NULL,NULL,NULL,NULL,NULL,NULL,NULL);
INSERT INTO "accounts" VALUES('22222222-2222-4222-8222-222222222222','bob',1000,'bob',X'FF0102030405060708090A0B0C0D0E0F',NULL,1,1763000001,NULL,1073741824,5,900,1,NULL,4,'discard',7,NULL,1863000000,NULL,5368709120,50,25,20971520,300,1073741824,2);
INSERT INTO "accounts" VALUES('33333333-3333-4333-8333-333333333333','carol',1000,'carol',X'EE0102030405060708090A0B0C0D0E0F',NULL,0,1763000002,1763000003,1073741824,0,NULL,NULL,NULL,4,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL);
CREATE TABLE invitations (
    account       TEXT    NOT NULL PRIMARY KEY REFERENCES accounts (id) ON DELETE CASCADE,
    hash          BLOB    NOT NULL CHECK (length(hash) = 32),
    expires       INTEGER NOT NULL
) STRICT;
INSERT INTO "invitations" VALUES('11111111-1111-4111-8111-111111111111',X'ABABABABABABABABABABABABABABABABABABABABABABABABABABABABABABABAB',4086547200);
CREATE TABLE keys (
    id            INTEGER NOT NULL PRIMARY KEY,
    account       TEXT    NOT NULL REFERENCES accounts (id) ON DELETE CASCADE,
    type          TEXT    NOT NULL,                         -- ssh-ed25519, …
    blob          BLOB    NOT NULL,                         -- as on the wire (RFC 4253 §6.6)
    fingerprint   TEXT    NOT NULL,                         -- SHA256:…, as ssh-keygen -l prints it
    comment       TEXT    NOT NULL,
    added         INTEGER NOT NULL, options TEXT NOT NULL DEFAULT '',
    UNIQUE (account, blob)
) STRICT;
INSERT INTO "keys" VALUES(1,'11111111-1111-4111-8111-111111111111','ssh-ed25519',X'0000000B','SHA256:x','alice@laptop',1763000000,'');
INSERT INTO "keys" VALUES(2,'11111111-1111-4111-8111-111111111111','ssh-ed25519',X'0000000C','SHA256:y','backup',1763000000,'restrict,command="borg serve"');
CREATE TABLE machines (
    account       TEXT    NOT NULL PRIMARY KEY REFERENCES accounts (id) ON DELETE CASCADE,
    state         TEXT    NOT NULL,
    since         INTEGER NOT NULL,
    pid           INTEGER,
    base          TEXT,
    detail        TEXT                                      -- why, for people
, terminals TEXT, paused TEXT) STRICT;
INSERT INTO "machines" VALUES('11111111-1111-4111-8111-111111111111','saved',1763000020,NULL,'0f0f','its memory is saved','3 0',NULL);
CREATE TABLE sessions (
    id            INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT,
    account       TEXT    NOT NULL REFERENCES accounts (id) ON DELETE CASCADE,
    source        TEXT    NOT NULL,                         -- address and port of the client
    kind          TEXT    NOT NULL,                         -- shell, exec, sftp, …
    started       INTEGER NOT NULL,
    ended         INTEGER,                                  -- NULL: going on
    outcome       TEXT                                      -- how it ended, for people
, login TEXT, machine TEXT) STRICT;
INSERT INTO "sessions" VALUES(7,'11111111-1111-4111-8111-111111111111','192.0.2.1:4711','shell',1763000010,1763000020,'exit status 0',NULL,NULL);
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
INSERT INTO "usage" VALUES('22222222-2222-4222-8222-222222222222',20400,3,600,12000,1000,2000,8192);
CREATE UNIQUE INDEX accounts_by_name ON accounts (name) WHERE removed IS NULL;
CREATE INDEX sessions_by_account ON sessions (account, id);
CREATE INDEX sessions_open ON sessions (id) WHERE ended IS NULL;
CREATE INDEX accounts_by_expiry ON accounts (expires) WHERE expires IS NOT NULL;
CREATE INDEX usage_by_day ON usage (day);
DELETE FROM "sqlite_sequence";
INSERT INTO "sqlite_sequence" VALUES('sessions',7);
COMMIT;
PRAGMA user_version=9;
