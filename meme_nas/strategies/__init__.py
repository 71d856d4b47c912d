"""Search strategies: the choice of the trials to train and score next."""
