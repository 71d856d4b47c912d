"""What the paper prints, and its ablations as recipes."""
