"""How far averages that were made after training are from those that training would have kept."""
