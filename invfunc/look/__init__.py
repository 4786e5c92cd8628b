"""What is drawn, measured and checked."""
