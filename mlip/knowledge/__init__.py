"""Tables of concepts, where a report mentions them, and a vector for each."""
