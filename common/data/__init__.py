"""Comparisons: the table, where it comes from, what may be trained on and scored."""
