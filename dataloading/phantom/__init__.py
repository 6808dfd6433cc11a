"""Generated chest studies with known truth."""
