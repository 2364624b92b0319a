-- Which formats and features there are is said by the contract alone (finemesh.files.v1): one more needs no change here.
ALTER TABLE files
    DROP CONSTRAINT files_format_check,
    ADD CONSTRAINT files_format_check CHECK (format ~ '^[a-z_]{1,40}$'),
    DROP CONSTRAINT files_features_check,
    ADD CONSTRAINT files_features_check CHECK (array_to_string(features, ',') ~ '^[a-z_,]*$');
