"""Reports as text: read, cleaned, tokenized and drawn for a batch."""
