-- The first part of a name is the namespace of base models or of one project's models, never of both. It is compared in
-- lower case: two that differ by capitals only would be taken for one another.

CREATE TABLE model_namespaces (
    namespace text PRIMARY KEY CHECK (namespace = lower(namespace)),
    kind text NOT NULL CHECK (kind IN ('bases', 'project'))
);
INSERT INTO model_namespaces (namespace, kind)
SELECT DISTINCT lower(split_part(model_id, '/', 1)), 'bases' FROM base_models;
INSERT INTO model_namespaces (namespace, kind)
SELECT DISTINCT lower(split_part(name, '/', 1)), 'project' FROM model_names WHERE kind <> 'base' ON CONFLICT DO NOTHING;
