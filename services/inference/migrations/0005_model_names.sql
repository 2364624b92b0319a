-- One namespace: a name that chat calls use means one base model, one tuned model or one endpoint.
-- `owner` is the model's id, the tuning job, or the endpoint's id.

CREATE TABLE model_names (
    name text PRIMARY KEY,
    kind text NOT NULL CHECK (kind IN ('base', 'tuned', 'endpoint')),
    owner text NOT NULL
);
INSERT INTO model_names (name, kind, owner) SELECT DISTINCT model_id, 'base', model_id FROM base_models;
INSERT INTO model_names (name, kind, owner)
SELECT endpoint_id, 'endpoint', id FROM endpoints WHERE deleted_at IS NULL ON CONFLICT DO NOTHING;
INSERT INTO model_names (name, kind, owner)
SELECT model_id, 'tuned', tuning_job FROM models WHERE deleted_at IS NULL ON CONFLICT DO NOTHING;
