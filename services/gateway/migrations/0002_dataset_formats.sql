-- Every format that training knows, and which features a dataset makes use of.
ALTER TABLE files
    DROP CONSTRAINT files_format_check,
    ADD CONSTRAINT files_format_check CHECK (format IN ('conversation', 'instruction', 'text', 'preference', 'tokens')),
    ADD COLUMN features text[] NOT NULL DEFAULT '{}' CHECK (
        features <@ ARRAY['tools', 'reasoning', 'message_weights', 'sample_weights', 'parallel_tool_calls']
    );
