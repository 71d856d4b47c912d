"""Work of a worker on a task: train experts that the bank lacks, sample, score. Neither Optuna nor SQLAlchemy."""
