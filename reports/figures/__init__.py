"""Nouns to charts, one module for each question that a page answers."""
