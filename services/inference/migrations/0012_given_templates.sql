-- Whether a base model's chat template was given at its import, in place of the one that its authors ship.
ALTER TABLE base_models ADD COLUMN chat_template_given boolean NOT NULL DEFAULT false;
