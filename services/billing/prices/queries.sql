-- name: list_price_books()
-- Lists every price book that has been in force.
SELECT version, book, source FROM price_books ORDER BY version;

-- name: insert_price_book(version, book, source)!
-- Puts a new version of a price book into force.
INSERT INTO price_books (version, book, source) VALUES (:version, :book, :source) ON CONFLICT (version) DO NOTHING;

-- name: get_last_priced_day(version)$
-- Reads the last day on which something was used that a price book priced by its moment; a job keeps its version.
SELECT max(usage_day)
FROM usage_sums
WHERE price_book_version = :version AND kind NOT IN ('training_tokens', 'evaluation_tokens');
