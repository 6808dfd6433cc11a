"""`mlip prepare`: a download or a user's own files to shards, index and manifest."""
