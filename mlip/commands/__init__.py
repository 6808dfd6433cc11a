"""The sub-commands of `mlip`: their arguments, and what each does with them."""
