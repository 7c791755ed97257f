-- The session-event store, schema version 1 (README, Contract 3). For SQLite 3.38 or newer, or an
-- older one built with JSON1. It makes a fresh file. Run again, or on a file in which another
-- program made session_events with the same columns, it adds what is missing and changes no row.
-- Where columns are missing it changes nothing: it is one transaction, which its last check undoes.
-- server.py carries this text to the letter.

BEGIN IMMEDIATE;
CREATE TEMP TABLE schema_before AS SELECT user_version AS version FROM pragma_user_version;
PRAGMA user_version = 1;

CREATE TABLE IF NOT EXISTS session_events (
  id INTEGER PRIMARY KEY AUTOINCREMENT,
  identity_hash TEXT NOT NULL,
  github_hash TEXT,
  session_id_hash TEXT NOT NULL,
  ended_at TEXT NOT NULL,
  tool_count INTEGER NOT NULL DEFAULT 0,
  tokens_saved INTEGER NOT NULL DEFAULT 0,
  branch_sha TEXT,
  discovery_refs_json TEXT NOT NULL DEFAULT '[]',
  plugin_version TEXT NOT NULL,
  received_at TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%SZ', 'now'))
);

CREATE UNIQUE INDEX IF NOT EXISTS idx_session_events_identity_session_unique
  ON session_events (identity_hash, session_id_hash);
CREATE INDEX IF NOT EXISTS idx_session_events_identity_ended_at
  ON session_events (identity_hash, ended_at);
CREATE INDEX IF NOT EXISTS idx_session_events_received_at ON session_events (received_at);
CREATE INDEX IF NOT EXISTS idx_session_events_ended_at ON session_events (ended_at);

-- Which session touched which discovery: the edges of the session graph.
CREATE TABLE IF NOT EXISTS session_discoveries (
  discovery_ref TEXT NOT NULL,
  event_id INTEGER NOT NULL,
  PRIMARY KEY (discovery_ref, event_id)
) WITHOUT ROWID;

-- The insert calls no SQL function (json_each is a table). A function might abort the statement,
-- and for that SQLite would copy each page first: a fifth of the whole cost of an event. So a row
-- whose refs are not JSON text is refused. The upsert clause, unlike OR IGNORE, also holds where
-- the statement that inserts the row has an OR clause of its own.
CREATE TRIGGER IF NOT EXISTS session_events_discoveries_insert AFTER INSERT ON session_events
WHEN NEW.discovery_refs_json <> '[]'
BEGIN
  INSERT INTO session_discoveries (discovery_ref, event_id)
    SELECT value, NEW.id FROM json_each(NEW.discovery_refs_json) WHERE type = 'text'
    ON CONFLICT DO NOTHING;
END;

CREATE TRIGGER IF NOT EXISTS session_events_discoveries_delete AFTER DELETE ON session_events
WHEN OLD.discovery_refs_json <> '[]' AND json_valid(OLD.discovery_refs_json)
BEGIN
  DELETE FROM session_discoveries
    WHERE event_id = OLD.id
      AND discovery_ref IN
        (SELECT value FROM json_each(OLD.discovery_refs_json) WHERE type = 'text');
END;

-- Edges of rows that were there before the triggers. This does not fail, whatever the rows hold.
INSERT OR IGNORE INTO session_discoveries (discovery_ref, event_id)
  SELECT value, session_events.id
    FROM session_events,
         json_each(CASE WHEN json_valid(discovery_refs_json) THEN discovery_refs_json ELSE '[]' END)
    WHERE json_each.type = 'text';

-- The check. It undoes all of the above where the file is not what version 1 says, or is newer. A
-- program that goes on after an error (as sqlite3 < schema.sql does) finds nothing to commit.
CREATE TEMP TABLE schema_check (
  complete INTEGER CONSTRAINT "session_events lacks columns of version 1, or is of a newer version"
    CHECK (complete)
);
INSERT OR ROLLBACK INTO schema_check SELECT
  (SELECT version FROM schema_before) <= 1
  AND (SELECT count(*) FROM pragma_table_info('session_events') WHERE name IN (
    'id', 'identity_hash', 'github_hash', 'session_id_hash', 'ended_at', 'tool_count',
    'tokens_saved', 'branch_sha', 'discovery_refs_json', 'plugin_version', 'received_at')) = 11
  AND (SELECT count(*) FROM sqlite_master WHERE name IN (
    'idx_session_events_identity_session_unique', 'idx_session_events_identity_ended_at',
    'idx_session_events_received_at', 'idx_session_events_ended_at', 'session_discoveries',
    'session_events_discoveries_insert', 'session_events_discoveries_delete')) = 7;
DROP TABLE schema_check;
DROP TABLE schema_before;
COMMIT;
