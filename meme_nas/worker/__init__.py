"""What a worker does with a task: train what the bank lacks, sample, score. Neither Optuna nor SQLAlchemy."""
