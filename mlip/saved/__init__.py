"""Trained models as they lie in folders: of a run, or of an export."""
