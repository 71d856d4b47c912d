"""What a study has recorded: tasks, trials, their ranking."""
