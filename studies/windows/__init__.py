"""What the mean of a window gives in place of a learning-rate decay over it."""
