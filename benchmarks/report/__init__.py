"""What is said of it: tables and pictures."""
