"""Real scenes: what satellites deliver, read as it was delivered."""
