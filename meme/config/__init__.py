"""What is trained, sampled and scored, as validated settings. Nothing here imports torch."""
