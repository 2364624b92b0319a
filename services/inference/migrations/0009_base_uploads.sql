-- Uploads of base models into the artifact store: a row is there before the first byte, and goes when the model is listed.
CREATE TABLE base_uploads (
    upload_id text PRIMARY KEY,
    artifact_key text NOT NULL,
    begin_time timestamptz NOT NULL DEFAULT now(),
    -- Its files are being removed: the upload can no longer become a model, and none under this key may begin.
    claim_time timestamptz
);
CREATE INDEX base_uploads_by_key ON base_uploads (artifact_key);
