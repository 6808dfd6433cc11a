"""Image files: read and checked, hashed by what they show, compared."""
