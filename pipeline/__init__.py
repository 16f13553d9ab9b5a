"""Structures, graphs, teacher, cache, student, evaluation, report: data flows this way and never back."""
