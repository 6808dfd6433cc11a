"""Towers and heads; with dataloading/reports.py the only code that imports transformers."""
