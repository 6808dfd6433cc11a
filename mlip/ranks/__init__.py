"""Processes that train together: their group, collectives with exact gradients, the launcher."""
