-- What reads calls of tools and thoughts from a base model's answers, by vLLM's names; models that were imported before
-- have none until they are imported again.

ALTER TABLE base_models ADD COLUMN tool_parser text NOT NULL DEFAULT '';
ALTER TABLE base_models ADD COLUMN reasoning_parser text NOT NULL DEFAULT '';
