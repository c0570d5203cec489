"""What is made of maps."""
