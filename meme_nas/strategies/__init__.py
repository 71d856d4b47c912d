"""What to train and score next."""
