"""What people made of predictions, and what the next labels are worth."""
