-- The session-event store: CONTRACT.md section 3, for SQLite 3.38 or newer (or an older one built with JSON1).
-- Runs on a fresh file, and brings a file that holds session_events already up to this version: every statement
-- may run again without changing anything. server.py carries this text to the letter.

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
CREATE INDEX IF NOT EXISTS idx_session_events_identity_ended_at ON session_events (identity_hash, ended_at);
CREATE INDEX IF NOT EXISTS idx_session_events_received_at ON session_events (received_at);
CREATE INDEX IF NOT EXISTS idx_session_events_ended_at ON session_events (ended_at);

-- Which session touched which discovery: the edges of the session graph.
CREATE TABLE IF NOT EXISTS session_discoveries (
  discovery_ref TEXT NOT NULL,
  event_id INTEGER NOT NULL,
  PRIMARY KEY (discovery_ref, event_id)
) WITHOUT ROWID;

-- No SQL function is called while a row is inserted (json_each is a table): a function might abort the statement, and
-- for that SQLite would copy each page first, a fifth of the whole cost of an event. So a row whose refs are not JSON
-- text is refused. The upsert clause, unlike OR IGNORE, holds under any OR clause of the statement that inserts.
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
      AND discovery_ref IN (SELECT value FROM json_each(OLD.discovery_refs_json) WHERE type = 'text');
END;

-- Rows that were there before the triggers; whatever they hold, this does not fail.
INSERT OR IGNORE INTO session_discoveries (discovery_ref, event_id)
  SELECT value, session_events.id
    FROM session_events,
         json_each(CASE WHEN json_valid(discovery_refs_json) THEN discovery_refs_json ELSE '[]' END)
    WHERE json_each.type = 'text';

PRAGMA user_version = 1;
