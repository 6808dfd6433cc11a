"""How right an output is, how sure that is, and for whom: scores, intervals, subgroups."""
