"""The settings of training, sampling and scoring, validated. Nothing here imports torch."""
