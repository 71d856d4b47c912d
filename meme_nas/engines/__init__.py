"""Ways to run a search: each hands tasks to workers and outcomes back."""
