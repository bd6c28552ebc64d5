"""What was asked for, and when a training is due."""
