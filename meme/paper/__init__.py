"""The paper's printed figures, and its ablations as recipes."""
