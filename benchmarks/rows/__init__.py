"""What is timed: problems, and the rows of the tables, each of which builds a provider."""
