"""Every setting of a run: classes, ranges, agreement, files and overrides, and their own page."""
