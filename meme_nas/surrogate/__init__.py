"""What is expected of cascades that were never drawn, and which of them to score."""
