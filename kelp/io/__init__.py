"""Files, stores and executors."""
