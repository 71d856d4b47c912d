"""Surrogate model of the scores of cascades, and the choice of the cascades to score next."""
