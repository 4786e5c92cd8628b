"""What runs on several ranks: the cases, and the worker that runs all of them in one process group."""
