"""Tables of users, as text and as Arrow columns."""
