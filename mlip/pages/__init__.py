"""The pages that people read: of a run and of a task, each one HTML file that loads nothing."""
