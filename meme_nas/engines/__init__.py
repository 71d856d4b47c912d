"""Engines, which run the tasks of a search in workers and return their outcomes."""
