"""Checks of a search's result by further trainings and scores: audit, choice of p, confirmation, last scores."""
