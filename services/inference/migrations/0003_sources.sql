-- Where a base model's files come from, as the importer said; empty when nothing was said.

ALTER TABLE base_models ADD COLUMN source text NOT NULL DEFAULT '';
