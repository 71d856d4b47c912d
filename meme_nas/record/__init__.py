"""Record of a study: tasks, trials and their ranking."""
